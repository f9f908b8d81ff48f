"""Settings as rows: what `sage-fed config` prints and what the documentation lists.

Owns the printed form of a value. A `SecretStr` is masked here, so no caller can forget to.
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


def leaves(model: BaseModel, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Dotted key and printed value of every leaf of `model`, in the order of declaration."""
    for name in type(model).model_fields:
        yield from _leaves(f"{prefix}{name}", getattr(model, name))


def _leaves(key: str, value: object) -> Iterator[tuple[str, str]]:
    if isinstance(value, BaseModel):
        yield from leaves(value, f"{key}.")
    elif isinstance(value, dict) and value:
        for name, item in value.items():
            yield from _leaves(f"{key}.{name}", item)
    else:
        yield key, printed(key, value)


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
