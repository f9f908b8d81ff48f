"""Settings as rows: what `sage-fed config` prints and what the documentation lists.

Owns the printed form of a value, and its form in JSON. A `SecretStr` is masked here, so no caller
can forget to.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal
from typing import get_origin

from pydantic import BaseModel, SecretStr
from pydantic.fields import FieldInfo

from sage_fed.settings.model import Settings
from sage_fed.settings.problems import section_of
from sage_fed.settings.values import format_size

MASK = "**********"


@dataclass(frozen=True, slots=True)
class KeyDescription:
    """One key: its dotted name, its default as printed (empty: none) and its meaning."""

    key: str
    default: str
    description: str


def leaves(model: BaseModel) -> Iterator[tuple[str, str]]:
    """Dotted key and printed value of every leaf of `model`, in the order of declaration."""
    return ((key, printed(key, value)) for key, value in _leaves(model, ""))


def plain_leaves(model: BaseModel) -> Iterator[tuple[str, object]]:
    """The same with values as JSON has them: sizes in bytes and amounts in ATP are numbers."""
    return ((key, _plain(value)) for key, value in _leaves(model, ""))


def _leaves(value: object, key: str) -> Iterator[tuple[str, object]]:
    if isinstance(value, BaseModel):
        below = {name: getattr(value, name) for name in type(value).model_fields}
    elif isinstance(value, dict):
        below = value
    else:
        below = {}
    for name, item in below.items():
        yield from _leaves(item, f"{key}.{name}" if key else name)
    if not below:
        yield key, value


def _plain(value: object) -> object:
    if isinstance(value, SecretStr):
        return MASK
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, Decimal):
        # Exact: an amount has 15 digits at most.
        return int(value) if value == value.to_integral_value() else float(value)
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return str(value)


def printed(key: str, value: object) -> str:
    """The printed form of one value: sizes with a unit, secrets masked, nothing as `-`."""
    if isinstance(value, SecretStr):
        return MASK
    if value is None or value in ("", {}):
        return "-"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, enum.Enum):
        return str(value.value)
    if isinstance(value, Decimal):
        return f"{value:f}"
    if isinstance(value, int) and key.endswith("_bytes"):
        return format_size(value)
    return str(value)


def describe() -> tuple[KeyDescription, ...]:
    """Every key with its meaning; `accounts.NAME` stands for any account."""
    return tuple(_describe(Settings, ""))


def _describe(model: type[BaseModel], prefix: str) -> Iterator[KeyDescription]:
    for name, field in model.model_fields.items():
        key = f"{prefix}{name}"
        section = section_of(field.annotation)
        if section is None:
            yield KeyDescription(key, _default(key, field), field.description or "")
        elif get_origin(field.annotation) is dict:
            yield from _describe(section, f"{key}.NAME.")
        else:
            yield from _describe(section, f"{key}.")


def _default(key: str, field: FieldInfo) -> str:
    return "" if field.is_required() else printed(key, field.default)
