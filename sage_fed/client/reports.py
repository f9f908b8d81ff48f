"""What a client reads of the daemon itself: its models, loads, cards and calibrations.

Fails with `CallFailed` on what a newer daemon says and this client has no word for.
"""

from __future__ import annotations

from sage_fed import core
from sage_fed.client.replies import tier_of, word
from sage_fed.errors import CallFailed
from sage_fed.v1 import admin_pb2, model_pb2, types_pb2


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
        end_tokens=tuple(core.EndToken(end.id, end.text) for end in model.end_tokens),
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
        running_limit=status.requests_running_limit,
        retry_after_s=status.retry_after_s if status.HasField("retry_after_s") else None,
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
        ledger_trouble=reply.ledger_trouble,
        recovered_jobs=reply.recovered_jobs,
        recovered_uatp=reply.recovered_uatp,
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


def load_of(reply: admin_pb2.GetLoadResponse) -> core.LoadReport:
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
    unread = (
        core.OpenReply(
            call_id=call.call_id,
            account=call.account,
            connection=call.connection,
            method=call.method,
            job_id=call.job_id,
            age_s=call.age_s,
            unread_s=call.unread_s,
            unread_bytes=call.unread_bytes,
            ended=call.ended,
        )
        for call in reply.unread
    )
    return core.LoadReport(
        tiers=tuple(tier_load_of(tier) for tier in reply.tiers),
        jobs=tuple(jobs),
        held_uatp=reply.held_uatp,
        unread=tuple(unread),
        open_calls=reply.open_calls,
        connections=reply.connections,
    )
