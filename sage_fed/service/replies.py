"""Replies about jobs and books: core -> protobuf, field by field.

Owns the naming convention between core's enums and the proto's (`Tier.TACTICAL` is
`TIER_TACTICAL`; protobuf takes the names). Knows no rule of the product.
Cannot fail on values of core.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterable

from sage_fed import core
from sage_fed.core import Day, Entry
from sage_fed.v1 import budget_pb2, inference_pb2, types_pb2


def tier_of(tier: core.Tier | None) -> str:
    """Return the name of the enum's value; None, "the daemon chooses", is TIER_AUTO."""
    return "TIER_AUTO" if tier is None else f"TIER_{tier.name.upper()}"


def started_of(started: core.Started) -> inference_pb2.Started:
    """Translate the first event."""
    return inference_pb2.Started(
        job_id=started.job_id,
        route=route_of(started.route),
        held_uatp=started.held_uatp,
        prompt_tokens=started.prompt_tokens,
        seed=started.seed,
        max_new_tokens=started.max_new_tokens,
        replayed=started.replayed,
    )


def route_of(route: core.Route) -> types_pb2.Route:
    """Translate a decision."""
    return types_pb2.Route(
        tier=tier_of(route.tier),
        reason=route.reason,
        downgraded=route.downgraded,
        requested=tier_of(route.requested),
    )


def logprobs_of(logprobs: Iterable[core.Logprob]) -> list[types_pb2.TokenLogprob]:
    """Translate log-probabilities, in order."""
    return [
        types_pb2.TokenLogprob(
            token_id=entry.token_id,
            logprob=entry.logprob,
            top=[
                types_pb2.TopLogprob(token_id=token_id, logprob=logprob)
                for token_id, logprob in entry.top
            ],
        )
        for entry in logprobs
    ]


def delta_of(delta: core.Delta) -> inference_pb2.Delta:
    """Translate a piece of output."""
    return inference_pb2.Delta(
        text=delta.text,
        token_ids=delta.token_ids,
        logprobs=logprobs_of(delta.logprobs),
        output_tokens=delta.output_tokens,
    )


def finished_of(finished: core.Finished) -> inference_pb2.Finished:
    """Translate the last event."""
    usage, timing, price = finished.usage, finished.timing, finished.price
    return inference_pb2.Finished(
        stop_reason=f"STOP_REASON_{finished.stop_reason.name}",
        usage=types_pb2.Usage(
            prompt_tokens=usage.prompt_tokens,
            cached_tokens=usage.cached_tokens,
            output_tokens=usage.output_tokens,
        ),
        timing=types_pb2.Timing(
            queue_s=timing.queue_s,
            prefill_s=timing.prefill_s,
            decode_s=timing.decode_s,
            time_to_first_token_s=timing.time_to_first_token_s,
            total_s=timing.total_s,
            device_s=timing.device_s,
        ),
        price=types_pb2.Price(
            charged_uatp=price.charged_uatp, held_uatp=price.held_uatp, rate_card=price.rate_card
        ),
        balance_uatp=finished.balance_uatp,
    )


def answer_of(
    started: core.Started, output: core.Delta, finished: core.Finished
) -> inference_pb2.GenerateResponse:
    """Translate a whole answer."""
    return inference_pb2.GenerateResponse(
        started=started_of(started),
        text=output.text,
        token_ids=output.token_ids,
        logprobs=logprobs_of(output.logprobs),
        finished=finished_of(finished),
    )


def event_of(event: core.Event) -> inference_pb2.GenerateStreamResponse:
    """Translate one event of a stream."""
    match event:
        case core.Started():
            return inference_pb2.GenerateStreamResponse(started=started_of(event))
        case core.Delta():
            return inference_pb2.GenerateStreamResponse(delta=delta_of(event))
        case core.Finished():
            return inference_pb2.GenerateStreamResponse(finished=finished_of(event))


def quote_of(quote: core.Quote) -> inference_pb2.QuoteResponse:
    """Translate a quote; exactly one of `route` and `refusal` is set."""
    reply = inference_pb2.QuoteResponse(
        quotes=[
            inference_pb2.RouteQuote(
                tier=tier_of(entry.tier),
                worst_case_uatp=entry.worst_case_uatp,
                affordable=entry.affordable,
                estimated_s=entry.estimated_s,
            )
            for entry in quote.tiers
        ],
        rate_card=quote.rate_card,
        prompt_tokens=quote.prompt_tokens,
        max_new_tokens=quote.max_new_tokens,
        balance_uatp=quote.balance_uatp,
    )
    match quote.decision:
        case core.Route():
            reply.route.CopyFrom(route_of(quote.decision))
        case core.Refusal():
            reply.refusal.CopyFrom(refusal_of(quote.decision))
    return reply


def refusal_of(refusal: core.Refusal) -> inference_pb2.Refusal:
    """Translate a named "no"."""
    return inference_pb2.Refusal(
        reason=refusal.reason,
        message=refusal.message,
        retry_after_s=refusal.retry_after_s,
        estimate_s=refusal.estimate_s,
    )


def budget_of(budget: core.Budget) -> types_pb2.Budget:
    """Translate an account's books."""
    return types_pb2.Budget(
        account=budget.account,
        balance_uatp=budget.balance_uatp,
        held_uatp=budget.held_uatp,
        discharged_uatp=budget.discharged_uatp,
        capacity_uatp=budget.capacity_uatp,
        refill_uatp_per_s=budget.refill_uatp_per_s,
        strategic_floor_uatp=budget.strategic_floor_uatp,
    )


def day_of(day: Day) -> budget_pb2.Day:
    """Translate what is left of a day."""
    return budget_pb2.Day(
        date=str(dt.date(1970, 1, 1) + dt.timedelta(days=day.day)),
        entries=day.entries,
        minted_uatp=day.minted_uatp,
        spent_uatp=day.spent_uatp,
        settled_jobs=day.settled_jobs,
        voided_jobs=day.voided_jobs,
        expired_jobs=day.expired_jobs,
    )


def entry_of(entry: Entry) -> budget_pb2.Entry:
    """Translate one line of the ledger."""
    reply = budget_pb2.Entry(
        entry_id=entry.entry_id,
        kind=f"ENTRY_KIND_{entry.kind.name}",
        job_id=entry.job_id,
        amount_uatp=entry.amount_uatp,
        debit=entry.debit,
        credit=entry.credit,
        rate_card=entry.rate_card,
    )
    reply.time.seconds, reply.time.nanos = divmod(entry.time_ns, 1_000_000_000)
    return reply
