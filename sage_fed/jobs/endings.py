"""What a sequence's ending means for its job: the reason, the times, or the error.

Owns the translation from the scheduler's `Ended` to the client's words. Pure.
"""

from __future__ import annotations

from collections.abc import Collection

from sage_fed.core import StopReason, Tier, Timing
from sage_fed.device import Ended, EndReason
from sage_fed.errors import DeviceOutOfMemory, NotFinite, SageFedError, TierUnavailable

_NATURAL = {EndReason.EOS: StopReason.END_OF_TEXT, EndReason.LENGTH: StopReason.LENGTH}

DROPS_OUTPUT = (StopReason.STOP_STRING, StopReason.CANCELLED)
"""What comes after these is not delivered: the text is complete, or nobody reads."""

_RETRY_FAILED_S = 5.0
"""A tier that failed loads its model again at once; a small one serves by then."""


def failure_of(ended: Ended, tier: Tier) -> SageFedError | None:
    """Return the error of a sequence that the device did not bring to an end."""
    match ended.reason:
        case EndReason.OUT_OF_MEMORY:
            return DeviceOutOfMemory(
                "the device had no memory for this job; try a shorter prompt or max_new_tokens"
            )
        case EndReason.NOT_FINITE:
            return NotFinite(
                "the model's numbers overflowed for this job and nothing was charged; the same "
                "prompt would fail again, so shorten or reword it"
            )
        case EndReason.FAILED:
            return TierUnavailable(
                f"the {tier.name} tier failed and nothing was charged; ask again soon",
                _RETRY_FAILED_S,
            )
        case _:
            return None


def stop_reason_of(
    asked: StopReason | None, ended: Ended | None, stop_token_ids: Collection[int] = ()
) -> StopReason:
    """Return why a job stopped.

    Args:
        asked: what it was asked to stop for, if it was.
        ended: the sequence's ending; None where it never got to the executor.
        stop_token_ids: those that the client named; any other was spelled by a stop string.
    """
    if asked in DROPS_OUTPUT:
        # Also where the sequence had ended by itself: what came after it was dropped.
        return asked
    if ended is not None and ended.reason in _NATURAL:
        return _NATURAL[ended.reason]
    if ended is not None and ended.reason is EndReason.STOP_TOKEN:
        named = ended.stop_token_id in stop_token_ids
        return StopReason.STOP_TOKEN if named else StopReason.STOP_STRING
    # A shutdown ends sequences without anyone having asked this job to stop.
    return asked or StopReason.ABORTED


def timing_of(ended: Ended | None, arrived_s: float, now: float) -> Timing:
    """Return a job's durations; `arrived_s` and `now` are on the executor's clock."""
    if ended is None:
        return Timing(0.0, 0.0, 0.0, 0.0, now - arrived_s)
    started, first, last = ended.started_s, ended.first_token_s, ended.last_token_s
    return Timing(
        queue_s=(ended.ended_s if started is None else started) - ended.submitted_s,
        prefill_s=first - started if first is not None and started is not None else 0.0,
        decode_s=last - first if last is not None and first is not None else 0.0,
        time_to_first_token_s=first - arrived_s if first is not None else 0.0,
        total_s=now - arrived_s,
        device_s=ended.device_s,
    )
