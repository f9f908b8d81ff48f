"""What every field of a request may hold: one table for the refusals, the docs and the fuzzer.

Owns the limits of single fields; each check comes before the work it bounds (lengths before
copies, counts before loops). A bound that the operator sets is the name of a setting in `limits`.
Does not know the model: whether token ids exist and the prompt fits the context is admission's to
say, and whether an account exists the ledger's.
Fails with `InvalidField`, named as a path in the proto, and with nothing else, whatever the
message holds.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from types import MappingProxyType
from typing import Any

from google.protobuf.descriptor import Descriptor
from google.protobuf.message import Message

from sage_fed.core import MAX_UATP, TIER_ROLES, Tier
from sage_fed.errors import InvalidField
from sage_fed.settings import LimitSettings

Limit = float | str
"""A number, or the name of one in `limits`."""


@dataclass(frozen=True, slots=True)
class Daemon:
    """What a daemon's settings say of requests."""

    limits: LimitSettings
    tiers: Sequence[Tier]


@dataclass(frozen=True, slots=True)
class Number:
    """From `low` to `high`; `above`: more than `low`; `unset`: or zero, which is absent."""

    low: float
    high: Limit
    above: bool = False
    unset: bool = False

    def check(self, where: str, value: float, daemon: Daemon) -> None:
        high = limit_of(self.high, daemon.limits)
        # Written so that NaN, which is neither below nor above anything, is refused.
        inside = (self.low < value or (value == self.low and not self.above)) and value <= high
        if not inside and (value or not self.unset):
            raise InvalidField(where, f"must be {self._range(_exact(high))}, not {_exact(value)}")

    def _range(self, high: str) -> str:
        low = _exact(self.low)
        return f"above {low} and at most {high}" if self.above else f"from {low} to {high}"

    def __str__(self) -> str:
        return self._range(_said(self.high))


@dataclass(frozen=True, slots=True)
class NotNegative:
    """Zero or more."""

    def check(self, where: str, value: float, _: Daemon) -> None:
        if value < 0:
            raise InvalidField(where, "must not be negative")

    def __str__(self) -> str:
        return "not negative"


@dataclass(frozen=True, slots=True)
class Count:
    """So many: a text's characters, a list's items; `each`: the characters of each item."""

    low: int
    high: Limit
    noun: str = "characters"
    printable: bool = False
    each: bool = False

    def check(self, where: str, value: Any, daemon: Daemon) -> None:  # noqa: ANN401 - what has a length
        if self.each:
            for at, item in enumerate(value):
                replace(self, each=False).check(f"{where}[{at}]", item, daemon)
            return
        high = limit_of(self.high, daemon.limits)
        if not self.low <= len(value) <= high:
            text = f"must have {self.low} to {high} {self.noun}, not {len(value)}"
            raise InvalidField(where, text)
        if self.printable and not value.isprintable():
            raise InvalidField(where, "must consist of printable characters")

    def __str__(self) -> str:
        kind = "printable " if self.printable else ""
        counts = f"{self.low} to {_said(self.high)} {kind}{self.noun}"
        return f"{counts} each" if self.each else counts


@dataclass(frozen=True, slots=True)
class OneOf:
    """One of some words."""

    words: tuple[str, ...]

    def check(self, where: str, value: str, _: Daemon) -> None:
        if value not in self.words:
            raise InvalidField(where, f"must be {self}")

    def __str__(self) -> str:
        return f"one of {', '.join(self.words)}"


@dataclass(frozen=True, slots=True)
class TierName:
    """The name of one of the daemon's tiers; or none, which is absent."""

    def check(self, where: str, value: str, daemon: Daemon) -> None:
        names = [tier.name for tier in daemon.tiers]
        if value and value not in names:
            raise InvalidField(where, f"must be one of {', '.join(names)}")

    def __str__(self) -> str:
        return "the name of one of the daemon's tiers"


@dataclass(frozen=True, slots=True)
class Contents:
    """All messages of a conversation together."""

    high: Limit

    def check(self, where: str, value: Any, daemon: Daemon) -> None:  # noqa: ANN401 - messages
        num_chars, high = 0, limit_of(self.high, daemon.limits)
        for index, message in enumerate(value):
            num_chars += len(message.content)
            if num_chars > high:
                text = f"all messages together may have at most {high} characters"
                raise InvalidField(f"{where}[{index}].content", text)

    def __str__(self) -> str:
        return f"{_said(self.high)} characters in all contents together"


Bound = Number | NotNegative | Count | OneOf | TierName | Contents

MAX_PAGE_SIZE = 1000

BOUNDS: Mapping[str, tuple[Bound, ...]] = MappingProxyType(
    {
        "JobSpec.text": (Count(1, "max_prompt_chars"),),
        "JobSpec.tier_name": (TierName(),),
        "JobSpec.max_cost_uatp": (NotNegative(),),
        "JobSpec.complexity": (Number(0.0, 1.0),),
        "JobSpec.max_error": (Number(0.0, 1.0),),
        "JobSpec.client_request_id": (Count(0, "max_request_id_chars", printable=True),),
        "JobSpec.task_class": (Count(0, 64, printable=True),),
        "ChatMessages.messages": (
            Count(1, "max_messages", "messages"),
            Contents("max_prompt_chars"),
        ),
        "ChatMessage.role": (OneOf(("system", "user", "assistant")),),
        # A token stands for one character or more, so the bound on characters bounds tokens.
        "TokenIds.ids": (Count(1, "max_prompt_chars", "token ids"),),
        "SamplingParams.temperature": (Number(0.0, 2.0),),
        "SamplingParams.top_p": (Number(0.0, 1.0, above=True),),
        "SamplingParams.min_p": (Number(0.0, 1.0),),
        "SamplingParams.repetition_penalty": (Number(0.0, 2.0, above=True),),
        "SamplingParams.presence_penalty": (Number(-2.0, 2.0),),
        "SamplingParams.frequency_penalty": (Number(-2.0, 2.0),),
        "SamplingParams.max_new_tokens": (Number(1, "max_new_tokens"),),
        "SamplingParams.stop": (
            Count(0, "max_stop_strings", "strings"),
            Count(1, "max_stop_chars", each=True),
        ),
        "SamplingParams.top_logprobs": (Number(0, "max_top_logprobs"),),
        "SamplingParams.deadline_s": (Number(0.0, "max_deadline_s", above=True),),
        "SamplingParams.stop_token_ids": (Count(0, "max_stop_token_ids", "token ids"),),
        "CountTokensRequest.text": (Count(1, "max_prompt_chars"),),
        "CountTokensRequest.tier_name": (TierName(),),
        "GetModelRequest.tier_name": (TierName(),),
        "CompareModesRequest.task_class": (Count(0, 64, printable=True),),
        "CompareModesRequest.max_error": (Number(0.0, 1.0),),
        "ListEntriesRequest.page_size": (Number(1, MAX_PAGE_SIZE, unset=True),),
        "AbortRequest.job_id": (Count(0, 256),),
        "AbortRequest.call_id": (Count(0, 256),),
        "AbortRequest.connection": (Count(0, 256),),
        # A drain that may take longer is a daemon that does not stop.
        "DrainRequest.grace_s": (Number(0.0, 86_400.0),),
        "SetBudgetRequest.account": (Count(1, 256),),
        "SetBudgetRequest.balance_uatp": (Number(0, MAX_UATP),),
        "SetBudgetRequest.capacity_uatp": (Number(0, MAX_UATP),),
        "SetBudgetRequest.refill_uatp_per_s": (Number(0, MAX_UATP),),
        "SetBudgetRequest.strategic_floor_uatp": (Number(0, MAX_UATP),),
        "AdoptRateCardRequest.version": (Count(1, 64),),
        "AdoptQualityCardRequest.version": (Count(1, 64),),
    }
)
"""The bounds of each field; of an enum any value of the proto, of any other field any value."""

REQUIRED = frozenset({"JobSpec.prompt", "CountTokensRequest.prompt"})
"""Oneofs of which one member has to be set."""

EXCLUSIVE: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {"AbortRequest": ("job_id", "call_id", "connection")}
)
"""Fields of which exactly one is not empty."""


def check(
    request: Message, limits: LimitSettings, path: str = "", *, tiers: Sequence[Tier] = TIER_ROLES
) -> None:
    """Refuse a request that holds what it may not.

    Args:
        request: what arrived.
        limits: the daemon's.
        path: how the request's sender names it.
        tiers: the daemon's.

    Raises:
        InvalidField: the first field that is out of bounds.
    """
    where = f"{path}." if path else ""
    _check(_asked(request.DESCRIPTOR), request, Daemon(limits, tiers), where)


def table() -> Iterator[tuple[str, str]]:
    """Yield each field that has a bound, and the bound in words."""
    for oneof in sorted(REQUIRED):
        yield oneof, "exactly one is set"
    for message, names in EXCLUSIVE.items():
        yield message, f"exactly one of {', '.join(names)} is not empty"
    for field, bounds in BOUNDS.items():
        yield field, "; ".join(map(str, bounds))


def limit_of(limit: Limit, limits: LimitSettings) -> float:
    """Return the number that a limit is."""
    value: float = getattr(limits, limit) if isinstance(limit, str) else limit
    return value


@dataclass(frozen=True, slots=True)
class _Field:
    """What is asked of one field, read from its description once.

    `presence`: it is sound where it is absent. `numbers` are those of its enum, `inner` is what is
    asked of its message, or of each in a list.
    """

    name: str
    bounds: tuple[Bound, ...]
    presence: bool
    numbers: frozenset[int] | None
    inner: _Message | None
    repeated: bool


@dataclass(frozen=True, slots=True)
class _Message:
    """What is asked of a message.

    `required` are its oneofs with their members, `roles` the names of the tiers that it may name
    twice.
    """

    fields: tuple[_Field, ...]
    required: tuple[tuple[str, str], ...]
    exclusive: tuple[str, ...]
    roles: Mapping[int, str]


@cache
def _asked(descriptor: Descriptor) -> _Message:
    found = []
    for of in descriptor.fields:
        bounds = BOUNDS.get(f"{descriptor.name}.{of.name}", ())
        numbers = frozenset(of.enum_type.values_by_number) if of.enum_type is not None else None
        inner = _asked(of.message_type) if of.message_type is not None else None
        if bounds or numbers is not None or inner is not None:
            # An absent message reads as an empty one, which may lack something.
            presence = of.has_presence and (inner is None or of.containing_oneof is not None)
            found.append(_Field(of.name, bounds, presence, numbers, inner, of.is_repeated))
    required = [of for of in descriptor.oneofs if f"{descriptor.name}.{of.name}" in REQUIRED]
    members = [", ".join(field.name for field in of.fields) for of in required]
    return _Message(
        fields=tuple(found),
        required=tuple((of.name, names) for of, names in zip(required, members, strict=True)),
        exclusive=EXCLUSIVE.get(descriptor.name, ()),
        roles=_roles(descriptor) if "tier_name" in descriptor.fields_by_name else {},
    )


def _roles(descriptor: Descriptor) -> dict[int, str]:
    """Return the names of the tiers that the enum has, by their numbers."""
    enum = descriptor.fields_by_name["tier"].enum_type
    assert enum is not None
    names = {of.number: of.name.removeprefix("TIER_").lower() for of in enum.values}
    roles = {tier.name for tier in TIER_ROLES}
    return {number: name for number, name in names.items() if name in roles}


def _check(asked: _Message, message: Any, daemon: Daemon, path: str) -> None:  # noqa: ANN401 - of any type
    for oneof, members in asked.required:
        if message.WhichOneof(oneof) is None:
            text = f"one of {' and '.join(members.rsplit(', ', 1))} must be set"
            raise InvalidField(path + oneof, text)
    if asked.exclusive:
        _check_exclusive(message, asked.exclusive, path)
    role = asked.roles.get(message.tier) if asked.roles and message.tier_name else None
    if role is not None and role != message.tier_name:
        raise InvalidField(f"{path}tier_name", f"must be {role}, as tier says, or empty")
    for field in asked.fields:
        name = field.name
        if field.presence and not message.HasField(name):
            continue
        value = getattr(message, name)
        for bound in field.bounds:
            bound.check(path + name, value, daemon)
        if field.numbers is not None and value not in field.numbers:
            raise InvalidField(path + name, f"unknown value {value}")
        if field.inner is not None and field.repeated:
            for at, item in enumerate(value):
                _check(field.inner, item, daemon, f"{path}{name}[{at}].")
        elif field.inner is not None:
            _check(field.inner, value, daemon, f"{path}{name}.")


def _check_exclusive(message: Any, names: tuple[str, ...], path: str) -> None:  # noqa: ANN401 - of any type
    given = [name for name in names if getattr(message, name)]
    if len(given) > 1:
        text = f"{' and '.join(given)} are set; name one thing to end"
        raise InvalidField(path + names[0], text)
    if not given:
        raise InvalidField(path + names[0], "must have 1 to 256 characters")


def _said(limit: Limit) -> str:
    return f"`limits.{limit}`" if isinstance(limit, str) else _exact(limit)


def _exact(value: float) -> str:
    """Return the number in full: rounded, one just beyond a bound would read as the bound."""
    return repr(value).removesuffix(".0")
