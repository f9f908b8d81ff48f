"""The words of the project: jobs, routes, deltas, usage, prices.

Floor 0. Owns the frozen values that travel between floors.
Knows neither protobuf (that stops at `service`) nor torch nor SQLite.
Amounts are integer micro-ATP (`*_uatp`), durations seconds (`*_s`), counts `num_*`
or plain plurals, as in `docs/architecture.md`.

`tiers`, `money`, `callers`, `jobs`, `routes`, `events`, `calibration`, `plurals` and `tracing`
hold them; `model_names` and `file_kinds` are rules of text and bytes that several parts share.
Import them from here.
"""

from __future__ import annotations

from sage_fed.core.calibration import (
    CalibrationEvent,
    CalibrationProgress,
    CalibrationResult,
    MeasuredPoint,
)
from sage_fed.core.callers import Caller, Role
from sage_fed.core.events import Delta, Event, Finished, Logprob, Started, StopReason, Timing, Usage
from sage_fed.core.file_kinds import HEAD_BYTES, misnomer
from sage_fed.core.jobs import (
    JobSpec,
    Message,
    OpenReply,
    Priority,
    Prompt,
    RunningJob,
    Sampling,
    SamplingRequest,
)
from sage_fed.core.model_names import resolve_model
from sage_fed.core.money import UATP_PER_ATP, Budget, Offer, Phase, Price
from sage_fed.core.plurals import counted
from sage_fed.core.routes import Quote, Refusal, Route, RouteQuote
from sage_fed.core.tiers import (
    TIER_ROLES,
    CardFit,
    CardStatus,
    DaemonStatus,
    EndToken,
    GenerationDefaults,
    ModelInfo,
    ModelStatus,
    Tier,
    TierLoad,
    TierState,
    TierStatus,
)
from sage_fed.core.tracing import TraceContext, parse_traceparent

__all__ = [
    "HEAD_BYTES",
    "TIER_ROLES",
    "UATP_PER_ATP",
    "Budget",
    "CalibrationEvent",
    "CalibrationProgress",
    "CalibrationResult",
    "Caller",
    "CardFit",
    "CardStatus",
    "DaemonStatus",
    "Delta",
    "EndToken",
    "Event",
    "Finished",
    "GenerationDefaults",
    "JobSpec",
    "Logprob",
    "MeasuredPoint",
    "Message",
    "ModelInfo",
    "ModelStatus",
    "Offer",
    "OpenReply",
    "Phase",
    "Price",
    "Priority",
    "Prompt",
    "Quote",
    "Refusal",
    "Role",
    "Route",
    "RouteQuote",
    "RunningJob",
    "Sampling",
    "SamplingRequest",
    "Started",
    "StopReason",
    "Tier",
    "TierLoad",
    "TierState",
    "TierStatus",
    "Timing",
    "TraceContext",
    "Usage",
    "counted",
    "misnomer",
    "parse_traceparent",
    "resolve_model",
]
