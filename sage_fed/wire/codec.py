"""One codec between core's frozen values and the messages of `sage_fed.v1`.

A value and its message have the same field names, so one function reads both descriptions and
makes the translation: enums by their naming convention (`StopReason.LENGTH` is
`STOP_REASON_LENGTH`), a union as the oneof of the same name, None as an absent field, a tier by its
role and its name. `_NAMES` lists the fields whose names differ. A field without a counterpart does
not travel: its default stands, or the reader gives it.
What a class and a message need is worked out once, on first use.
Knows no rule of the product; what a request may hold is in `bounds`.
Fails with `InvalidField`, named by its path, for a value that protobuf cannot carry, and with
`CallFailed` for a word of a newer daemon.
"""

from __future__ import annotations

import datetime as dt
import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cache
from operator import attrgetter
from types import MappingProxyType, NoneType, UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints, overload

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from sage_fed import core
from sage_fed.core import TIER_ROLES, Tier
from sage_fed.errors import CallFailed, InvalidField

T = TypeVar("T")
M = TypeVar("M", bound=Message)

Fields = dict[str, Any]
"""What a message's constructor takes: a nested message is a dict, too."""

Convert = Callable[[Any], Any]

_NAMES: Mapping[tuple[type, str], str] = MappingProxyType(
    {
        (core.JobSpec, "requested"): "tier",
        (core.Quote, "tiers"): "quotes",
        (core.CardStatus, "version"): "rate_card",
        (core.QualityCardStatus, "version"): "quality_card",
        (core.TierLoad, "running"): "requests_running",
        (core.TierLoad, "waiting"): "requests_waiting",
        (core.TierLoad, "running_limit"): "requests_running_limit",
        (core.TierLoad, "waiting_limit"): "requests_waiting_limit",
        (core.Entry, "time_ns"): "time",
        (core.Day, "day"): "date",
        (core.Day, "num_entries"): "entries",
    }
)
"""The names of fields that a message calls otherwise."""

_UNSPECIFIED: Mapping[type, object] = MappingProxyType(
    {
        core.CardFit: core.CardFit.UNKNOWN,
        core.Priority: core.Priority.NORMAL,
        # None where a value may be absent; in a route or a quote it is an older daemon's.
        core.Mode: core.Mode.SINGLE,
    }
)
"""What an enum's zero stands for; of any other enum it is an error."""

_WHOLE_NUMBERS: Mapping[int, tuple[int, int]] = MappingProxyType(
    {
        FieldDescriptor.CPPTYPE_INT32: (-(2**31), 2**31 - 1),
        FieldDescriptor.CPPTYPE_INT64: (-(2**63), 2**63 - 1),
        FieldDescriptor.CPPTYPE_UINT32: (0, 2**32 - 1),
        FieldDescriptor.CPPTYPE_UINT64: (0, 2**64 - 1),
    }
)

_PART = 4096
"""Numbers that are copied without a break: some 50 microseconds."""

_NS_PER_S = 1_000_000_000
_EPOCH = dt.date(1970, 1, 1)


def encode(value: object, message: type[M], path: str = "", **given: object) -> M:
    """Return the message for a value, or the message whose oneof it belongs to.

    Args:
        value: a dataclass of core.
        message: the class of the message.
        path: how a request names the message, for errors.
        given: further fields of the message.

    Raises:
        InvalidField: a value that protobuf cannot carry.
    """
    kind: type = type(value)
    return build(message, path, **encoder(kind, message.DESCRIPTOR)(value), **given)


def build(message: type[M], path: str = "", /, **given: object) -> M:
    """Return a message with these fields; None stays absent.

    Raises:
        InvalidField: a value that protobuf cannot carry, by the name the daemon would use.
    """
    try:
        return message(**given)
    except (ValueError, TypeError):
        _refuse(message, path, given)
        raise


@overload
def decode(kind: type[T], message: Message, **given: object) -> T: ...
@overload
def decode(kind: UnionType, message: Message) -> Any: ...  # noqa: ANN401 - one of the union
def decode(kind: Any, message: Message, **given: object) -> Any:
    """Return the value that a message stands for.

    Args:
        kind: a dataclass of core, or a union of some, which are the message's oneof.
        message: what arrived. A request's has been checked (`bounds`).
        given: fields of the value that do not travel.

    Raises:
        CallFailed: an enum's value or an event of a newer daemon.
    """
    return decoder(kind, message.DESCRIPTOR)(message, **given)


@cache
def encoder(kind: type, descriptor: Descriptor) -> Callable[[Any], Fields]:
    """Return what turns values of a class into the fields of a message."""
    if (member := _members(descriptor).get(kind.__name__)) is not None:
        member_name, inner = member.name, encoder(kind, member.message_type)
        return lambda value: {member_name: inner(value)}
    travelling = _travelling(kind, descriptor)
    entries = ", ".join(field.write for field in travelling.values())
    return _compiled(f"lambda value: {{{entries}}}", travelling)


@cache
def decoder(kind: Any, descriptor: Descriptor) -> Callable[..., Any]:  # noqa: ANN401 - or a union
    """Return what turns messages into values of a class, or of a union of some."""
    if isinstance(kind, UnionType):
        (oneof,) = descriptor.oneofs
        return _member_reader(kind, oneof.name, descriptor)
    travelling = _travelling(kind, descriptor)
    arguments = [f"{name}={field.read}" for name, field in travelling.items()]
    # What does not travel is the caller's to give, or has a default.
    given = ["**given"] if len(travelling) < len(fields(kind)) else []
    parameters, arguments = ", ".join(["message", *given]), [*arguments, *given]
    return _compiled(f"lambda {parameters}: kind({', '.join(arguments)})", travelling, kind=kind)


@dataclass(frozen=True, slots=True)
class _Field:
    """How a field travels, in Python: `write` from `value`, `read` from `message`.

    `write` is an entry of the message's fields; `names` is what the two expressions use.
    """

    write: str
    read: str
    names: Fields


def _compiled(source: str, travelling: Mapping[str, _Field], **names: object) -> Callable[..., Any]:
    # One expression for all fields is twice as fast as a loop over them; thousands of deltas a
    # second take this way. Its text is made of the names of our own classes and messages only.
    for field in travelling.values():
        names |= field.names
    compiled: Callable[..., Any] = eval(source, names)  # noqa: S307 - as dataclasses are made
    return compiled


def _travelling(kind: type, descriptor: Descriptor) -> dict[str, _Field]:
    """Return the fields that a class and a message share, by the class's names."""
    hints = get_type_hints(kind)
    names = {of.name: _NAMES.get((kind, of.name), of.name) for of in fields(kind)}
    return {
        attribute: _field(hints[attribute], attribute, name, descriptor)
        for attribute, name in names.items()
        if name in descriptor.fields_by_name or name in descriptor.oneofs_by_name
    }


def _field(hint: Any, attribute: str, name: str, descriptor: Descriptor) -> _Field:  # noqa: ANN401 - any type
    value, there = f"value.{attribute}", f"message.{name}"
    write, read = f"write_{attribute}", f"read_{attribute}"
    kinds = [kind for kind in get_args(hint) if kind is not NoneType]
    optional = isinstance(hint, UnionType) and len(kinds) == 1
    kind = kinds[0] if optional else hint
    if kind is core.Prompt:
        names = {write: _written_prompt, read: _read_prompt}
        return _Field(f"**{write}({value})", f"{read}(message)", names)
    if isinstance(kind, UnionType):
        names = {
            write: _member_writer(kind, descriptor),
            read: _member_reader(kind, name, descriptor),
        }
        return _Field(f"**{write}({value})", f"{read}(message)", names)
    field = descriptor.fields_by_name[name]
    if kind is Tier:
        return _tier(
            field, value, named=f"{name}_name" in descriptor.fields_by_name, optional=optional
        )
    if field.is_repeated:
        to_wire, from_wire = _item(kinds[0], field)
        if to_wire is None:
            return _Field(f"{name!r}: {value}", f"_copied({there})", {"_copied": _copied})
        return _Field(
            f"{name!r}: [{write}(item) for item in {value}]",
            f"tuple([{read}(item) for item in {there}])",
            {write: to_wire, read: from_wire},
        )
    to_wire, from_wire = _item(kind, field)
    written, found = (f"{write}({value})", f"{read}({there})") if to_wire else (value, there)
    if optional and to_wire:
        written = f"None if {value} is None else {written}"
    if optional:
        # Where a message cannot tell, zero says nothing.
        told = f"message.HasField({name!r})" if field.has_presence else there
        found = f"{found} if {told} else None"
    return _Field(f"{name!r}: {written}", found, {write: to_wire, read: from_wire})


def _item(kind: Any, field: FieldDescriptor) -> tuple[Convert | None, Convert | None]:  # noqa: ANN401 - any type
    """Return how one value is written and read; None is as it is."""
    if field.enum_type is not None:
        prefix = re.sub(r"(?<!^)(?=[A-Z])", "_", field.enum_type.name).upper()
        numbers = {
            word: field.enum_type.values_by_name[f"{prefix}_{word.name}"].number for word in kind
        }
        words = _Words(kind.__name__, {number: word for word, number in numbers.items()})
        if kind in _UNSPECIFIED:
            words[0] = _UNSPECIFIED[kind]
        return numbers.__getitem__, words.__getitem__
    if field.message_type is None:
        return (_date_of, _day_of) if field.name == "date" else (None, None)
    if field.message_type.full_name == "google.protobuf.Timestamp":
        return _timestamp_of, lambda time: time.seconds * _NS_PER_S + time.nanos
    if get_origin(kind) is tuple:
        names = tuple(of.name for of in field.message_type.fields)
        return lambda values: dict(zip(names, values, strict=True)), attrgetter(*names)
    return encoder(kind, field.message_type), decoder(kind, field.message_type)


class _Words(dict[int, Any]):
    """An enum's words by their numbers."""

    def __init__(self, name: str, words: Mapping[int, object]) -> None:
        super().__init__(words)
        self._name = name

    def __missing__(self, number: int) -> Any:  # noqa: ANN401 - never
        raise _newer(f"said {self._name} {number}, which")


def _member_writer(kind: UnionType, descriptor: Descriptor) -> Convert:
    members = {of: _members(descriptor)[of.__name__] for of in get_args(kind)}
    writers = {of: (m.name, encoder(of, m.message_type)) for of, m in members.items()}

    def write(value: object) -> Fields:
        member, inner = writers[type(value)]
        return {member: inner(value)}

    return write


def _member_reader(kind: UnionType, oneof: str, descriptor: Descriptor) -> Convert:
    members = {of: _members(descriptor)[of.__name__] for of in get_args(kind)}
    readers = {m.name: decoder(of, m.message_type) for of, m in members.items()}

    def read(message: Message) -> object:
        member = message.WhichOneof(oneof)
        if member not in readers:
            raise _newer("sent an event that")
        return readers[member](getattr(message, member))

    return read


def _tier(field: FieldDescriptor, value: str, *, named: bool, optional: bool) -> _Field:
    """Return how a tier travels: as its role, and as its name where the message has a field."""
    assert field.enum_type is not None
    values = field.enum_type.values_by_name
    numbers = {tier: values[f"TIER_{tier.name.upper()}"].number for tier in TIER_ROLES}
    roles = {number: tier for tier, number in numbers.items()}
    auto = values["TIER_AUTO"].number

    def number_of(tier: Tier | None) -> int:
        return auto if tier is None else numbers.get(tier, 0)

    def tier_of(number: int, name: str) -> Tier | None:
        if number in roles:
            return roles[number]
        if number in (0, auto) and (name or optional):
            return Tier.called(name) if name else None
        raise _newer(f"said Tier {number}, which")

    name = field.name
    write, read = f"{name!r}: number_of_{name}({value})", f"message.{name}"
    if named:
        write += f", '{name}_name': {value} and {value}.name"
    read = f"tier_of_{name}({read}, {f'{read}_name' if named else repr('')})"
    return _Field(write, read, {f"number_of_{name}": number_of, f"tier_of_{name}": tier_of})


def _written_prompt(prompt: core.Prompt) -> Fields:
    if prompt.token_ids:
        return {"token_ids": {"ids": prompt.token_ids}}
    turns = [{"role": turn.role, "content": turn.content} for turn in prompt.messages]
    return {"chat": {"messages": turns}}


def _read_prompt(message: Any) -> core.Prompt:  # noqa: ANN401 - two messages have a prompt
    """Return the prompt; a text is one turn of the user's."""
    match message.WhichOneof("prompt"):
        case "text":
            return core.Prompt(messages=(core.Message("user", message.text),))
        case "chat":
            turns = message.chat.messages
            return core.Prompt(tuple(core.Message(turn.role, turn.content) for turn in turns))
        case _:
            return core.Prompt(token_ids=_copied(message.token_ids.ids))


def _members(descriptor: Descriptor) -> dict[str, FieldDescriptor]:
    """Return the fields of a message's oneofs that are messages, by their messages' names."""
    found = (field for oneof in descriptor.oneofs for field in oneof.fields)
    return {field.message_type.name: field for field in found if field.message_type is not None}


def _copied(numbers: Sequence[Any]) -> tuple[Any, ...]:
    """Return them all; other threads get a turn between parts, and not only behind the last."""
    if len(numbers) <= _PART:
        return tuple(numbers)
    parts = (numbers[at : at + _PART] for at in range(0, len(numbers), _PART))
    return tuple(itertools.chain.from_iterable(parts))


def _timestamp_of(time_ns: int) -> Fields:
    return {"seconds": time_ns // _NS_PER_S, "nanos": time_ns % _NS_PER_S}


def _date_of(day: int) -> str:
    return str(_EPOCH + dt.timedelta(days=day))


def _day_of(date: str) -> int:
    return (dt.date.fromisoformat(date) - _EPOCH).days


def _newer(what: str) -> CallFailed:
    return CallFailed(f"the daemon {what} this client does not know", status="UNKNOWN")


def _refuse(message: type[Message], path: str, given: Mapping[str, Any]) -> None:
    """Raise `InvalidField` for the first field that the message does not take."""
    for name, value in given.items():
        where = f"{path}.{name}" if path else name
        field: Any = message.DESCRIPTOR.fields_by_name[name]
        try:
            message(**{name: value})
        except (ValueError, TypeError) as error:
            if field.message_type is not None:
                inner = GetMessageClass(field.message_type)
                for at, item in enumerate(value) if field.is_repeated else [(None, value)]:
                    _refuse(inner, where if at is None else f"{where}[{at}]", item)
            raise InvalidField(where, _complaint(field, error)) from None


def _complaint(field: FieldDescriptor, error: Exception) -> str:
    if isinstance(error, UnicodeError):
        return "must be valid Unicode text"
    bounds = _WHOLE_NUMBERS.get(field.cpp_type)
    if bounds is None:
        return str(error)
    return f"must be a whole number from {bounds[0]} to {bounds[1]}"
