from sage_fed.v1 import model_pb2 as _model_pb2
from sage_fed.v1 import types_pb2 as _types_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class AbortRequest(_message.Message):
    __slots__ = ("job_id", "call_id", "connection")
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    CALL_ID_FIELD_NUMBER: _ClassVar[int]
    CONNECTION_FIELD_NUMBER: _ClassVar[int]
    job_id: str
    call_id: str
    connection: str
    def __init__(self, job_id: _Optional[str] = ..., call_id: _Optional[str] = ..., connection: _Optional[str] = ...) -> None: ...

class AbortResponse(_message.Message):
    __slots__ = ("aborted",)
    ABORTED_FIELD_NUMBER: _ClassVar[int]
    aborted: bool
    def __init__(self, aborted: _Optional[bool] = ...) -> None: ...

class DrainRequest(_message.Message):
    __slots__ = ("grace_s",)
    GRACE_S_FIELD_NUMBER: _ClassVar[int]
    grace_s: float
    def __init__(self, grace_s: _Optional[float] = ...) -> None: ...

class DrainResponse(_message.Message):
    __slots__ = ("jobs_running",)
    JOBS_RUNNING_FIELD_NUMBER: _ClassVar[int]
    jobs_running: int
    def __init__(self, jobs_running: _Optional[int] = ...) -> None: ...

class SetBudgetRequest(_message.Message):
    __slots__ = ("account", "balance_uatp", "capacity_uatp", "refill_uatp_per_s", "strategic_floor_uatp")
    ACCOUNT_FIELD_NUMBER: _ClassVar[int]
    BALANCE_UATP_FIELD_NUMBER: _ClassVar[int]
    CAPACITY_UATP_FIELD_NUMBER: _ClassVar[int]
    REFILL_UATP_PER_S_FIELD_NUMBER: _ClassVar[int]
    STRATEGIC_FLOOR_UATP_FIELD_NUMBER: _ClassVar[int]
    account: str
    balance_uatp: int
    capacity_uatp: int
    refill_uatp_per_s: int
    strategic_floor_uatp: int
    def __init__(self, account: _Optional[str] = ..., balance_uatp: _Optional[int] = ..., capacity_uatp: _Optional[int] = ..., refill_uatp_per_s: _Optional[int] = ..., strategic_floor_uatp: _Optional[int] = ...) -> None: ...

class SetBudgetResponse(_message.Message):
    __slots__ = ("budget",)
    BUDGET_FIELD_NUMBER: _ClassVar[int]
    budget: _types_pb2.Budget
    def __init__(self, budget: _Optional[_Union[_types_pb2.Budget, _Mapping]] = ...) -> None: ...

class GetLoadRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetLoadResponse(_message.Message):
    __slots__ = ("tiers", "jobs", "held_uatp", "unread", "open_calls", "connections")
    TIERS_FIELD_NUMBER: _ClassVar[int]
    JOBS_FIELD_NUMBER: _ClassVar[int]
    HELD_UATP_FIELD_NUMBER: _ClassVar[int]
    UNREAD_FIELD_NUMBER: _ClassVar[int]
    OPEN_CALLS_FIELD_NUMBER: _ClassVar[int]
    CONNECTIONS_FIELD_NUMBER: _ClassVar[int]
    tiers: _containers.RepeatedCompositeFieldContainer[_model_pb2.TierStatus]
    jobs: _containers.RepeatedCompositeFieldContainer[RunningJob]
    held_uatp: int
    unread: _containers.RepeatedCompositeFieldContainer[UnreadReply]
    open_calls: int
    connections: int
    def __init__(self, tiers: _Optional[_Iterable[_Union[_model_pb2.TierStatus, _Mapping]]] = ..., jobs: _Optional[_Iterable[_Union[RunningJob, _Mapping]]] = ..., held_uatp: _Optional[int] = ..., unread: _Optional[_Iterable[_Union[UnreadReply, _Mapping]]] = ..., open_calls: _Optional[int] = ..., connections: _Optional[int] = ...) -> None: ...

class UnreadReply(_message.Message):
    __slots__ = ("call_id", "account", "connection", "method", "job_id", "age_s", "unread_s", "unread_bytes", "ended")
    CALL_ID_FIELD_NUMBER: _ClassVar[int]
    ACCOUNT_FIELD_NUMBER: _ClassVar[int]
    CONNECTION_FIELD_NUMBER: _ClassVar[int]
    METHOD_FIELD_NUMBER: _ClassVar[int]
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    AGE_S_FIELD_NUMBER: _ClassVar[int]
    UNREAD_S_FIELD_NUMBER: _ClassVar[int]
    UNREAD_BYTES_FIELD_NUMBER: _ClassVar[int]
    ENDED_FIELD_NUMBER: _ClassVar[int]
    call_id: str
    account: str
    connection: str
    method: str
    job_id: str
    age_s: float
    unread_s: float
    unread_bytes: int
    ended: bool
    def __init__(self, call_id: _Optional[str] = ..., account: _Optional[str] = ..., connection: _Optional[str] = ..., method: _Optional[str] = ..., job_id: _Optional[str] = ..., age_s: _Optional[float] = ..., unread_s: _Optional[float] = ..., unread_bytes: _Optional[int] = ..., ended: _Optional[bool] = ...) -> None: ...

class RunningJob(_message.Message):
    __slots__ = ("job_id", "account", "tier", "age_s", "prompt_tokens", "output_tokens", "held_uatp", "priority", "tier_name", "mode")
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    ACCOUNT_FIELD_NUMBER: _ClassVar[int]
    TIER_FIELD_NUMBER: _ClassVar[int]
    AGE_S_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    HELD_UATP_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    TIER_NAME_FIELD_NUMBER: _ClassVar[int]
    MODE_FIELD_NUMBER: _ClassVar[int]
    job_id: str
    account: str
    tier: _types_pb2.Tier
    age_s: float
    prompt_tokens: int
    output_tokens: int
    held_uatp: int
    priority: _types_pb2.Priority
    tier_name: str
    mode: _types_pb2.Mode
    def __init__(self, job_id: _Optional[str] = ..., account: _Optional[str] = ..., tier: _Optional[_Union[_types_pb2.Tier, str]] = ..., age_s: _Optional[float] = ..., prompt_tokens: _Optional[int] = ..., output_tokens: _Optional[int] = ..., held_uatp: _Optional[int] = ..., priority: _Optional[_Union[_types_pb2.Priority, str]] = ..., tier_name: _Optional[str] = ..., mode: _Optional[_Union[_types_pb2.Mode, str]] = ...) -> None: ...

class CalibrateRequest(_message.Message):
    __slots__ = ("quick", "adopt")
    QUICK_FIELD_NUMBER: _ClassVar[int]
    ADOPT_FIELD_NUMBER: _ClassVar[int]
    quick: bool
    adopt: bool
    def __init__(self, quick: _Optional[bool] = ..., adopt: _Optional[bool] = ...) -> None: ...

class CalibrateResponse(_message.Message):
    __slots__ = ("progress", "result")
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    RESULT_FIELD_NUMBER: _ClassVar[int]
    progress: CalibrationProgress
    result: CalibrationResult
    def __init__(self, progress: _Optional[_Union[CalibrationProgress, _Mapping]] = ..., result: _Optional[_Union[CalibrationResult, _Mapping]] = ...) -> None: ...

class CalibrationProgress(_message.Message):
    __slots__ = ("phase", "fraction", "point", "elapsed_s", "cost_ratio", "measured")
    PHASE_FIELD_NUMBER: _ClassVar[int]
    FRACTION_FIELD_NUMBER: _ClassVar[int]
    POINT_FIELD_NUMBER: _ClassVar[int]
    ELAPSED_S_FIELD_NUMBER: _ClassVar[int]
    COST_RATIO_FIELD_NUMBER: _ClassVar[int]
    MEASURED_FIELD_NUMBER: _ClassVar[int]
    phase: str
    fraction: float
    point: str
    elapsed_s: float
    cost_ratio: float
    measured: _containers.RepeatedCompositeFieldContainer[MeasuredPoint]
    def __init__(self, phase: _Optional[str] = ..., fraction: _Optional[float] = ..., point: _Optional[str] = ..., elapsed_s: _Optional[float] = ..., cost_ratio: _Optional[float] = ..., measured: _Optional[_Iterable[_Union[MeasuredPoint, _Mapping]]] = ...) -> None: ...

class CalibrationResult(_message.Message):
    __slots__ = ("version", "path", "card", "report", "plot", "cost_ratio", "cost_ratio_spread", "took_s", "adopted", "points")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    PATH_FIELD_NUMBER: _ClassVar[int]
    CARD_FIELD_NUMBER: _ClassVar[int]
    REPORT_FIELD_NUMBER: _ClassVar[int]
    PLOT_FIELD_NUMBER: _ClassVar[int]
    COST_RATIO_FIELD_NUMBER: _ClassVar[int]
    COST_RATIO_SPREAD_FIELD_NUMBER: _ClassVar[int]
    TOOK_S_FIELD_NUMBER: _ClassVar[int]
    ADOPTED_FIELD_NUMBER: _ClassVar[int]
    POINTS_FIELD_NUMBER: _ClassVar[int]
    version: str
    path: str
    card: str
    report: str
    plot: str
    cost_ratio: float
    cost_ratio_spread: float
    took_s: float
    adopted: bool
    points: _containers.RepeatedCompositeFieldContainer[MeasuredPoint]
    def __init__(self, version: _Optional[str] = ..., path: _Optional[str] = ..., card: _Optional[str] = ..., report: _Optional[str] = ..., plot: _Optional[str] = ..., cost_ratio: _Optional[float] = ..., cost_ratio_spread: _Optional[float] = ..., took_s: _Optional[float] = ..., adopted: _Optional[bool] = ..., points: _Optional[_Iterable[_Union[MeasuredPoint, _Mapping]]] = ...) -> None: ...

class MeasuredPoint(_message.Message):
    __slots__ = ("tier", "phase", "batch", "context_tokens", "tokens", "step_s", "spread", "rounds", "co_resident_s", "tier_name")
    TIER_FIELD_NUMBER: _ClassVar[int]
    PHASE_FIELD_NUMBER: _ClassVar[int]
    BATCH_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    STEP_S_FIELD_NUMBER: _ClassVar[int]
    SPREAD_FIELD_NUMBER: _ClassVar[int]
    ROUNDS_FIELD_NUMBER: _ClassVar[int]
    CO_RESIDENT_S_FIELD_NUMBER: _ClassVar[int]
    TIER_NAME_FIELD_NUMBER: _ClassVar[int]
    tier: _types_pb2.Tier
    phase: _types_pb2.Phase
    batch: int
    context_tokens: int
    tokens: int
    step_s: float
    spread: float
    rounds: int
    co_resident_s: float
    tier_name: str
    def __init__(self, tier: _Optional[_Union[_types_pb2.Tier, str]] = ..., phase: _Optional[_Union[_types_pb2.Phase, str]] = ..., batch: _Optional[int] = ..., context_tokens: _Optional[int] = ..., tokens: _Optional[int] = ..., step_s: _Optional[float] = ..., spread: _Optional[float] = ..., rounds: _Optional[int] = ..., co_resident_s: _Optional[float] = ..., tier_name: _Optional[str] = ...) -> None: ...

class AdoptRateCardRequest(_message.Message):
    __slots__ = ("version",)
    VERSION_FIELD_NUMBER: _ClassVar[int]
    version: str
    def __init__(self, version: _Optional[str] = ...) -> None: ...

class AdoptRateCardResponse(_message.Message):
    __slots__ = ("rate_card", "cost_ratio", "fit", "note")
    RATE_CARD_FIELD_NUMBER: _ClassVar[int]
    COST_RATIO_FIELD_NUMBER: _ClassVar[int]
    FIT_FIELD_NUMBER: _ClassVar[int]
    NOTE_FIELD_NUMBER: _ClassVar[int]
    rate_card: str
    cost_ratio: float
    fit: _model_pb2.RateCardFit
    note: str
    def __init__(self, rate_card: _Optional[str] = ..., cost_ratio: _Optional[float] = ..., fit: _Optional[_Union[_model_pb2.RateCardFit, str]] = ..., note: _Optional[str] = ...) -> None: ...

class AdoptQualityCardRequest(_message.Message):
    __slots__ = ("version",)
    VERSION_FIELD_NUMBER: _ClassVar[int]
    version: str
    def __init__(self, version: _Optional[str] = ...) -> None: ...

class AdoptQualityCardResponse(_message.Message):
    __slots__ = ("quality_card", "note")
    QUALITY_CARD_FIELD_NUMBER: _ClassVar[int]
    NOTE_FIELD_NUMBER: _ClassVar[int]
    quality_card: str
    note: str
    def __init__(self, quality_card: _Optional[str] = ..., note: _Optional[str] = ...) -> None: ...
