"""The words of the project: jobs, routes, deltas, usage, prices.

Floor 0. Owns the frozen values that travel between floors.
Knows neither protobuf (that stops at `service`) nor torch nor SQLite.
Amounts are integer micro-ATP (`*_uatp`), durations seconds (`*_s`), counts `num_*`
or plain plurals, as in `docs/architecture.md`.

`tiers`, `jobs` and `money` hold them; `naming` has rules of text that several parts share.
Import them from here.
"""

from __future__ import annotations

from sage_fed.core.jobs import (
    Caller,
    Delta,
    Event,
    Finished,
    JobSpec,
    Logprob,
    Message,
    OpenReply,
    Priority,
    Prompt,
    Quote,
    Refusal,
    Role,
    Route,
    RouteQuote,
    RunningJob,
    Sampling,
    SamplingRequest,
    Started,
    StopReason,
    Timing,
    TraceContext,
    Usage,
    parse_traceparent,
)
from sage_fed.core.money import UATP_PER_ATP, Budget, Offer, Price
from sage_fed.core.naming import HEAD_BYTES, counted, misnomer, resolve_model
from sage_fed.core.tiers import (
    TIER_ROLES,
    CalibrationEvent,
    CalibrationProgress,
    CalibrationResult,
    CardFit,
    CardStatus,
    DaemonStatus,
    EndToken,
    GenerationDefaults,
    MeasuredPoint,
    ModelInfo,
    ModelStatus,
    Phase,
    Tier,
    TierLoad,
    TierState,
    TierStatus,
)

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
