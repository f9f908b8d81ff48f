from sage_fed.v1 import types_pb2 as _types_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class GenerateRequest(_message.Message):
    __slots__ = ("job",)
    JOB_FIELD_NUMBER: _ClassVar[int]
    job: _types_pb2.JobSpec
    def __init__(self, job: _Optional[_Union[_types_pb2.JobSpec, _Mapping]] = ...) -> None: ...

class GenerateResponse(_message.Message):
    __slots__ = ("started", "text", "token_ids", "logprobs", "finished")
    STARTED_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    FINISHED_FIELD_NUMBER: _ClassVar[int]
    started: Started
    text: str
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    logprobs: _containers.RepeatedCompositeFieldContainer[_types_pb2.TokenLogprob]
    finished: Finished
    def __init__(self, started: _Optional[_Union[Started, _Mapping]] = ..., text: _Optional[str] = ..., token_ids: _Optional[_Iterable[int]] = ..., logprobs: _Optional[_Iterable[_Union[_types_pb2.TokenLogprob, _Mapping]]] = ..., finished: _Optional[_Union[Finished, _Mapping]] = ...) -> None: ...

class GenerateStreamRequest(_message.Message):
    __slots__ = ("job",)
    JOB_FIELD_NUMBER: _ClassVar[int]
    job: _types_pb2.JobSpec
    def __init__(self, job: _Optional[_Union[_types_pb2.JobSpec, _Mapping]] = ...) -> None: ...

class GenerateStreamResponse(_message.Message):
    __slots__ = ("started", "delta", "finished", "revised")
    STARTED_FIELD_NUMBER: _ClassVar[int]
    DELTA_FIELD_NUMBER: _ClassVar[int]
    FINISHED_FIELD_NUMBER: _ClassVar[int]
    REVISED_FIELD_NUMBER: _ClassVar[int]
    started: Started
    delta: Delta
    finished: Finished
    revised: Revised
    def __init__(self, started: _Optional[_Union[Started, _Mapping]] = ..., delta: _Optional[_Union[Delta, _Mapping]] = ..., finished: _Optional[_Union[Finished, _Mapping]] = ..., revised: _Optional[_Union[Revised, _Mapping]] = ...) -> None: ...

class Started(_message.Message):
    __slots__ = ("job_id", "route", "held_uatp", "prompt_tokens", "seed", "max_new_tokens", "replayed")
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    ROUTE_FIELD_NUMBER: _ClassVar[int]
    HELD_UATP_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    MAX_NEW_TOKENS_FIELD_NUMBER: _ClassVar[int]
    REPLAYED_FIELD_NUMBER: _ClassVar[int]
    job_id: str
    route: _types_pb2.Route
    held_uatp: int
    prompt_tokens: int
    seed: int
    max_new_tokens: int
    replayed: bool
    def __init__(self, job_id: _Optional[str] = ..., route: _Optional[_Union[_types_pb2.Route, _Mapping]] = ..., held_uatp: _Optional[int] = ..., prompt_tokens: _Optional[int] = ..., seed: _Optional[int] = ..., max_new_tokens: _Optional[int] = ..., replayed: _Optional[bool] = ...) -> None: ...

class Delta(_message.Message):
    __slots__ = ("text", "token_ids", "logprobs", "output_tokens", "origins")
    TEXT_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    ORIGINS_FIELD_NUMBER: _ClassVar[int]
    text: str
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    logprobs: _containers.RepeatedCompositeFieldContainer[_types_pb2.TokenLogprob]
    output_tokens: int
    origins: _containers.RepeatedScalarFieldContainer[_types_pb2.TokenOrigin]
    def __init__(self, text: _Optional[str] = ..., token_ids: _Optional[_Iterable[int]] = ..., logprobs: _Optional[_Iterable[_Union[_types_pb2.TokenLogprob, _Mapping]]] = ..., output_tokens: _Optional[int] = ..., origins: _Optional[_Iterable[_Union[_types_pb2.TokenOrigin, str]]] = ...) -> None: ...

class Revised(_message.Message):
    __slots__ = ("from_token",)
    FROM_TOKEN_FIELD_NUMBER: _ClassVar[int]
    from_token: int
    def __init__(self, from_token: _Optional[int] = ...) -> None: ...

class Finished(_message.Message):
    __slots__ = ("stop_reason", "usage", "timing", "price", "balance_uatp", "cascade", "error_probability")
    STOP_REASON_FIELD_NUMBER: _ClassVar[int]
    USAGE_FIELD_NUMBER: _ClassVar[int]
    TIMING_FIELD_NUMBER: _ClassVar[int]
    PRICE_FIELD_NUMBER: _ClassVar[int]
    BALANCE_UATP_FIELD_NUMBER: _ClassVar[int]
    CASCADE_FIELD_NUMBER: _ClassVar[int]
    ERROR_PROBABILITY_FIELD_NUMBER: _ClassVar[int]
    stop_reason: _types_pb2.StopReason
    usage: _types_pb2.Usage
    timing: _types_pb2.Timing
    price: _types_pb2.Price
    balance_uatp: int
    cascade: _types_pb2.CascadeOutcome
    error_probability: float
    def __init__(self, stop_reason: _Optional[_Union[_types_pb2.StopReason, str]] = ..., usage: _Optional[_Union[_types_pb2.Usage, _Mapping]] = ..., timing: _Optional[_Union[_types_pb2.Timing, _Mapping]] = ..., price: _Optional[_Union[_types_pb2.Price, _Mapping]] = ..., balance_uatp: _Optional[int] = ..., cascade: _Optional[_Union[_types_pb2.CascadeOutcome, str]] = ..., error_probability: _Optional[float] = ...) -> None: ...

class QuoteRequest(_message.Message):
    __slots__ = ("job",)
    JOB_FIELD_NUMBER: _ClassVar[int]
    job: _types_pb2.JobSpec
    def __init__(self, job: _Optional[_Union[_types_pb2.JobSpec, _Mapping]] = ...) -> None: ...

class QuoteResponse(_message.Message):
    __slots__ = ("route", "refusal", "quotes", "rate_card", "prompt_tokens", "max_new_tokens", "balance_uatp")
    ROUTE_FIELD_NUMBER: _ClassVar[int]
    REFUSAL_FIELD_NUMBER: _ClassVar[int]
    QUOTES_FIELD_NUMBER: _ClassVar[int]
    RATE_CARD_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MAX_NEW_TOKENS_FIELD_NUMBER: _ClassVar[int]
    BALANCE_UATP_FIELD_NUMBER: _ClassVar[int]
    route: _types_pb2.Route
    refusal: Refusal
    quotes: _containers.RepeatedCompositeFieldContainer[RouteQuote]
    rate_card: str
    prompt_tokens: int
    max_new_tokens: int
    balance_uatp: int
    def __init__(self, route: _Optional[_Union[_types_pb2.Route, _Mapping]] = ..., refusal: _Optional[_Union[Refusal, _Mapping]] = ..., quotes: _Optional[_Iterable[_Union[RouteQuote, _Mapping]]] = ..., rate_card: _Optional[str] = ..., prompt_tokens: _Optional[int] = ..., max_new_tokens: _Optional[int] = ..., balance_uatp: _Optional[int] = ...) -> None: ...

class RouteQuote(_message.Message):
    __slots__ = ("tier", "worst_case_uatp", "affordable", "estimated_s", "tier_name", "mode", "expected_uatp", "expected_error")
    TIER_FIELD_NUMBER: _ClassVar[int]
    WORST_CASE_UATP_FIELD_NUMBER: _ClassVar[int]
    AFFORDABLE_FIELD_NUMBER: _ClassVar[int]
    ESTIMATED_S_FIELD_NUMBER: _ClassVar[int]
    TIER_NAME_FIELD_NUMBER: _ClassVar[int]
    MODE_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_UATP_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_ERROR_FIELD_NUMBER: _ClassVar[int]
    tier: _types_pb2.Tier
    worst_case_uatp: int
    affordable: bool
    estimated_s: float
    tier_name: str
    mode: _types_pb2.Mode
    expected_uatp: int
    expected_error: float
    def __init__(self, tier: _Optional[_Union[_types_pb2.Tier, str]] = ..., worst_case_uatp: _Optional[int] = ..., affordable: _Optional[bool] = ..., estimated_s: _Optional[float] = ..., tier_name: _Optional[str] = ..., mode: _Optional[_Union[_types_pb2.Mode, str]] = ..., expected_uatp: _Optional[int] = ..., expected_error: _Optional[float] = ...) -> None: ...

class Refusal(_message.Message):
    __slots__ = ("reason", "message", "retry_after_s", "estimate_s")
    REASON_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    RETRY_AFTER_S_FIELD_NUMBER: _ClassVar[int]
    ESTIMATE_S_FIELD_NUMBER: _ClassVar[int]
    reason: str
    message: str
    retry_after_s: float
    estimate_s: float
    def __init__(self, reason: _Optional[str] = ..., message: _Optional[str] = ..., retry_after_s: _Optional[float] = ..., estimate_s: _Optional[float] = ...) -> None: ...

class CountTokensRequest(_message.Message):
    __slots__ = ("text", "chat", "tier", "tier_name")
    TEXT_FIELD_NUMBER: _ClassVar[int]
    CHAT_FIELD_NUMBER: _ClassVar[int]
    TIER_FIELD_NUMBER: _ClassVar[int]
    TIER_NAME_FIELD_NUMBER: _ClassVar[int]
    text: str
    chat: _types_pb2.ChatMessages
    tier: _types_pb2.Tier
    tier_name: str
    def __init__(self, text: _Optional[str] = ..., chat: _Optional[_Union[_types_pb2.ChatMessages, _Mapping]] = ..., tier: _Optional[_Union[_types_pb2.Tier, str]] = ..., tier_name: _Optional[str] = ...) -> None: ...

class CountTokensResponse(_message.Message):
    __slots__ = ("prompt_tokens", "max_context_tokens")
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MAX_CONTEXT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    prompt_tokens: int
    max_context_tokens: int
    def __init__(self, prompt_tokens: _Optional[int] = ..., max_context_tokens: _Optional[int] = ...) -> None: ...
