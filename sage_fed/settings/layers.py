"""Nested values of one source of settings, where each came from, and laying one over another.

Knows no source and no rule of a single setting but that a model's revision belongs to it.
Cannot fail.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sage_fed.settings.problems import origin_of

Values = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Layer:
    """Nested values of one source and the origin of each dotted leaf."""

    values: Values
    origins: Mapping[str, str]


def layer_of(values: Values, origin: str) -> Layer:
    """Return the layer of a source whose values all came from one place."""
    return Layer(values, {".".join(path): origin for path, _ in walk(values)})


def walk(values: Values, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield each leaf and its path; an empty table is a leaf."""
    for name, value in values.items():
        if isinstance(value, dict) and value:
            yield from walk(value, (*path, name))
        else:
            yield (*path, name), value


def has(values: object, path: list[str]) -> bool:
    """Whether there is anything under a path."""
    for part in path:
        if not isinstance(values, dict) or part not in values:
            return False
        values = values[part]
    return True


def merge(merged: Values, origins: dict[str, str], layer: Layer) -> None:
    """Lay one more layer over what is merged already."""
    for tier in ("tactical", "strategic"):
        old, new = (values.get(tier) for values in (merged, layer.values))
        if not isinstance(old, dict) or not isinstance(new, dict):
            continue
        if "model" in new and new["model"] != old.get("model"):
            # A revision belongs to its model: another model starts without the old one's.
            old.pop("revision", None)
            origins.pop(f"{tier}.revision", None)
    for path, value in walk(layer.values):
        if put(merged, path, value):
            key = ".".join(path)
            origins[key] = origin_of(key, layer.origins)


def put(values: Values, path: Sequence[str], value: object) -> bool:
    """Set one leaf; False where an empty table meets a table, which changes nothing."""
    *sections, name = path
    section = values
    for part in sections:
        if not isinstance(section.get(part), dict):
            section[part] = {}
        section = section[part]
    if value == {} and isinstance(section.get(name), dict):
        return False
    section[name] = value
    return True
