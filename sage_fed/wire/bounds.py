"""What every field of a request may hold: one table for the refusals, the docs and the fuzzer.

Owns the limits of single fields; each check comes before the work it bounds (lengths before
copies, counts before loops). A bound that the operator sets is the name of a setting in `limits`.
Does not know the model: whether token ids exist and the prompt fits the context is admission's to
say, and whether an account exists the ledger's.
Fails with `InvalidField`, named as a path in the proto, and with nothing else, whatever the
message holds.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType
from typing import Any

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message

from sage_fed.core import TIER_ROLES
from sage_fed.errors import InvalidField
from sage_fed.settings import LimitSettings

Limit = float | str
"""A number, or the name of one in `limits`."""


@dataclass(frozen=True, slots=True)
class Number:
    """From `low` to `high`; `above`: more than `low`; `unset`: or zero, which is absent."""

    low: float
    high: Limit
    above: bool = False
    unset: bool = False

    def check(self, where: str, value: float, limits: LimitSettings) -> None:
        high = limit_of(self.high, limits)
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

    def check(self, where: str, value: float, _: LimitSettings) -> None:
        if value < 0:
            raise InvalidField(where, f"must {self}")

    def __str__(self) -> str:
        return "not be negative"


@dataclass(frozen=True, slots=True)
class Count:
    """So many: a text's characters, a list's items; `each`: the characters of each item."""

    low: int
    high: Limit
    noun: str = "characters"
    printable: bool = False
    each: bool = False

    def check(self, where: str, value: Any, limits: LimitSettings) -> None:  # noqa: ANN401 - what has a length
        high = limit_of(self.high, limits)
        items = ((f"{where}[{at}]", item) for at, item in enumerate(value))
        for place, item in items if self.each else [(where, value)]:
            if not self.low <= len(item) <= high:
                counts = f"{self.low} to {high} {self.noun}, not {len(item)}"
                raise InvalidField(place, f"must have {counts}")
            if self.printable and not item.isprintable():
                raise InvalidField(place, "must consist of printable characters")

    def __str__(self) -> str:
        kind = "printable " if self.printable else ""
        counts = f"{self.low} to {_said(self.high)} {kind}{self.noun}"
        return f"{counts} each" if self.each else counts


@dataclass(frozen=True, slots=True)
class OneOf:
    """One of some words; `unset`: or none, which is absent."""

    words: tuple[str, ...]
    unset: bool = False

    def check(self, where: str, value: str, _: LimitSettings) -> None:
        if value not in self.words and (value or not self.unset):
            raise InvalidField(where, f"must be {self}")

    def __str__(self) -> str:
        return f"one of {', '.join(self.words)}"


@dataclass(frozen=True, slots=True)
class Contents:
    """All messages of a conversation together."""

    high: Limit

    def check(self, where: str, value: Any, limits: LimitSettings) -> None:  # noqa: ANN401 - messages
        num_chars, high = 0, limit_of(self.high, limits)
        for index, message in enumerate(value):
            num_chars += len(message.content)
            if num_chars > high:
                text = f"all messages together may have at most {high} characters"
                raise InvalidField(f"{where}[{index}].content", text)

    def __str__(self) -> str:
        return f"{_said(self.high)} characters in all contents together"


Bound = Number | NotNegative | Count | OneOf | Contents

MAX_UATP = 2**53
"""The most that one amount may be: exact in a double too, for clients that read JSON."""

MAX_PAGE_SIZE = 1000
_TIER_NAME = OneOf(tuple(tier.name for tier in TIER_ROLES), unset=True)

BOUNDS: Mapping[str, tuple[Bound, ...]] = MappingProxyType(
    {
        "JobSpec.text": (Count(1, "max_prompt_chars"),),
        "JobSpec.tier_name": (_TIER_NAME,),
        "JobSpec.max_cost_uatp": (NotNegative(),),
        "JobSpec.complexity": (Number(0.0, 1.0),),
        "JobSpec.client_request_id": (Count(0, "max_request_id_chars", printable=True),),
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
        "SamplingParams.max_new_tokens": (Number(1, "max_new_tokens"),),
        "SamplingParams.stop": (
            Count(0, "max_stop_strings", "strings"),
            Count(1, "max_stop_chars", each=True),
        ),
        "SamplingParams.top_logprobs": (Number(0, "max_top_logprobs"),),
        "SamplingParams.deadline_s": (Number(0.0, "max_deadline_s", above=True),),
        "SamplingParams.stop_token_ids": (Count(0, "max_stop_token_ids", "token ids"),),
        "CountTokensRequest.text": (Count(1, "max_prompt_chars"),),
        "CountTokensRequest.tier_name": (_TIER_NAME,),
        "GetModelRequest.tier_name": (_TIER_NAME,),
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
    }
)
"""The bounds of each field; of an enum any value of the proto, of any other field any value."""

REQUIRED = frozenset({"JobSpec.prompt", "CountTokensRequest.prompt"})
"""Oneofs of which one member has to be set."""

EXCLUSIVE: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {"AbortRequest": ("job_id", "call_id", "connection")}
)
"""Fields of which exactly one is not empty."""


def check(request: Message, limits: LimitSettings, path: str = "") -> None:
    """Refuse a request that holds what it may not; `path` is how its sender names it.

    Raises:
        InvalidField: the first field that is out of bounds.
    """
    message: Any = request
    name = message.DESCRIPTOR.name
    for oneof in message.DESCRIPTOR.oneofs:
        if f"{name}.{oneof.name}" in REQUIRED and message.WhichOneof(oneof.name) is None:
            *first, last = [member.name for member in oneof.fields]
            text = f"one of {', '.join(first)} and {last} must be set"
            raise InvalidField(_join(path, oneof.name), text)
    if name in EXCLUSIVE:
        _check_exclusive(message, EXCLUSIVE[name], path)
    for field, bounds in _checked(message.DESCRIPTOR):
        where = _join(path, field.name)
        # What is absent is sound, but for a message, which reads as an empty one.
        absent_is_empty = field.message_type is not None and not field.containing_oneof
        if field.has_presence and not absent_is_empty and not message.HasField(field.name):
            continue
        value = getattr(message, field.name)
        for bound in bounds:
            bound.check(where, value, limits)
        if field.enum_type is not None and value not in field.enum_type.values_by_number:
            raise InvalidField(where, f"unknown value {value}")
        if field.message_type is not None:
            items = enumerate(value) if field.is_repeated else ((None, value),)
            for at, item in items:
                check(item, limits, where if at is None else f"{where}[{at}]")


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


@cache
def _checked(descriptor: Descriptor) -> tuple[tuple[FieldDescriptor, tuple[Bound, ...]], ...]:
    """Return the fields that something is asked of, in the order of their numbers."""
    bounded = [(of, BOUNDS.get(f"{descriptor.name}.{of.name}", ())) for of in descriptor.fields]
    return tuple(
        (of, bounds) for of, bounds in bounded if bounds or of.enum_type or of.message_type
    )


def _check_exclusive(message: Any, names: tuple[str, ...], path: str) -> None:  # noqa: ANN401 - of any type
    given = [name for name in names if getattr(message, name)]
    if len(given) > 1:
        text = f"{' and '.join(given)} are set; name one thing to end"
        raise InvalidField(_join(path, names[0]), text)
    if not given:
        raise InvalidField(_join(path, names[0]), "must have 1 to 256 characters")


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _said(limit: Limit) -> str:
    return f"`limits.{limit}`" if isinstance(limit, str) else _exact(limit)


def _exact(value: float) -> str:
    """Return the number in full: rounded, one just beyond a bound would read as the bound."""
    return repr(value).removesuffix(".0")
