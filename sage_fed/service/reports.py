"""Replies about the daemon itself: models, loads, cards and calibrations; core -> protobuf.

Knows no rule of the product. Cannot fail on values of core.
"""

from __future__ import annotations

from sage_fed import core
from sage_fed.service.replies import tier_of
from sage_fed.v1 import admin_pb2, model_pb2


def state_of(state: core.TierState) -> str:
    """Return the name of the enum's value."""
    return f"TIER_STATE_{state.name}"


def model_of(model: core.ModelStatus) -> model_pb2.Model:
    """Translate a tier's model."""
    return model_pb2.Model(
        tier=tier_of(model.tier),
        state=state_of(model.state),
        name=model.name,
        revision=model.revision,
        architecture=model.architecture,
        parameters=model.parameters,
        precision=model.precision,
        kernels=model.kernels,
        device=model.device,
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
        end_tokens=[model_pb2.EndToken(id=end.id, text=end.text) for end in model.end_tokens],
    )


def load_of(load: core.TierLoad) -> model_pb2.TierStatus:
    """Translate what a tier is doing."""
    return model_pb2.TierStatus(
        tier=tier_of(load.tier),
        state=state_of(load.state),
        requests_running=load.running,
        requests_waiting=load.waiting,
        requests_waiting_limit=load.waiting_limit,
        kv_tokens_used=load.kv_tokens_used,
        kv_tokens_total=load.kv_tokens_total,
        kv_tokens_cached=load.kv_tokens_cached,
        max_context_tokens=load.max_context_tokens,
        queued_prompt_tokens=load.queued_prompt_tokens,
        requests_running_limit=load.running_limit,
        retry_after_s=load.retry_after_s,
        decode_step_s=load.decode_step_s,
        prefill_tokens_per_s=load.prefill_tokens_per_s,
    )


def status_of(status: core.DaemonStatus) -> model_pb2.GetStatusResponse:
    """Translate the daemon's status."""
    return model_pb2.GetStatusResponse(
        version=status.version,
        uptime_s=status.uptime_s,
        draining=status.draining,
        device=status.device,
        rate_card=status.rate_card,
        cost_ratio=status.cost_ratio,
        tiers=[load_of(load) for load in status.tiers],
        rate_card_fit=fit_of(status.rate_card_fit),
        rate_card_note=status.rate_card_note,
        device_fallback=status.device_fallback,
        ledger_trouble=status.ledger_trouble,
        recovered_jobs=status.recovered_jobs,
        recovered_uatp=status.recovered_uatp,
    )


def unread_of(reply: core.OpenReply) -> admin_pb2.UnreadReply:
    """Translate one reply that waits for its reader."""
    return admin_pb2.UnreadReply(
        call_id=reply.call_id,
        account=reply.account,
        connection=reply.connection,
        method=reply.method,
        job_id=reply.job_id,
        age_s=reply.age_s,
        unread_s=reply.unread_s,
        unread_bytes=reply.unread_bytes,
        ended=reply.ended,
    )


def running_job_of(job: core.RunningJob) -> admin_pb2.RunningJob:
    """Translate one job that has not ended."""
    return admin_pb2.RunningJob(
        job_id=job.job_id,
        account=job.account,
        tier=tier_of(job.tier),
        age_s=job.age_s,
        prompt_tokens=job.prompt_tokens,
        output_tokens=job.output_tokens,
        held_uatp=job.held_uatp,
        priority=f"PRIORITY_{job.priority.name}",
    )


def fit_of(fit: core.CardFit) -> str:
    """Return the name of the enum's value."""
    return f"RATE_CARD_FIT_{fit.name}"


def card_status_of(card: core.CardStatus) -> admin_pb2.AdoptRateCardResponse:
    """Translate what is in force now."""
    return admin_pb2.AdoptRateCardResponse(
        rate_card=card.version, cost_ratio=card.cost_ratio, fit=fit_of(card.fit), note=card.note
    )


def calibration_of(event: core.CalibrationEvent) -> admin_pb2.CalibrateResponse:
    """Translate one event of a calibration."""
    match event:
        case core.CalibrationProgress():
            progress = admin_pb2.CalibrationProgress(
                phase=event.phase,
                fraction=event.fraction,
                point=event.point,
                elapsed_s=event.elapsed_s,
                cost_ratio=event.cost_ratio,
                measured=[point_of(point) for point in event.measured],
            )
            return admin_pb2.CalibrateResponse(progress=progress)
        case core.CalibrationResult():
            result = admin_pb2.CalibrationResult(
                version=event.version,
                path=event.path,
                card=event.card,
                report=event.report,
                plot=event.plot,
                cost_ratio=event.cost_ratio,
                cost_ratio_spread=event.cost_ratio_spread,
                took_s=event.took_s,
                adopted=event.adopted,
                points=[point_of(point) for point in event.points],
            )
            return admin_pb2.CalibrateResponse(result=result)


def point_of(point: core.MeasuredPoint) -> admin_pb2.MeasuredPoint:
    """Translate a measured point."""
    return admin_pb2.MeasuredPoint(
        tier=tier_of(point.tier),
        phase=f"PHASE_{point.phase.name}",
        batch=point.batch,
        context_tokens=point.context_tokens,
        tokens=point.tokens,
        step_s=point.step_s,
        spread=0.0 if point.spread is None else point.spread,
        rounds=point.rounds,
        co_resident_s=point.co_resident_s,
    )
