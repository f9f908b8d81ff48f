"""Requests as a client makes them: core -> protobuf.

Owns the shorthand (`generate("...", tier=..., max_new_tokens=...)`) for a JobSpec.
Checks nothing that travels: the daemon is the judge. What protobuf cannot carry is refused here,
as `InvalidField` with the daemon's name of the field; a keyword that does not exist is a
`TypeError`, before anything is sent.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from typing import Literal, TypedDict, TypeVar, Unpack

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message as ProtoMessage

from sage_fed.core import TIER_ROLES, JobSpec, Message, Priority, Prompt, SamplingRequest, Tier
from sage_fed.errors import InvalidField
from sage_fed.v1 import types_pb2

M = TypeVar("M", bound=ProtoMessage)
T = TypeVar("T")

TierName = Literal["auto", "tactical", "strategic"]
PriorityName = Literal["low", "normal", "high"]

_TIERS = {"auto": None} | {tier.name: tier for tier in TIER_ROLES}
_PRIORITIES = {priority.name.lower(): priority for priority in Priority}
_BOUNDS = {
    FieldDescriptor.CPPTYPE_INT32: (-(2**31), 2**31 - 1),
    FieldDescriptor.CPPTYPE_INT64: (-(2**63), 2**63 - 1),
    FieldDescriptor.CPPTYPE_UINT32: (0, 2**32 - 1),
    FieldDescriptor.CPPTYPE_UINT64: (0, 2**64 - 1),
}

PromptLike = JobSpec | Prompt | Sequence[Message] | str
"""A whole job, a prompt, a conversation, or one user turn."""


class JobFields(TypedDict, total=False):
    """Fields of a job beside its prompt, as keyword arguments; see `core.JobSpec`."""

    tier: Tier | TierName | None
    allow_downgrade: bool
    max_cost_uatp: int | None
    complexity: float | None
    priority: Priority | PriorityName
    client_request_id: str
    temperature: float | None
    top_p: float | None
    top_k: int | None
    min_p: float | None
    repetition_penalty: float | None
    seed: int | None
    max_new_tokens: int | None
    stop: Sequence[str] | str | None
    ignore_eos: bool
    top_logprobs: int | None
    deadline_s: float | None
    stop_token_ids: Sequence[int] | None


def job_of(prompt: PromptLike, **given: Unpack[JobFields]) -> types_pb2.JobSpec:
    """Return the message for a job; keyword arguments go with a prompt, not with a JobSpec.

    Raises:
        TypeError: a keyword that no job has, keywords beside a JobSpec, or what is no prompt, or no
            sequence of token ids.
        InvalidField: a value that protobuf cannot carry, or a word that names nothing.
    """
    _require_known(given)
    if isinstance(prompt, JobSpec):
        if given:
            raise TypeError(f"a JobSpec already says everything; put {', '.join(given)} into it")
        return _message(prompt)
    sampling = SamplingRequest(
        temperature=given.get("temperature"),
        top_p=given.get("top_p"),
        top_k=given.get("top_k"),
        min_p=given.get("min_p"),
        repetition_penalty=given.get("repetition_penalty"),
        seed=given.get("seed"),
        max_new_tokens=given.get("max_new_tokens"),
        stop=_stop_strings(given.get("stop")),
        ignore_eos=given.get("ignore_eos", False),
        top_logprobs=given.get("top_logprobs"),
        deadline_s=given.get("deadline_s"),
        stop_token_ids=_stop_token_ids(given.get("stop_token_ids")),
    )
    spec = JobSpec(
        account="",
        prompt=prompt_of(prompt),
        requested=_tier(given.get("tier"), "job.tier"),
        allow_downgrade=given.get("allow_downgrade", False),
        max_cost_uatp=given.get("max_cost_uatp"),
        complexity=given.get("complexity"),
        priority=_priority(given.get("priority", Priority.NORMAL)),
        client_request_id=given.get("client_request_id", ""),
        sampling=sampling,
    )
    return _message(spec)


def prompt_of(prompt: object) -> Prompt:
    """Return what a `PromptLike` other than a whole job says.

    Raises:
        TypeError: it is none.
    """
    if isinstance(prompt, Prompt):
        return prompt
    if isinstance(prompt, str):
        return Prompt(messages=(Message("user", prompt),))
    turns = tuple(prompt) if isinstance(prompt, Sequence) else (None,)
    if not all(isinstance(turn, Message) for turn in turns):
        raise TypeError("a prompt is a JobSpec, a Prompt, a sequence of Message or a str")
    return Prompt(messages=turns)


def tier_of(tier: Tier | str | None, field: str) -> str:
    """Return the name of the enum's value; `field` is the tier's name in the request."""
    known = _tier(tier, field)
    return "TIER_AUTO" if known is None else f"TIER_{known.name.upper()}"


def chat_of(messages: Sequence[Message], path: str) -> types_pb2.ChatMessages:
    """Return the message for a conversation, whose field in the request is `path`."""
    turns = (
        filled(
            types_pb2.ChatMessage(),
            f"{path}.messages[{index}]",
            role=turn.role,
            content=turn.content,
        )
        for index, turn in enumerate(messages)
    )
    return types_pb2.ChatMessages(messages=turns)


def filled(message: M, path: str = "", **values: object) -> M:
    """Set fields of `message`, which the request knows as `path`; None stays absent.

    Raises:
        InvalidField: a value that protobuf cannot carry, by the name the daemon would use.
    """
    for name, value in values.items():
        try:
            message.MergeFrom(type(message)(**{name: value}))
        except (ValueError, TypeError) as error:
            where = f"{path}.{name}" if path else name
            raise InvalidField(where, _complaint(message, name, error)) from None
    return message


def _complaint(message: ProtoMessage, name: str, error: Exception) -> str:
    if isinstance(error, UnicodeError):
        return "must be valid Unicode text"
    bounds = _BOUNDS.get(message.DESCRIPTOR.fields_by_name[name].cpp_type)
    if bounds is None:
        return str(error)
    return f"must be a whole number from {bounds[0]} to {bounds[1]}"


def _require_known(given: Iterable[str]) -> None:
    """Raise the error of Python's own calls for a keyword that `JobFields` does not have."""
    names = JobFields.__annotations__
    for name in given:
        if name not in names:
            close = difflib.get_close_matches(name, names, n=1)
            advice = f"did you mean '{close[0]}'?" if close else f"a job has {', '.join(names)}"
            if "max_cost_uatp" in close:
                advice += " It is in micro-ATP: 5 ATP is 5_000_000"
            raise TypeError(f"got an unexpected keyword argument '{name}'; {advice}")


def _stop_strings(stop: object) -> tuple[str, ...]:
    """Return the strings; a lone one is not taken apart into its letters."""
    if isinstance(stop, str):
        return (stop,)
    if stop is None:
        return ()
    if not isinstance(stop, Sequence):
        raise InvalidField("job.sampling.stop", "must be a sequence of strings")
    return tuple(stop)


def _stop_token_ids(ids: object) -> tuple[int, ...]:
    if ids is None:
        return ()
    if isinstance(ids, str) or not isinstance(ids, Iterable):
        raise TypeError(f"stop_token_ids is a sequence of token ids, such as (17,), not {ids!r}")
    return tuple(ids)


def _tier(tier: Tier | str | None, field: str) -> Tier | None:
    if tier is None or isinstance(tier, Tier):
        return tier
    return _meaning(_TIERS, tier, field)


def _priority(priority: Priority | str | int) -> Priority:
    if priority in tuple(Priority):
        return Priority(priority)
    return _meaning(_PRIORITIES, priority, "job.priority")


def _meaning(words: Mapping[str, T], word: object, field: str) -> T:
    if not isinstance(word, str) or word not in words:
        raise InvalidField(field, f"must be one of {', '.join(words)}, not {word!r}")
    return words[word]


def _message(spec: JobSpec) -> types_pb2.JobSpec:
    """The account is not sent: the daemon knows it from the token."""
    # The two have the same field names.
    sampling = {field.name: getattr(spec.sampling, field.name) for field in fields(SamplingRequest)}
    sampling["stop"] = _stop_strings(spec.sampling.stop)
    job = filled(
        types_pb2.JobSpec(),
        "job",
        tier=tier_of(spec.requested, "job.tier"),
        allow_downgrade=spec.allow_downgrade,
        max_cost_uatp=spec.max_cost_uatp,
        complexity=spec.complexity,
        priority=f"PRIORITY_{_priority(spec.priority).name}",
        client_request_id=spec.client_request_id,
        sampling=filled(types_pb2.SamplingParams(), "job.sampling", **sampling),
    )
    if spec.prompt.token_ids:
        ids = filled(types_pb2.TokenIds(), "job.token_ids", ids=spec.prompt.token_ids)
        job.token_ids.CopyFrom(ids)
    else:
        job.chat.CopyFrom(chat_of(spec.prompt.messages, "job.chat"))
    return job
