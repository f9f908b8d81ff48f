"""What a client reads of jobs and books: protobuf -> core, and how the words are named in both.

Fails with `CallFailed` on what a newer daemon says and this client has no word for.
"""

from __future__ import annotations

import datetime as dt
import enum
from collections.abc import Callable, Iterable
from typing import TypeVar

from sage_fed import core
from sage_fed.errors import CallFailed
from sage_fed.v1 import budget_pb2, inference_pb2, types_pb2

E = TypeVar("E", bound=enum.Enum)


def word(words: type[E], names: Callable[[int], str], prefix: str, number: int) -> E:
    """Return core's value for a protobuf enum's, by the naming convention."""
    try:
        return words[names(number).removeprefix(prefix)]
    except (ValueError, KeyError):
        message = f"the daemon said {words.__name__} {number}, which this client does not know"
        raise CallFailed(message, status="UNKNOWN") from None


class _Role(enum.Enum):
    TACTICAL = core.Tier.TACTICAL
    STRATEGIC = core.Tier.STRATEGIC


def tier_of(number: int) -> core.Tier:
    """Return the tier that a reply names."""
    return word(_Role, types_pb2.Tier.Name, "TIER_", number).value


def event_of(reply: inference_pb2.GenerateStreamResponse) -> core.Event:
    """Return one event of a stream."""
    match reply.WhichOneof("event"):
        case "started":
            return started_of(reply.started)
        case "delta":
            return delta_of(reply.delta)
        case "finished":
            return finished_of(reply.finished)
        case _:
            raise CallFailed(
                "the daemon sent an event that this client does not know", status="UNKNOWN"
            )


def answer_of(reply: inference_pb2.GenerateResponse) -> core.Answer:
    """Return a whole answer."""
    return core.Answer(
        started=started_of(reply.started),
        text=reply.text,
        token_ids=tuple(reply.token_ids),
        logprobs=logprobs_of(reply.logprobs),
        finished=finished_of(reply.finished),
    )


def started_of(started: inference_pb2.Started) -> core.Started:
    """Return the first event."""
    return core.Started(
        job_id=started.job_id,
        route=route_of(started.route),
        held_uatp=started.held_uatp,
        prompt_tokens=started.prompt_tokens,
        seed=started.seed,
        max_new_tokens=started.max_new_tokens,
        replayed=started.replayed,
    )


def route_of(route: types_pb2.Route) -> core.Route:
    """Return a decision."""
    auto = route.requested in (types_pb2.TIER_AUTO, types_pb2.TIER_UNSPECIFIED)
    return core.Route(
        tier=tier_of(route.tier),
        reason=route.reason,
        requested=None if auto else tier_of(route.requested),
        downgraded=route.downgraded,
    )


def logprobs_of(logprobs: Iterable[types_pb2.TokenLogprob]) -> tuple[core.Logprob, ...]:
    """Return log-probabilities, in order."""
    return tuple(
        core.Logprob(
            entry.token_id, entry.logprob, tuple((top.token_id, top.logprob) for top in entry.top)
        )
        for entry in logprobs
    )


def delta_of(delta: inference_pb2.Delta) -> core.Delta:
    """Return a piece of output."""
    return core.Delta(
        delta.text, tuple(delta.token_ids), logprobs_of(delta.logprobs), delta.output_tokens
    )


def finished_of(finished: inference_pb2.Finished) -> core.Finished:
    """Return the last event."""
    usage, timing, price = finished.usage, finished.timing, finished.price
    return core.Finished(
        stop_reason=word(
            core.StopReason, types_pb2.StopReason.Name, "STOP_REASON_", finished.stop_reason
        ),
        usage=core.Usage(usage.prompt_tokens, usage.cached_tokens, usage.output_tokens),
        timing=core.Timing(
            queue_s=timing.queue_s,
            prefill_s=timing.prefill_s,
            decode_s=timing.decode_s,
            time_to_first_token_s=timing.time_to_first_token_s,
            total_s=timing.total_s,
            device_s=timing.device_s,
        ),
        price=core.Price(price.charged_uatp, price.held_uatp, price.rate_card),
        balance_uatp=finished.balance_uatp,
    )


def quote_of(reply: inference_pb2.QuoteResponse) -> core.Quote:
    """Return a quote."""
    refused = reply.HasField("refusal")
    return core.Quote(
        decision=refusal_of(reply.refusal) if refused else route_of(reply.route),
        tiers=tuple(
            core.RouteQuote(
                tier=tier_of(quote.tier),
                worst_case_uatp=quote.worst_case_uatp,
                affordable=quote.affordable,
                estimated_s=quote.estimated_s if quote.HasField("estimated_s") else None,
            )
            for quote in reply.quotes
        ),
        rate_card=reply.rate_card,
        prompt_tokens=reply.prompt_tokens,
        max_new_tokens=reply.max_new_tokens,
        balance_uatp=reply.balance_uatp,
    )


def refusal_of(refusal: inference_pb2.Refusal) -> core.Refusal:
    """Return a named "no"."""
    return core.Refusal(
        reason=refusal.reason,
        message=refusal.message,
        retry_after_s=refusal.retry_after_s if refusal.HasField("retry_after_s") else None,
        estimate_s=refusal.estimate_s if refusal.HasField("estimate_s") else None,
    )


def count_of(reply: inference_pb2.CountTokensResponse) -> core.TokenCount:
    """Return a count."""
    return core.TokenCount(reply.prompt_tokens, reply.max_context_tokens)


def budget_of(budget: types_pb2.Budget) -> core.Budget:
    """Return an account's books."""
    return core.Budget(
        account=budget.account,
        balance_uatp=budget.balance_uatp,
        held_uatp=budget.held_uatp,
        discharged_uatp=budget.discharged_uatp,
        capacity_uatp=budget.capacity_uatp,
        refill_uatp_per_s=budget.refill_uatp_per_s,
        strategic_floor_uatp=budget.strategic_floor_uatp,
    )


def page_of(reply: budget_pb2.ListEntriesResponse) -> core.EntryPage:
    """Return a page of entries."""
    entries = (
        core.Entry(
            entry_id=entry.entry_id,
            time_ns=entry.time.seconds * 1_000_000_000 + entry.time.nanos,
            kind=word(core.EntryKind, budget_pb2.EntryKind.Name, "ENTRY_KIND_", entry.kind),
            job_id=entry.job_id,
            amount_uatp=entry.amount_uatp,
            debit=entry.debit,
            credit=entry.credit,
            rate_card=entry.rate_card,
        )
        for entry in reply.entries
    )
    return core.EntryPage(tuple(entries), reply.next_page_token, tuple(map(day_of, reply.days)))


def day_of(reply: budget_pb2.Day) -> core.Day:
    """Return what is left of a day."""
    return core.Day(
        day=(dt.date.fromisoformat(reply.date) - dt.date(1970, 1, 1)).days,
        entries=reply.entries,
        minted_uatp=reply.minted_uatp,
        spent_uatp=reply.spent_uatp,
        settled_jobs=reply.settled_jobs,
        voided_jobs=reply.voided_jobs,
        expired_jobs=reply.expired_jobs,
    )
