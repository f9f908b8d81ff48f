"""Replies as a client reads them: protobuf -> core.

Fails with `CallFailed` on what a newer daemon says and this client has no word for.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable
from typing import TypeVar

from sage_fed import core
from sage_fed.client.answers import Answer, EntryPage, LoadReport, TokenCount
from sage_fed.errors import CallFailed
from sage_fed.ledger.words import NS_PER_S, Entry, EntryKind
from sage_fed.v1 import admin_pb2, budget_pb2, inference_pb2, model_pb2, types_pb2

E = TypeVar("E", bound=enum.Enum)


def word(words: type[E], names: Callable[[int], str], prefix: str, number: int) -> E:
    """Return core's value for a protobuf enum's, by the naming convention."""
    try:
        return words[names(number).removeprefix(prefix)]
    except (ValueError, KeyError):
        message = f"the daemon said {words.__name__} {number}, which this client does not know"
        raise CallFailed(message, status="UNKNOWN") from None


def tier_of(number: int) -> core.Tier:
    """Return the tier that a reply names."""
    return word(core.Tier, types_pb2.Tier.Name, "TIER_", number)


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


def answer_of(reply: inference_pb2.GenerateResponse) -> Answer:
    """Return a whole answer."""
    return Answer(
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


def count_of(reply: inference_pb2.CountTokensResponse) -> TokenCount:
    """Return a count."""
    return TokenCount(reply.prompt_tokens, reply.max_context_tokens)


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


def page_of(reply: budget_pb2.ListEntriesResponse) -> EntryPage:
    """Return a page of entries."""
    entries = (
        Entry(
            entry_id=entry.entry_id,
            time_ns=entry.time.seconds * NS_PER_S + entry.time.nanos,
            kind=word(EntryKind, budget_pb2.EntryKind.Name, "ENTRY_KIND_", entry.kind),
            job_id=entry.job_id,
            amount_uatp=entry.amount_uatp,
            debit=entry.debit,
            credit=entry.credit,
            rate_card=entry.rate_card,
        )
        for entry in reply.entries
    )
    return EntryPage(tuple(entries), reply.next_page_token)


def model_of(model: model_pb2.Model) -> core.ModelStatus:
    """Return a tier's model."""
    return core.ModelStatus(
        tier=tier_of(model.tier),
        state=state_of(model.state),
        name=model.name,
        revision=model.revision,
        precision=model.precision,
        kernels=model.kernels,
        device=model.device,
        architecture=model.architecture,
        parameters=model.parameters,
        weight_bytes=model.weight_bytes,
        kv_cache_bytes=model.kv_cache_bytes,
        kv_cache_tokens=model.kv_cache_tokens,
        max_context_tokens=model.max_context_tokens,
        load_s=model.load_s,
        load_progress=model.load_progress,
        decode_uatp=model.decode_uatp,
        message=model.message,
        prefill_uatp=model.prefill_uatp,
        cached_uatp=model.cached_uatp,
    )


def state_of(number: int) -> core.TierState:
    """Return a tier's state."""
    return word(core.TierState, types_pb2.TierState.Name, "TIER_STATE_", number)


def tier_load_of(status: model_pb2.TierStatus) -> core.TierLoad:
    """Return what a tier is doing."""
    return core.TierLoad(
        tier=tier_of(status.tier),
        state=state_of(status.state),
        running=status.requests_running,
        waiting=status.requests_waiting,
        waiting_limit=status.requests_waiting_limit,
        kv_tokens_used=status.kv_tokens_used,
        kv_tokens_total=status.kv_tokens_total,
        kv_tokens_cached=status.kv_tokens_cached,
        max_context_tokens=status.max_context_tokens,
        queued_prompt_tokens=status.queued_prompt_tokens,
        decode_step_s=status.decode_step_s if status.HasField("decode_step_s") else None,
        prefill_tokens_per_s=(
            status.prefill_tokens_per_s if status.HasField("prefill_tokens_per_s") else None
        ),
    )


def status_of(reply: model_pb2.GetStatusResponse) -> core.DaemonStatus:
    """Return the daemon at a glance."""
    return core.DaemonStatus(
        version=reply.version,
        uptime_s=reply.uptime_s,
        draining=reply.draining,
        device=reply.device,
        rate_card=reply.rate_card,
        cost_ratio=reply.cost_ratio,
        tiers=tuple(tier_load_of(status) for status in reply.tiers),
        rate_card_fit=fit_of(reply.rate_card_fit),
        rate_card_note=reply.rate_card_note,
        device_fallback=reply.device_fallback,
    )


def fit_of(number: int) -> core.CardFit:
    """Return how a card fits; a daemon that does not say so does not know."""
    if number == model_pb2.RATE_CARD_FIT_UNSPECIFIED:
        return core.CardFit.UNKNOWN
    return word(core.CardFit, model_pb2.RateCardFit.Name, "RATE_CARD_FIT_", number)


def card_status_of(reply: admin_pb2.AdoptRateCardResponse) -> core.CardStatus:
    """Return what is in force now."""
    return core.CardStatus(reply.rate_card, reply.cost_ratio, fit_of(reply.fit), reply.note)


def calibration_of(reply: admin_pb2.CalibrateResponse) -> core.CalibrationEvent:
    """Return one event of a calibration."""
    match reply.WhichOneof("event"):
        case "progress":
            progress = reply.progress
            return core.CalibrationProgress(
                phase=progress.phase,
                fraction=progress.fraction,
                point=progress.point,
                elapsed_s=progress.elapsed_s,
                cost_ratio=progress.cost_ratio if progress.HasField("cost_ratio") else None,
                measured=tuple(point_of(point) for point in progress.measured),
            )
        case "result":
            result = reply.result
            return core.CalibrationResult(
                version=result.version,
                path=result.path,
                card=result.card,
                report=result.report,
                plot=result.plot,
                cost_ratio=result.cost_ratio,
                cost_ratio_spread=result.cost_ratio_spread,
                took_s=result.took_s,
                adopted=result.adopted,
                points=tuple(point_of(point) for point in result.points),
            )
        case _:
            raise CallFailed(
                "the daemon sent an event that this client does not know", status="UNKNOWN"
            )


def point_of(point: admin_pb2.MeasuredPoint) -> core.MeasuredPoint:
    """Return a measured point."""
    return core.MeasuredPoint(
        tier=tier_of(point.tier),
        phase=word(core.Phase, types_pb2.Phase.Name, "PHASE_", point.phase),
        batch=point.batch,
        context_tokens=point.context_tokens,
        tokens=point.tokens,
        step_s=point.step_s,
        spread=point.spread if point.rounds > 1 else None,
        rounds=point.rounds,
        co_resident_s=point.co_resident_s if point.HasField("co_resident_s") else None,
    )


def load_of(reply: admin_pb2.GetLoadResponse) -> LoadReport:
    """Return what runs and waits."""
    jobs = (
        core.RunningJob(
            job_id=job.job_id,
            account=job.account,
            tier=tier_of(job.tier),
            priority=word(core.Priority, types_pb2.Priority.Name, "PRIORITY_", job.priority),
            age_s=job.age_s,
            prompt_tokens=job.prompt_tokens,
            output_tokens=job.output_tokens,
            held_uatp=job.held_uatp,
        )
        for job in reply.jobs
    )
    return LoadReport(
        tuple(tier_load_of(tier) for tier in reply.tiers), tuple(jobs), reply.held_uatp
    )
