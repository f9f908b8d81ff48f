from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Tier(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    TIER_UNSPECIFIED: _ClassVar[Tier]
    TIER_TACTICAL: _ClassVar[Tier]
    TIER_STRATEGIC: _ClassVar[Tier]
    TIER_AUTO: _ClassVar[Tier]

class Phase(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    PHASE_UNSPECIFIED: _ClassVar[Phase]
    PHASE_PREFILL: _ClassVar[Phase]
    PHASE_CACHED: _ClassVar[Phase]
    PHASE_DECODE: _ClassVar[Phase]
    PHASE_DRAFT: _ClassVar[Phase]
    PHASE_VERIFY: _ClassVar[Phase]

class Mode(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    MODE_UNSPECIFIED: _ClassVar[Mode]
    MODE_SINGLE: _ClassVar[Mode]
    MODE_SPECULATIVE: _ClassVar[Mode]
    MODE_CASCADE: _ClassVar[Mode]

class CascadeOutcome(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    CASCADE_OUTCOME_UNSPECIFIED: _ClassVar[CascadeOutcome]
    CASCADE_OUTCOME_KEPT: _ClassVar[CascadeOutcome]
    CASCADE_OUTCOME_ESCALATED: _ClassVar[CascadeOutcome]
    CASCADE_OUTCOME_UNAVAILABLE: _ClassVar[CascadeOutcome]

class TokenOrigin(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    TOKEN_ORIGIN_UNSPECIFIED: _ClassVar[TokenOrigin]
    TOKEN_ORIGIN_TACTICAL: _ClassVar[TokenOrigin]
    TOKEN_ORIGIN_ACCEPTED: _ClassVar[TokenOrigin]
    TOKEN_ORIGIN_STRATEGIC: _ClassVar[TokenOrigin]

class DraftOrigin(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    DRAFT_ORIGIN_UNSPECIFIED: _ClassVar[DraftOrigin]
    DRAFT_ORIGIN_DRAFTER: _ClassVar[DraftOrigin]
    DRAFT_ORIGIN_ANSWER: _ClassVar[DraftOrigin]
    DRAFT_ORIGIN_LOOKUP: _ClassVar[DraftOrigin]

class TierState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    TIER_STATE_UNSPECIFIED: _ClassVar[TierState]
    TIER_STATE_LOADING: _ClassVar[TierState]
    TIER_STATE_READY: _ClassVar[TierState]
    TIER_STATE_FAILED: _ClassVar[TierState]
    TIER_STATE_DRAINING: _ClassVar[TierState]

class Priority(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    PRIORITY_UNSPECIFIED: _ClassVar[Priority]
    PRIORITY_LOW: _ClassVar[Priority]
    PRIORITY_NORMAL: _ClassVar[Priority]
    PRIORITY_HIGH: _ClassVar[Priority]

class StopReason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    STOP_REASON_UNSPECIFIED: _ClassVar[StopReason]
    STOP_REASON_END_OF_TEXT: _ClassVar[StopReason]
    STOP_REASON_LENGTH: _ClassVar[StopReason]
    STOP_REASON_STOP_STRING: _ClassVar[StopReason]
    STOP_REASON_DEADLINE: _ClassVar[StopReason]
    STOP_REASON_ABORTED: _ClassVar[StopReason]
    STOP_REASON_CANCELLED: _ClassVar[StopReason]
    STOP_REASON_STOP_TOKEN: _ClassVar[StopReason]
TIER_UNSPECIFIED: Tier
TIER_TACTICAL: Tier
TIER_STRATEGIC: Tier
TIER_AUTO: Tier
PHASE_UNSPECIFIED: Phase
PHASE_PREFILL: Phase
PHASE_CACHED: Phase
PHASE_DECODE: Phase
PHASE_DRAFT: Phase
PHASE_VERIFY: Phase
MODE_UNSPECIFIED: Mode
MODE_SINGLE: Mode
MODE_SPECULATIVE: Mode
MODE_CASCADE: Mode
CASCADE_OUTCOME_UNSPECIFIED: CascadeOutcome
CASCADE_OUTCOME_KEPT: CascadeOutcome
CASCADE_OUTCOME_ESCALATED: CascadeOutcome
CASCADE_OUTCOME_UNAVAILABLE: CascadeOutcome
TOKEN_ORIGIN_UNSPECIFIED: TokenOrigin
TOKEN_ORIGIN_TACTICAL: TokenOrigin
TOKEN_ORIGIN_ACCEPTED: TokenOrigin
TOKEN_ORIGIN_STRATEGIC: TokenOrigin
DRAFT_ORIGIN_UNSPECIFIED: DraftOrigin
DRAFT_ORIGIN_DRAFTER: DraftOrigin
DRAFT_ORIGIN_ANSWER: DraftOrigin
DRAFT_ORIGIN_LOOKUP: DraftOrigin
TIER_STATE_UNSPECIFIED: TierState
TIER_STATE_LOADING: TierState
TIER_STATE_READY: TierState
TIER_STATE_FAILED: TierState
TIER_STATE_DRAINING: TierState
PRIORITY_UNSPECIFIED: Priority
PRIORITY_LOW: Priority
PRIORITY_NORMAL: Priority
PRIORITY_HIGH: Priority
STOP_REASON_UNSPECIFIED: StopReason
STOP_REASON_END_OF_TEXT: StopReason
STOP_REASON_LENGTH: StopReason
STOP_REASON_STOP_STRING: StopReason
STOP_REASON_DEADLINE: StopReason
STOP_REASON_ABORTED: StopReason
STOP_REASON_CANCELLED: StopReason
STOP_REASON_STOP_TOKEN: StopReason

class ChatMessage(_message.Message):
    __slots__ = ("role", "content")
    ROLE_FIELD_NUMBER: _ClassVar[int]
    CONTENT_FIELD_NUMBER: _ClassVar[int]
    role: str
    content: str
    def __init__(self, role: _Optional[str] = ..., content: _Optional[str] = ...) -> None: ...

class ChatMessages(_message.Message):
    __slots__ = ("messages",)
    MESSAGES_FIELD_NUMBER: _ClassVar[int]
    messages: _containers.RepeatedCompositeFieldContainer[ChatMessage]
    def __init__(self, messages: _Optional[_Iterable[_Union[ChatMessage, _Mapping]]] = ...) -> None: ...

class TokenIds(_message.Message):
    __slots__ = ("ids",)
    IDS_FIELD_NUMBER: _ClassVar[int]
    ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, ids: _Optional[_Iterable[int]] = ...) -> None: ...

class JobSpec(_message.Message):
    __slots__ = ("text", "chat", "token_ids", "tier", "allow_downgrade", "max_cost_uatp", "complexity", "priority", "client_request_id", "sampling", "tier_name", "task_class", "mode", "max_error", "accept_revisions")
    TEXT_FIELD_NUMBER: _ClassVar[int]
    CHAT_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    TIER_FIELD_NUMBER: _ClassVar[int]
    ALLOW_DOWNGRADE_FIELD_NUMBER: _ClassVar[int]
    MAX_COST_UATP_FIELD_NUMBER: _ClassVar[int]
    COMPLEXITY_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    CLIENT_REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    TIER_NAME_FIELD_NUMBER: _ClassVar[int]
    TASK_CLASS_FIELD_NUMBER: _ClassVar[int]
    MODE_FIELD_NUMBER: _ClassVar[int]
    MAX_ERROR_FIELD_NUMBER: _ClassVar[int]
    ACCEPT_REVISIONS_FIELD_NUMBER: _ClassVar[int]
    text: str
    chat: ChatMessages
    token_ids: TokenIds
    tier: Tier
    allow_downgrade: bool
    max_cost_uatp: int
    complexity: float
    priority: Priority
    client_request_id: str
    sampling: SamplingParams
    tier_name: str
    task_class: str
    mode: Mode
    max_error: float
    accept_revisions: bool
    def __init__(self, text: _Optional[str] = ..., chat: _Optional[_Union[ChatMessages, _Mapping]] = ..., token_ids: _Optional[_Union[TokenIds, _Mapping]] = ..., tier: _Optional[_Union[Tier, str]] = ..., allow_downgrade: _Optional[bool] = ..., max_cost_uatp: _Optional[int] = ..., complexity: _Optional[float] = ..., priority: _Optional[_Union[Priority, str]] = ..., client_request_id: _Optional[str] = ..., sampling: _Optional[_Union[SamplingParams, _Mapping]] = ..., tier_name: _Optional[str] = ..., task_class: _Optional[str] = ..., mode: _Optional[_Union[Mode, str]] = ..., max_error: _Optional[float] = ..., accept_revisions: _Optional[bool] = ...) -> None: ...

class SamplingParams(_message.Message):
    __slots__ = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed", "max_new_tokens", "stop", "ignore_eos", "top_logprobs", "deadline_s", "stop_token_ids", "presence_penalty", "frequency_penalty")
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    TOP_P_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    MIN_P_FIELD_NUMBER: _ClassVar[int]
    REPETITION_PENALTY_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    MAX_NEW_TOKENS_FIELD_NUMBER: _ClassVar[int]
    STOP_FIELD_NUMBER: _ClassVar[int]
    IGNORE_EOS_FIELD_NUMBER: _ClassVar[int]
    TOP_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_S_FIELD_NUMBER: _ClassVar[int]
    STOP_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    PRESENCE_PENALTY_FIELD_NUMBER: _ClassVar[int]
    FREQUENCY_PENALTY_FIELD_NUMBER: _ClassVar[int]
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    repetition_penalty: float
    seed: int
    max_new_tokens: int
    stop: _containers.RepeatedScalarFieldContainer[str]
    ignore_eos: bool
    top_logprobs: int
    deadline_s: float
    stop_token_ids: _containers.RepeatedScalarFieldContainer[int]
    presence_penalty: float
    frequency_penalty: float
    def __init__(self, temperature: _Optional[float] = ..., top_p: _Optional[float] = ..., top_k: _Optional[int] = ..., min_p: _Optional[float] = ..., repetition_penalty: _Optional[float] = ..., seed: _Optional[int] = ..., max_new_tokens: _Optional[int] = ..., stop: _Optional[_Iterable[str]] = ..., ignore_eos: _Optional[bool] = ..., top_logprobs: _Optional[int] = ..., deadline_s: _Optional[float] = ..., stop_token_ids: _Optional[_Iterable[int]] = ..., presence_penalty: _Optional[float] = ..., frequency_penalty: _Optional[float] = ...) -> None: ...

class TokenLogprob(_message.Message):
    __slots__ = ("token_id", "logprob", "top")
    TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    LOGPROB_FIELD_NUMBER: _ClassVar[int]
    TOP_FIELD_NUMBER: _ClassVar[int]
    token_id: int
    logprob: float
    top: _containers.RepeatedCompositeFieldContainer[TopLogprob]
    def __init__(self, token_id: _Optional[int] = ..., logprob: _Optional[float] = ..., top: _Optional[_Iterable[_Union[TopLogprob, _Mapping]]] = ...) -> None: ...

class TopLogprob(_message.Message):
    __slots__ = ("token_id", "logprob")
    TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    LOGPROB_FIELD_NUMBER: _ClassVar[int]
    token_id: int
    logprob: float
    def __init__(self, token_id: _Optional[int] = ..., logprob: _Optional[float] = ...) -> None: ...

class Route(_message.Message):
    __slots__ = ("tier", "reason", "downgraded", "requested", "tier_name", "requested_name", "mode", "draw_version")
    TIER_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    DOWNGRADED_FIELD_NUMBER: _ClassVar[int]
    REQUESTED_FIELD_NUMBER: _ClassVar[int]
    TIER_NAME_FIELD_NUMBER: _ClassVar[int]
    REQUESTED_NAME_FIELD_NUMBER: _ClassVar[int]
    MODE_FIELD_NUMBER: _ClassVar[int]
    DRAW_VERSION_FIELD_NUMBER: _ClassVar[int]
    tier: Tier
    reason: str
    downgraded: bool
    requested: Tier
    tier_name: str
    requested_name: str
    mode: Mode
    draw_version: int
    def __init__(self, tier: _Optional[_Union[Tier, str]] = ..., reason: _Optional[str] = ..., downgraded: _Optional[bool] = ..., requested: _Optional[_Union[Tier, str]] = ..., tier_name: _Optional[str] = ..., requested_name: _Optional[str] = ..., mode: _Optional[_Union[Mode, str]] = ..., draw_version: _Optional[int] = ...) -> None: ...

class Usage(_message.Message):
    __slots__ = ("prompt_tokens", "cached_tokens", "output_tokens", "by_phase")
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    BY_PHASE_FIELD_NUMBER: _ClassVar[int]
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    by_phase: _containers.RepeatedCompositeFieldContainer[PhaseTokens]
    def __init__(self, prompt_tokens: _Optional[int] = ..., cached_tokens: _Optional[int] = ..., output_tokens: _Optional[int] = ..., by_phase: _Optional[_Iterable[_Union[PhaseTokens, _Mapping]]] = ...) -> None: ...

class PhaseTokens(_message.Message):
    __slots__ = ("tier", "phase", "tokens", "tier_name")
    TIER_FIELD_NUMBER: _ClassVar[int]
    PHASE_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    TIER_NAME_FIELD_NUMBER: _ClassVar[int]
    tier: Tier
    phase: Phase
    tokens: int
    tier_name: str
    def __init__(self, tier: _Optional[_Union[Tier, str]] = ..., phase: _Optional[_Union[Phase, str]] = ..., tokens: _Optional[int] = ..., tier_name: _Optional[str] = ...) -> None: ...

class Timing(_message.Message):
    __slots__ = ("queue_s", "prefill_s", "decode_s", "time_to_first_token_s", "total_s", "device_s", "stages")
    QUEUE_S_FIELD_NUMBER: _ClassVar[int]
    PREFILL_S_FIELD_NUMBER: _ClassVar[int]
    DECODE_S_FIELD_NUMBER: _ClassVar[int]
    TIME_TO_FIRST_TOKEN_S_FIELD_NUMBER: _ClassVar[int]
    TOTAL_S_FIELD_NUMBER: _ClassVar[int]
    DEVICE_S_FIELD_NUMBER: _ClassVar[int]
    STAGES_FIELD_NUMBER: _ClassVar[int]
    queue_s: float
    prefill_s: float
    decode_s: float
    time_to_first_token_s: float
    total_s: float
    device_s: float
    stages: _containers.RepeatedCompositeFieldContainer[StageTiming]
    def __init__(self, queue_s: _Optional[float] = ..., prefill_s: _Optional[float] = ..., decode_s: _Optional[float] = ..., time_to_first_token_s: _Optional[float] = ..., total_s: _Optional[float] = ..., device_s: _Optional[float] = ..., stages: _Optional[_Iterable[_Union[StageTiming, _Mapping]]] = ...) -> None: ...

class StageTiming(_message.Message):
    __slots__ = ("tier", "queue_s", "prefill_s", "decode_s", "device_s", "tier_name", "drafter", "drafter_name", "draft_s", "begin_s", "drafted_tokens", "verified_tokens", "accepted_tokens")
    TIER_FIELD_NUMBER: _ClassVar[int]
    QUEUE_S_FIELD_NUMBER: _ClassVar[int]
    PREFILL_S_FIELD_NUMBER: _ClassVar[int]
    DECODE_S_FIELD_NUMBER: _ClassVar[int]
    DEVICE_S_FIELD_NUMBER: _ClassVar[int]
    TIER_NAME_FIELD_NUMBER: _ClassVar[int]
    DRAFTER_FIELD_NUMBER: _ClassVar[int]
    DRAFTER_NAME_FIELD_NUMBER: _ClassVar[int]
    DRAFT_S_FIELD_NUMBER: _ClassVar[int]
    BEGIN_S_FIELD_NUMBER: _ClassVar[int]
    DRAFTED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    VERIFIED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    ACCEPTED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    tier: Tier
    queue_s: float
    prefill_s: float
    decode_s: float
    device_s: float
    tier_name: str
    drafter: Tier
    drafter_name: str
    draft_s: float
    begin_s: float
    drafted_tokens: int
    verified_tokens: int
    accepted_tokens: int
    def __init__(self, tier: _Optional[_Union[Tier, str]] = ..., queue_s: _Optional[float] = ..., prefill_s: _Optional[float] = ..., decode_s: _Optional[float] = ..., device_s: _Optional[float] = ..., tier_name: _Optional[str] = ..., drafter: _Optional[_Union[Tier, str]] = ..., drafter_name: _Optional[str] = ..., draft_s: _Optional[float] = ..., begin_s: _Optional[float] = ..., drafted_tokens: _Optional[int] = ..., verified_tokens: _Optional[int] = ..., accepted_tokens: _Optional[int] = ...) -> None: ...

class Price(_message.Message):
    __slots__ = ("charged_uatp", "held_uatp", "rate_card", "single_uatp")
    CHARGED_UATP_FIELD_NUMBER: _ClassVar[int]
    HELD_UATP_FIELD_NUMBER: _ClassVar[int]
    RATE_CARD_FIELD_NUMBER: _ClassVar[int]
    SINGLE_UATP_FIELD_NUMBER: _ClassVar[int]
    charged_uatp: int
    held_uatp: int
    rate_card: str
    single_uatp: int
    def __init__(self, charged_uatp: _Optional[int] = ..., held_uatp: _Optional[int] = ..., rate_card: _Optional[str] = ..., single_uatp: _Optional[int] = ...) -> None: ...

class Budget(_message.Message):
    __slots__ = ("account", "balance_uatp", "held_uatp", "discharged_uatp", "capacity_uatp", "refill_uatp_per_s", "strategic_floor_uatp")
    ACCOUNT_FIELD_NUMBER: _ClassVar[int]
    BALANCE_UATP_FIELD_NUMBER: _ClassVar[int]
    HELD_UATP_FIELD_NUMBER: _ClassVar[int]
    DISCHARGED_UATP_FIELD_NUMBER: _ClassVar[int]
    CAPACITY_UATP_FIELD_NUMBER: _ClassVar[int]
    REFILL_UATP_PER_S_FIELD_NUMBER: _ClassVar[int]
    STRATEGIC_FLOOR_UATP_FIELD_NUMBER: _ClassVar[int]
    account: str
    balance_uatp: int
    held_uatp: int
    discharged_uatp: int
    capacity_uatp: int
    refill_uatp_per_s: int
    strategic_floor_uatp: int
    def __init__(self, account: _Optional[str] = ..., balance_uatp: _Optional[int] = ..., held_uatp: _Optional[int] = ..., discharged_uatp: _Optional[int] = ..., capacity_uatp: _Optional[int] = ..., refill_uatp_per_s: _Optional[int] = ..., strategic_floor_uatp: _Optional[int] = ...) -> None: ...
