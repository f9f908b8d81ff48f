"""Requests: protobuf -> core, every field checked.

Owns the limits of single fields; each check comes before the work it bounds (lengths before
copies, counts before loops). Does not know the model: whether token ids exist and the prompt
fits the context is the broker's to say.
Fails with `InvalidField`, named as a path in the proto, and with nothing else, whatever the
message holds.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

from google.protobuf.message import Message as ProtoMessage

from sage_fed.core import (
    JobSpec,
    Message,
    Priority,
    Prompt,
    SamplingRequest,
    Tier,
    TraceContext,
)
from sage_fed.errors import InvalidField
from sage_fed.settings import LimitSettings
from sage_fed.v1 import inference_pb2, types_pb2

ROLES = ("system", "user", "assistant")
"""Who may speak in a conversation."""

_PART_IDS = 4096
"""Token ids that are made without a break: some 50 microseconds."""

_TIERS: dict[int, Tier | None] = {
    types_pb2.TIER_UNSPECIFIED: None,
    types_pb2.TIER_AUTO: None,
    types_pb2.TIER_TACTICAL: Tier.TACTICAL,
    types_pb2.TIER_STRATEGIC: Tier.STRATEGIC,
}

_PRIORITIES: dict[int, Priority] = {
    types_pb2.PRIORITY_UNSPECIFIED: Priority.NORMAL,
    types_pb2.PRIORITY_LOW: Priority.LOW,
    types_pb2.PRIORITY_NORMAL: Priority.NORMAL,
    types_pb2.PRIORITY_HIGH: Priority.HIGH,
}


def parse_job(
    job: types_pb2.JobSpec,
    limits: LimitSettings,
    *,
    account: str,
    call_remaining_s: float | None = None,
    trace: TraceContext | None = None,
    one_reply: bool = False,
) -> JobSpec:
    """Return the job that the message describes, paid for by `account`.

    `call_remaining_s` is what is left of the gRPC call's own deadline; None is "no deadline".
    `trace` is the caller's, if it has one; `one_reply` says that the answer is one message.
    """
    if job.HasField("max_cost_uatp") and job.max_cost_uatp < 0:
        raise InvalidField("job.max_cost_uatp", "must not be negative")
    if job.HasField("complexity"):
        require_between("job.complexity", job.complexity, 0.0, 1.0)
    if job.priority not in _PRIORITIES:
        raise InvalidField("job.priority", f"unknown value {job.priority}")
    return JobSpec(
        account=account,
        prompt=_parse_prompt(job, limits),
        requested=parse_tier("job.tier", job.tier),
        allow_downgrade=job.allow_downgrade,
        max_cost_uatp=job.max_cost_uatp if job.HasField("max_cost_uatp") else None,
        complexity=job.complexity if job.HasField("complexity") else None,
        priority=_PRIORITIES[job.priority],
        client_request_id=_parse_request_id(job.client_request_id, limits),
        sampling=_parse_sampling(job.sampling, limits),
        call_deadline_s=_call_deadline_s(call_remaining_s, limits),
        trace=trace,
        one_reply=one_reply,
    )


def parse_count(
    request: inference_pb2.CountTokensRequest, limits: LimitSettings
) -> tuple[Prompt, Tier]:
    """Return the prompt to count and the tier whose tokenizer counts it."""
    tier = parse_tier("tier", request.tier) or Tier.TACTICAL
    match request.WhichOneof("prompt"):
        case "text":
            return _parse_text("text", request.text, limits), tier
        case "chat":
            return _parse_chat("chat", request.chat, limits), tier
        case _:
            raise InvalidField("prompt", "one of text and chat must be set")


def prompt_error(error: InvalidField, job: types_pb2.JobSpec) -> InvalidField:
    """Return a conversation's error as this job names its prompt; any other as it is."""
    if job.WhichOneof("prompt") != "text" or not error.field.startswith("job.chat"):
        return error
    return InvalidField("job.text", error.description)


def count_error(error: InvalidField, request: inference_pb2.CountTokensRequest) -> InvalidField:
    """Return a prompt's error, which is named for a job, as this request names its prompt."""
    text = request.WhichOneof("prompt") == "text"
    return InvalidField("text" if text else error.field.removeprefix("job."), error.description)


def parse_tier(field: str, value: int) -> Tier | None:
    """Return the tier; None for AUTO and for the unspecified, which is the same."""
    if value not in _TIERS:
        raise InvalidField(field, f"unknown value {value}")
    return _TIERS[value]


def require_between(field: str, value: float, low: float, high: float) -> None:
    """Raise `InvalidField` for a number beyond its bounds, which are included."""
    # Written so that NaN, which is neither below nor above anything, is refused.
    if not low <= value <= high:
        raise InvalidField(
            field, f"must be from {_exact(low)} to {_exact(high)}, not {_exact(value)}"
        )


def _call_deadline_s(remaining_s: float | None, limits: LimitSettings) -> float | None:
    """Return the call's deadline, unless it is so far away that it says nothing of the job."""
    if remaining_s is None or not remaining_s < limits.max_deadline_s:
        return None
    return max(remaining_s, 0.0)


def _parse_prompt(job: types_pb2.JobSpec, limits: LimitSettings) -> Prompt:
    match job.WhichOneof("prompt"):
        case "text":
            return _parse_text("job.text", job.text, limits)
        case "chat":
            return _parse_chat("job.chat", job.chat, limits)
        case "token_ids":
            ids = job.token_ids.ids
            # A token stands for one character or more, so the bound on characters bounds tokens.
            _require_count("job.token_ids.ids", len(ids), 1, limits.max_prompt_chars, "token ids")
            return Prompt(token_ids=tuple(_in_parts(ids)))
        case _:
            raise InvalidField("job.prompt", "one of text, chat and token_ids must be set")


def _in_parts(ids: Sequence[int]) -> Iterator[int]:
    """Return the ids; other threads get a turn between parts, and not only when all are made."""
    parts = (ids[at : at + _PART_IDS] for at in range(0, len(ids), _PART_IDS))
    return itertools.chain.from_iterable(parts)


def _parse_text(field: str, text: str, limits: LimitSettings) -> Prompt:
    _require_count(field, len(text), 1, limits.max_prompt_chars, "characters")
    return Prompt(messages=(Message("user", text),))


def _parse_chat(field: str, chat: types_pb2.ChatMessages, limits: LimitSettings) -> Prompt:
    _require_count(f"{field}.messages", len(chat.messages), 1, limits.max_messages, "messages")
    num_chars = 0
    for index, message in enumerate(chat.messages):
        if message.role not in ROLES:
            raise InvalidField(
                f"{field}.messages[{index}].role", f"must be one of {', '.join(ROLES)}"
            )
        num_chars += len(message.content)
        if num_chars > limits.max_prompt_chars:
            raise InvalidField(
                f"{field}.messages[{index}].content",
                f"all messages together may have at most {limits.max_prompt_chars} characters",
            )
    return Prompt(messages=tuple(Message(turn.role, turn.content) for turn in chat.messages))


def _parse_request_id(request_id: str, limits: LimitSettings) -> str:
    field = "job.client_request_id"
    _require_count(field, len(request_id), 0, limits.max_request_id_chars, "characters")
    if not request_id.isprintable():
        raise InvalidField(field, "must consist of printable characters")
    return request_id


def _parse_sampling(sampling: types_pb2.SamplingParams, limits: LimitSettings) -> SamplingRequest:
    temperature = _optional_float(sampling, "temperature")
    top_p = _optional_float(sampling, "top_p")
    min_p = _optional_float(sampling, "min_p")
    repetition_penalty = _optional_float(sampling, "repetition_penalty")
    deadline_s = _optional_float(sampling, "deadline_s")
    if temperature is not None:
        require_between(_path("temperature"), temperature, 0.0, 2.0)
    if top_p is not None:
        _require_above_zero(_path("top_p"), top_p, 1.0)
    if min_p is not None:
        require_between(_path("min_p"), min_p, 0.0, 1.0)
    if repetition_penalty is not None:
        _require_above_zero(_path("repetition_penalty"), repetition_penalty, 2.0)
    if deadline_s is not None:
        _require_above_zero(_path("deadline_s"), deadline_s, limits.max_deadline_s)
    max_new_tokens = _optional_int(sampling, "max_new_tokens")
    if max_new_tokens is not None:
        require_between(_path("max_new_tokens"), max_new_tokens, 1, limits.max_new_tokens)
    top_logprobs = _optional_int(sampling, "top_logprobs")
    if top_logprobs is not None:
        require_between(_path("top_logprobs"), top_logprobs, 0, limits.max_top_logprobs)
    return SamplingRequest(
        temperature=temperature,
        top_p=top_p,
        top_k=_optional_int(sampling, "top_k"),
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=_optional_int(sampling, "seed"),
        max_new_tokens=max_new_tokens,
        stop=_parse_stop(sampling, limits),
        ignore_eos=sampling.ignore_eos,
        top_logprobs=top_logprobs,
        deadline_s=deadline_s,
        stop_token_ids=_parse_stop_token_ids(sampling, limits),
    )


def _parse_stop(sampling: types_pb2.SamplingParams, limits: LimitSettings) -> tuple[str, ...]:
    _require_count(_path("stop"), len(sampling.stop), 0, limits.max_stop_strings, "strings")
    for index, text in enumerate(sampling.stop):
        _require_count(_path(f"stop[{index}]"), len(text), 1, limits.max_stop_chars, "characters")
    return tuple(sampling.stop)


def _parse_stop_token_ids(
    sampling: types_pb2.SamplingParams, limits: LimitSettings
) -> tuple[int, ...]:
    ids = sampling.stop_token_ids
    _require_count(_path("stop_token_ids"), len(ids), 0, limits.max_stop_token_ids, "token ids")
    return tuple(ids)


def _path(name: str) -> str:
    return f"job.sampling.{name}"


def _optional_float(message: ProtoMessage, name: str) -> float | None:
    return float(getattr(message, name)) if message.HasField(name) else None


def _optional_int(message: ProtoMessage, name: str) -> int | None:
    return int(getattr(message, name)) if message.HasField(name) else None


def _require_above_zero(field: str, value: float, high: float) -> None:
    if not (0.0 < value <= high and math.isfinite(value)):
        raise InvalidField(
            field, f"must be above 0 and at most {_exact(high)}, not {_exact(value)}"
        )


def _exact(value: float) -> str:
    """Return the number in full: rounded, one just beyond a bound would read as the bound."""
    return repr(value).removesuffix(".0")


def _require_count(field: str, count: int, low: int, high: int, noun: str) -> None:
    if not low <= count <= high:
        raise InvalidField(field, f"must have {low} to {high} {noun}, not {count}")
