"""How many fields a message has, counted in its bytes before an object is made of any.

A field takes two bytes, and the object that it becomes a hundred and more: four megabytes of empty
chat messages are two million objects, half a gigabyte and a tenth of a second, to be refused for
their number afterwards. The count stops at the bound, so it is bounded itself.
Packed numbers are one field, however many they are: they become no objects.
Fails with `InvalidField`, and never on bytes that protobuf would read.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

from google.protobuf.descriptor import Descriptor

from sage_fed.errors import InvalidField

MAX_FIELDS = 2048
"""Of one request, those of the messages in it included; counting them takes a millisecond.

A conversation of the most messages that `limits.max_messages` may allow has 1,536."""

_LEAST_FIELD_BYTES = 2
_MAX_VARINT_BYTES = 10
_VARINT, _FIXED64, _DELIMITED, _FIXED32 = 0, 1, 2, 5
_GROUPS = (3, 4)
_FIXED = {_FIXED64: 8, _FIXED32: 4}

Inner = Mapping[int, Descriptor]
"""Which fields of a message are messages."""


def require_few_fields(message: Descriptor, raw: bytes) -> None:
    """Refuse bytes of a message with more fields than any request of ours can have.

    Raises:
        InvalidField: there are more, or the bytes are no message at all.
    """
    if len(raw) <= MAX_FIELDS * _LEAST_FIELD_BYTES:
        return
    # What is still to be counted, the innermost last: where it ends, and what is in it.
    outer: list[tuple[int, Inner]] = []
    end, inner = len(raw), _inner(message)
    at = count = 0
    while True:
        if at == end:
            if not outer:
                return
            end, inner = outer.pop()
            continue
        count += 1
        if count > MAX_FIELDS:
            raise InvalidField("request", f"must have at most {MAX_FIELDS:,} fields")
        tag, at = _varint(raw, at)
        kind = tag & 7
        if kind == _DELIMITED:
            length, at = _varint(raw, at)
            nested = inner.get(tag >> 3)
            if nested is None:
                at += length
            elif at + length <= end:
                outer.append((end, inner))
                end, inner = at + length, _inner(nested)
            else:
                raise _malformed()
        else:
            at = _behind(raw, at, kind)
        if at > end:
            raise _malformed()


@cache
def _inner(message: Descriptor) -> Inner:
    """Return the messages in a message; there are as many as the schema has."""
    return {
        field.number: field.message_type
        for field in message.fields
        if field.message_type is not None
    }


def _behind(raw: bytes, at: int, kind: int) -> int:
    """Return the place behind a number; a group's marks have none."""
    if kind == _VARINT:
        return _varint(raw, at)[1]
    if kind not in _FIXED and kind not in _GROUPS:
        raise _malformed()
    return at + _FIXED.get(kind, 0)


def _varint(raw: bytes, at: int) -> tuple[int, int]:
    """Return the number at a place, and the place behind it."""
    if at < len(raw) and raw[at] < 0x80:
        return raw[at], at + 1
    value = shift = 0
    for i in range(at, min(at + _MAX_VARINT_BYTES, len(raw))):
        byte = raw[i]
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, i + 1
        shift += 7
    raise _malformed()


def _malformed() -> InvalidField:
    return InvalidField("request", "not a protobuf message")
