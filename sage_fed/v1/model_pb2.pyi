from sage_fed.v1 import types_pb2 as _types_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class RateCardFit(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    RATE_CARD_FIT_UNSPECIFIED: _ClassVar[RateCardFit]
    RATE_CARD_FIT_UNKNOWN: _ClassVar[RateCardFit]
    RATE_CARD_FIT_MEASURED: _ClassVar[RateCardFit]
    RATE_CARD_FIT_DECLARED: _ClassVar[RateCardFit]
    RATE_CARD_FIT_STALE: _ClassVar[RateCardFit]
RATE_CARD_FIT_UNSPECIFIED: RateCardFit
RATE_CARD_FIT_UNKNOWN: RateCardFit
RATE_CARD_FIT_MEASURED: RateCardFit
RATE_CARD_FIT_DECLARED: RateCardFit
RATE_CARD_FIT_STALE: RateCardFit

class ListModelsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListModelsResponse(_message.Message):
    __slots__ = ("models",)
    MODELS_FIELD_NUMBER: _ClassVar[int]
    models: _containers.RepeatedCompositeFieldContainer[Model]
    def __init__(self, models: _Optional[_Iterable[_Union[Model, _Mapping]]] = ...) -> None: ...

class GetModelRequest(_message.Message):
    __slots__ = ("tier", "tier_name")
    TIER_FIELD_NUMBER: _ClassVar[int]
    TIER_NAME_FIELD_NUMBER: _ClassVar[int]
    tier: _types_pb2.Tier
    tier_name: str
    def __init__(self, tier: _Optional[_Union[_types_pb2.Tier, str]] = ..., tier_name: _Optional[str] = ...) -> None: ...

class GetModelResponse(_message.Message):
    __slots__ = ("model",)
    MODEL_FIELD_NUMBER: _ClassVar[int]
    model: Model
    def __init__(self, model: _Optional[_Union[Model, _Mapping]] = ...) -> None: ...

class Model(_message.Message):
    __slots__ = ("tier", "state", "name", "revision", "architecture", "parameters", "precision", "device", "weight_bytes", "kv_cache_bytes", "kv_cache_tokens", "max_context_tokens", "load_s", "load_progress", "decode_uatp", "message", "kernels", "prefill_uatp", "cached_uatp", "end_tokens", "tier_name")
    TIER_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    ARCHITECTURE_FIELD_NUMBER: _ClassVar[int]
    PARAMETERS_FIELD_NUMBER: _ClassVar[int]
    PRECISION_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_BYTES_FIELD_NUMBER: _ClassVar[int]
    KV_CACHE_BYTES_FIELD_NUMBER: _ClassVar[int]
    KV_CACHE_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MAX_CONTEXT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    LOAD_S_FIELD_NUMBER: _ClassVar[int]
    LOAD_PROGRESS_FIELD_NUMBER: _ClassVar[int]
    DECODE_UATP_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    KERNELS_FIELD_NUMBER: _ClassVar[int]
    PREFILL_UATP_FIELD_NUMBER: _ClassVar[int]
    CACHED_UATP_FIELD_NUMBER: _ClassVar[int]
    END_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TIER_NAME_FIELD_NUMBER: _ClassVar[int]
    tier: _types_pb2.Tier
    state: _types_pb2.TierState
    name: str
    revision: str
    architecture: str
    parameters: int
    precision: str
    device: str
    weight_bytes: int
    kv_cache_bytes: int
    kv_cache_tokens: int
    max_context_tokens: int
    load_s: float
    load_progress: float
    decode_uatp: int
    message: str
    kernels: str
    prefill_uatp: int
    cached_uatp: int
    end_tokens: _containers.RepeatedCompositeFieldContainer[EndToken]
    tier_name: str
    def __init__(self, tier: _Optional[_Union[_types_pb2.Tier, str]] = ..., state: _Optional[_Union[_types_pb2.TierState, str]] = ..., name: _Optional[str] = ..., revision: _Optional[str] = ..., architecture: _Optional[str] = ..., parameters: _Optional[int] = ..., precision: _Optional[str] = ..., device: _Optional[str] = ..., weight_bytes: _Optional[int] = ..., kv_cache_bytes: _Optional[int] = ..., kv_cache_tokens: _Optional[int] = ..., max_context_tokens: _Optional[int] = ..., load_s: _Optional[float] = ..., load_progress: _Optional[float] = ..., decode_uatp: _Optional[int] = ..., message: _Optional[str] = ..., kernels: _Optional[str] = ..., prefill_uatp: _Optional[int] = ..., cached_uatp: _Optional[int] = ..., end_tokens: _Optional[_Iterable[_Union[EndToken, _Mapping]]] = ..., tier_name: _Optional[str] = ...) -> None: ...

class EndToken(_message.Message):
    __slots__ = ("id", "text")
    ID_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    id: int
    text: str
    def __init__(self, id: _Optional[int] = ..., text: _Optional[str] = ...) -> None: ...

class GetStatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetStatusResponse(_message.Message):
    __slots__ = ("version", "uptime_s", "draining", "device", "rate_card", "cost_ratio", "tiers", "rate_card_fit", "rate_card_note", "device_fallback", "ledger_trouble", "recovered_jobs", "recovered_uatp", "quality_card", "quality_card_note")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    UPTIME_S_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    RATE_CARD_FIELD_NUMBER: _ClassVar[int]
    COST_RATIO_FIELD_NUMBER: _ClassVar[int]
    TIERS_FIELD_NUMBER: _ClassVar[int]
    RATE_CARD_FIT_FIELD_NUMBER: _ClassVar[int]
    RATE_CARD_NOTE_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FALLBACK_FIELD_NUMBER: _ClassVar[int]
    LEDGER_TROUBLE_FIELD_NUMBER: _ClassVar[int]
    RECOVERED_JOBS_FIELD_NUMBER: _ClassVar[int]
    RECOVERED_UATP_FIELD_NUMBER: _ClassVar[int]
    QUALITY_CARD_FIELD_NUMBER: _ClassVar[int]
    QUALITY_CARD_NOTE_FIELD_NUMBER: _ClassVar[int]
    version: str
    uptime_s: float
    draining: bool
    device: str
    rate_card: str
    cost_ratio: float
    tiers: _containers.RepeatedCompositeFieldContainer[TierStatus]
    rate_card_fit: RateCardFit
    rate_card_note: str
    device_fallback: str
    ledger_trouble: str
    recovered_jobs: int
    recovered_uatp: int
    quality_card: str
    quality_card_note: str
    def __init__(self, version: _Optional[str] = ..., uptime_s: _Optional[float] = ..., draining: _Optional[bool] = ..., device: _Optional[str] = ..., rate_card: _Optional[str] = ..., cost_ratio: _Optional[float] = ..., tiers: _Optional[_Iterable[_Union[TierStatus, _Mapping]]] = ..., rate_card_fit: _Optional[_Union[RateCardFit, str]] = ..., rate_card_note: _Optional[str] = ..., device_fallback: _Optional[str] = ..., ledger_trouble: _Optional[str] = ..., recovered_jobs: _Optional[int] = ..., recovered_uatp: _Optional[int] = ..., quality_card: _Optional[str] = ..., quality_card_note: _Optional[str] = ...) -> None: ...

class TierStatus(_message.Message):
    __slots__ = ("tier", "state", "requests_running", "requests_waiting", "kv_tokens_used", "kv_tokens_total", "decode_step_s", "prefill_tokens_per_s", "requests_waiting_limit", "queued_prompt_tokens", "max_context_tokens", "kv_tokens_cached", "requests_running_limit", "retry_after_s", "tier_name", "speculating", "acceptance")
    TIER_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_RUNNING_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_WAITING_FIELD_NUMBER: _ClassVar[int]
    KV_TOKENS_USED_FIELD_NUMBER: _ClassVar[int]
    KV_TOKENS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    DECODE_STEP_S_FIELD_NUMBER: _ClassVar[int]
    PREFILL_TOKENS_PER_S_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_WAITING_LIMIT_FIELD_NUMBER: _ClassVar[int]
    QUEUED_PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MAX_CONTEXT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    KV_TOKENS_CACHED_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_RUNNING_LIMIT_FIELD_NUMBER: _ClassVar[int]
    RETRY_AFTER_S_FIELD_NUMBER: _ClassVar[int]
    TIER_NAME_FIELD_NUMBER: _ClassVar[int]
    SPECULATING_FIELD_NUMBER: _ClassVar[int]
    ACCEPTANCE_FIELD_NUMBER: _ClassVar[int]
    tier: _types_pb2.Tier
    state: _types_pb2.TierState
    requests_running: int
    requests_waiting: int
    kv_tokens_used: int
    kv_tokens_total: int
    decode_step_s: float
    prefill_tokens_per_s: float
    requests_waiting_limit: int
    queued_prompt_tokens: int
    max_context_tokens: int
    kv_tokens_cached: int
    requests_running_limit: int
    retry_after_s: float
    tier_name: str
    speculating: int
    acceptance: _containers.RepeatedCompositeFieldContainer[DraftAcceptance]
    def __init__(self, tier: _Optional[_Union[_types_pb2.Tier, str]] = ..., state: _Optional[_Union[_types_pb2.TierState, str]] = ..., requests_running: _Optional[int] = ..., requests_waiting: _Optional[int] = ..., kv_tokens_used: _Optional[int] = ..., kv_tokens_total: _Optional[int] = ..., decode_step_s: _Optional[float] = ..., prefill_tokens_per_s: _Optional[float] = ..., requests_waiting_limit: _Optional[int] = ..., queued_prompt_tokens: _Optional[int] = ..., max_context_tokens: _Optional[int] = ..., kv_tokens_cached: _Optional[int] = ..., requests_running_limit: _Optional[int] = ..., retry_after_s: _Optional[float] = ..., tier_name: _Optional[str] = ..., speculating: _Optional[int] = ..., acceptance: _Optional[_Iterable[_Union[DraftAcceptance, _Mapping]]] = ...) -> None: ...

class DraftAcceptance(_message.Message):
    __slots__ = ("origin", "share")
    ORIGIN_FIELD_NUMBER: _ClassVar[int]
    SHARE_FIELD_NUMBER: _ClassVar[int]
    origin: _types_pb2.DraftOrigin
    share: float
    def __init__(self, origin: _Optional[_Union[_types_pb2.DraftOrigin, str]] = ..., share: _Optional[float] = ...) -> None: ...

class CompareModesRequest(_message.Message):
    __slots__ = ("task_class", "max_error")
    TASK_CLASS_FIELD_NUMBER: _ClassVar[int]
    MAX_ERROR_FIELD_NUMBER: _ClassVar[int]
    task_class: str
    max_error: float
    def __init__(self, task_class: _Optional[str] = ..., max_error: _Optional[float] = ...) -> None: ...

class CompareModesResponse(_message.Message):
    __slots__ = ("quality_card", "rate_card", "task_class", "num_tasks", "max_error", "escalated", "watts", "power_note", "modes")
    QUALITY_CARD_FIELD_NUMBER: _ClassVar[int]
    RATE_CARD_FIELD_NUMBER: _ClassVar[int]
    TASK_CLASS_FIELD_NUMBER: _ClassVar[int]
    NUM_TASKS_FIELD_NUMBER: _ClassVar[int]
    MAX_ERROR_FIELD_NUMBER: _ClassVar[int]
    ESCALATED_FIELD_NUMBER: _ClassVar[int]
    WATTS_FIELD_NUMBER: _ClassVar[int]
    POWER_NOTE_FIELD_NUMBER: _ClassVar[int]
    MODES_FIELD_NUMBER: _ClassVar[int]
    quality_card: str
    rate_card: str
    task_class: str
    num_tasks: int
    max_error: float
    escalated: float
    watts: float
    power_note: str
    modes: _containers.RepeatedCompositeFieldContainer[ModeReturn]
    def __init__(self, quality_card: _Optional[str] = ..., rate_card: _Optional[str] = ..., task_class: _Optional[str] = ..., num_tasks: _Optional[int] = ..., max_error: _Optional[float] = ..., escalated: _Optional[float] = ..., watts: _Optional[float] = ..., power_note: _Optional[str] = ..., modes: _Optional[_Iterable[_Union[ModeReturn, _Mapping]]] = ...) -> None: ...

class ModeReturn(_message.Message):
    __slots__ = ("tier", "tier_name", "mode", "expected_uatp", "accuracy", "accuracy_low", "accuracy_high", "output_tokens", "right_per_atp", "num_jobs", "device_s", "joules", "right_per_joule")
    TIER_FIELD_NUMBER: _ClassVar[int]
    TIER_NAME_FIELD_NUMBER: _ClassVar[int]
    MODE_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_UATP_FIELD_NUMBER: _ClassVar[int]
    ACCURACY_FIELD_NUMBER: _ClassVar[int]
    ACCURACY_LOW_FIELD_NUMBER: _ClassVar[int]
    ACCURACY_HIGH_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    RIGHT_PER_ATP_FIELD_NUMBER: _ClassVar[int]
    NUM_JOBS_FIELD_NUMBER: _ClassVar[int]
    DEVICE_S_FIELD_NUMBER: _ClassVar[int]
    JOULES_FIELD_NUMBER: _ClassVar[int]
    RIGHT_PER_JOULE_FIELD_NUMBER: _ClassVar[int]
    tier: _types_pb2.Tier
    tier_name: str
    mode: _types_pb2.Mode
    expected_uatp: int
    accuracy: float
    accuracy_low: float
    accuracy_high: float
    output_tokens: float
    right_per_atp: float
    num_jobs: int
    device_s: float
    joules: float
    right_per_joule: float
    def __init__(self, tier: _Optional[_Union[_types_pb2.Tier, str]] = ..., tier_name: _Optional[str] = ..., mode: _Optional[_Union[_types_pb2.Mode, str]] = ..., expected_uatp: _Optional[int] = ..., accuracy: _Optional[float] = ..., accuracy_low: _Optional[float] = ..., accuracy_high: _Optional[float] = ..., output_tokens: _Optional[float] = ..., right_per_atp: _Optional[float] = ..., num_jobs: _Optional[int] = ..., device_s: _Optional[float] = ..., joules: _Optional[float] = ..., right_per_joule: _Optional[float] = ...) -> None: ...
