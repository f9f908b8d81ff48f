"""Mistakes in settings, as one text that an operator can act on.

Owns the wording: for each problem the dotted key, where its value came from, what is wrong and
what would be right. Never repeats the value of an unknown or a secret key.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from decimal import Decimal
from typing import Any, get_args, get_origin

from pydantic import BaseModel, SecretStr, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from sage_fed.environment import ENV_PREFIX
from sage_fed.errors import ConfigError

_MOST_LINES = 10
"""Problems that one error tells; who has more has another file, or one mistake in all of them."""

_PORT_WORDS = ("port", "host", "addr", "address", "bind")
"""What other programs call a part, or all, of where they listen."""

_MOST_CHOICES = 8
"""Names that fit into a line."""


def config_error(*problems: str) -> ConfigError:
    """One error for all `problems`, each on a line of its own."""
    lines = [_visible(problem) for problem in problems]
    if len(lines) == 1:
        return ConfigError(lines[0])
    if (more := len(lines) - _MOST_LINES) > 0:
        lines[_MOST_LINES:] = [f"and {more} more"]
    return ConfigError("\n  ".join((f"{len(problems)} settings cannot be used:", *lines)))


def _visible(text: str) -> str:
    """The text with control and direction characters written as escapes.

    A key is printed as somebody else's file had it: it must not repaint the operator's terminal.
    """
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode("ascii")
        for char in text
    )


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The tail of a message about `word`: the nearest known one, else the choice if it is small."""
    choice = sorted(known)
    near = difflib.get_close_matches(word, choice, n=1, cutoff=0.6)
    if near:
        return f"did you mean {near[0]}?"
    if len(choice) > _MOST_CHOICES:
        return "see `sage-fed config` for those that there are"
    return f"known: {', '.join(choice)}" if choice else "nothing can be set here"


def known_keys(model: type[BaseModel], path: Sequence[str]) -> list[str] | None:
    """Keys that may stand under `path`; None where any name is allowed (accounts)."""
    section: type[BaseModel] | None = model
    rest = list(path)
    while rest:
        if section is None or rest[0] not in section.model_fields:
            return []
        field = section.model_fields[rest.pop(0)]
        section = section_of(field.annotation)
        if get_origin(field.annotation) is dict:
            if not rest:
                return None
            rest.pop(0)
    return list(section.model_fields) if section is not None else []


def unknown_key(model: type[BaseModel], path: Sequence[str], origin: str) -> str:
    """What to say about the first part of `path`, which came from `origin`, that names no key."""
    if meant := _respelled(model, path):
        if origin.startswith("environment "):
            meant = ENV_PREFIX + meant.replace(".", "__").upper()
        return f"unknown key; did you mean {meant}?"
    for depth in range(len(path)):
        known = known_keys(model, path[:depth])
        if known is not None and path[depth] not in known:
            elsewhere = _elsewhere(model, path[depth], depth)
            if elsewhere:
                return f"unknown key; {elsewhere}"
            prefix = "".join(f"{part}." for part in path[:depth])
            whole = [f"{prefix}{name}" for name in known]
            return f"unknown key; {did_you_mean(f'{prefix}{path[depth]}', whole)}"
    return "a variable for the whole table is set too; set its keys one by one"


def _respelled(model: type[BaseModel], path: Sequence[str]) -> str:
    """The key that `path` is with a dot for an underscore, or as a port's name; "" for none."""
    word = "_".join(path)
    stem, _, last = word.rpartition("_")
    listen = f"{stem}_listen".lstrip("_")
    if last in _PORT_WORDS and listen in model.model_fields:
        return listen
    if len(path) == 2 and word in model.model_fields:
        return word
    if len(path) != 1:
        return ""
    for at, char in enumerate(word):
        section, key = word[:at], word[at + 1 :]
        if char == "_" and key in (known_keys(model, [section]) or ()):
            return f"{section}.{key}"
    return ""


def _elsewhere(model: type[BaseModel], key: str, depth: int) -> str:
    """Where a key belongs that stands `depth` tables deep and is none there; "" if nowhere."""
    if depth:
        here = key in model.model_fields and section_of(model.model_fields[key].annotation) is None
        return f"{key} is a top-level key, not one of a table" * here
    tables = {name: section_of(field.annotation) for name, field in model.model_fields.items()}
    holders = [
        f"{name}.{key}"
        for name, section in tables.items()
        if section is not None
        and get_origin(model.model_fields[name].annotation) is not dict
        and key in section.model_fields
    ]
    return f"{key} is a key of a table: {' or '.join(holders)}" if holders else ""


def section_of(annotation: object) -> type[BaseModel] | None:
    """The model inside an annotation such as `X`, `X | None` or `dict[str, X]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    found = (section_of(argument) for argument in get_args(annotation))
    return next((section for section in found if section is not None), None)


def is_secret(field: FieldInfo) -> bool:
    """Whether the field's value must never be printed."""
    return SecretStr in (field.annotation, *get_args(field.annotation))


def validation_problems(
    error: ValidationError, model: type[BaseModel], origins: Mapping[str, str]
) -> list[str]:
    """One line per error of `error`, with the origin of every key that it involves."""
    return [_problem(details, model, origins) for details in error.errors(include_url=False)]


def origin_of(key: str, origins: Mapping[str, str]) -> str:
    """Where `key` came from: its own origin, or that of the nearest key above or below it."""
    parts = key.split(".")
    for end in range(len(parts), 0, -1):
        if (origin := origins.get(".".join(parts[:end]))) is not None:
            return origin
    below = {origin for name, origin in origins.items() if name.startswith(f"{key}.")}
    return ", ".join(sorted(below)) if below else "not set anywhere"


def _problem(details: ErrorDetails, model: type[BaseModel], origins: Mapping[str, str]) -> str:
    path = [str(part) for part in details["loc"]]
    kind, message = details["type"], details["msg"]
    if kind == "conflict":
        prefix = "".join(f"{part}." for part in path)
        keys = [f"{prefix}{key}" for key in details["ctx"]["keys"]]
        return f"{', '.join(f'{key} ({origin_of(key, origins)})' for key in keys)}: {message}"
    if kind == "extra_forbidden":
        key = ".".join(path)
        origin = origin_of(key, origins)
        return f"{key} ({origin}): {unknown_key(model, path, origin)}"
    field, rest = _field(model, path)
    key = ".".join(path[: len(path) - len(rest)])
    meaning = f" [{field.description}]" if field is not None and field.description else ""
    if kind == "missing":
        return f"{key} ({origin_of(key, origins)}): missing{meaning}"
    if kind in ("model_type", "model_attributes_type", "dict_type"):
        message = "expected a table with keys of its own"
    shown = "" if field is not None and is_secret(field) else f", not {_short(details['input'])}"
    message = message.removeprefix("Value error, ").replace("Input should", "should")
    return f"{key} ({origin_of(key, origins)}): {message}{shown}{meaning}"


def _field(model: type[BaseModel], path: Sequence[str]) -> tuple[FieldInfo | None, Sequence[str]]:
    """The deepest field on `path` and what is left of it.

    Pydantic appends names of its own to a location (union members, `[key]`); they are the rest.
    """
    section: type[BaseModel] | None = model
    field: FieldInfo | None = None
    rest = list(path)
    while rest and section is not None and rest[0] in section.model_fields:
        field = section.model_fields[rest.pop(0)]
        section = section_of(field.annotation)
        if rest and section is not None and get_origin(field.annotation) is dict:
            rest.pop(0)
    return field, rest


def _short(value: Any) -> str:  # noqa: ANN401 - whatever a file held
    if isinstance(value, Mapping):
        return "a table"
    text = str(value) if isinstance(value, Decimal) else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
