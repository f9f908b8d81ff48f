"""Where settings come from: flags over environment over TOML file over profile over defaults.

Owns the order, the merge, the origin and the printed form of every value, and the wording of a
mistake: the dotted key, where its value came from, what is wrong and what would be right.
Reads one file at most besides the packaged profile, and no environment but the one passed in.
Pydantic checks the values; their sources are ours
([why so](../../docs/decisions/0042-sources-of-settings.md)).
Never repeats the value of an unknown or a secret key.
Fails with `ConfigError` for everything: a missing file, bad TOML, unknown keys or variables.
"""

from __future__ import annotations

import difflib
import enum
import os
import stat
import tomllib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from types import MappingProxyType
from typing import Any, get_args, get_origin

from pydantic import BaseModel, SecretStr, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails, to_jsonable_python

from sage_fed.core import Address, UnixSocket, escaped
from sage_fed.environment import (
    CLIENT_VARIABLES,
    ENV_PREFIX,
    client_variable_like,
    of_kubernetes,
)
from sage_fed.errors import ConfigError
from sage_fed.settings.settings import TOKENS_FILE, Settings
from sage_fed.settings.values import format_size
from sage_fed.trusted_files import os_error, read_trusted

DEFAULT_PROFILE = "qwen2.5"
_PROFILES = Path(__file__).parent.parent / "profiles"

CREDENTIALS = "CREDENTIALS_DIRECTORY"
"""Where systemd puts the files of LoadCredential; the paths below may start with it."""

_CREDENTIALS = {
    "tokens.toml": ("auth", "tokens_file"),
    "tls.crt": ("tls", "certificate"),
    "tls.key": ("tls", "key"),
    "client-ca.crt": ("tls", "client_ca"),
}
"""Names of the credentials that the unit asks for, and the keys that take their paths."""

_MOST_LINES = 10
"""Problems that one error tells; more are another program's file, or one mistake in all of them."""

_PORT_WORDS = ("port", "host", "addr", "address", "bind")
"""What other programs call a part, or all, of where they listen."""

_MOST_CHOICES = 8
"""Names that fit into a line."""

_TOKENS_KEY = ("auth", "tokens_file")

Layer = dict[tuple[str, ...], tuple[Any, str]]
"""The values of one source, each with its origin, by the path of its key; an empty table is one."""


@dataclass(frozen=True, slots=True)
class Effective:
    """Settings that hold, with the origin of each dotted key.

    An origin reads `flag`, `environment SAGE_FED_DEVICE`, `file config.toml`, `profile demo`,
    `found in state_dir` or `default`.
    `ignored` are the variables that look like settings and are Kubernetes's.
    """

    settings: Settings
    origins: Mapping[str, str]
    ignored: tuple[str, ...] = ()

    def rows(self) -> tuple[tuple[str, str, str], ...]:
        """(key, value, origin) of every key, secrets masked; what `sage-fed config` prints."""
        return tuple((key, value, self.origins[key]) for key, value in leaves(self.settings))

    def objects(self) -> dict[str, dict[str, object]]:
        """The same for a program: by key, the value as JSON has it and its origin."""
        return {
            key: {"value": value, "origin": self.origins[key]}
            for key, value in plain_leaves(self.settings)
        }


def load_settings(
    flags: Mapping[str, Any], environ: Mapping[str, str], config: Path | None
) -> Effective:
    """Layer every source and validate the result.

    Args:
        flags: dotted key -> value; None means that the flag was not given.
        environ: the process environment; `SAGE_FED_A__B` sets key `a.b`.
        config: a TOML file; without it, `SAGE_FED_CONFIG` may name one.

    Raises:
        ConfigError: naming each offending key, its origin, what is wrong and what is right.
    """
    if config is None and environ.get("SAGE_FED_CONFIG"):
        config = Path(environ["SAGE_FED_CONFIG"])
    ignored = of_kubernetes(environ)
    given = (
        _file_layer(config) if config is not None else {},
        _environment_layer(environ, ignored),
        {
            tuple(key.split(".")): (value, "flag")
            for key, value in flags.items()
            if value is not None
        },
    )
    profile = (DEFAULT_PROFILE, "default")
    for layer in given:
        profile = layer.get(("profile",), profile)
    merged: Layer = {("profile",): (DEFAULT_PROFILE, "default")}
    manager = (_state_dir_layer(environ), _credentials_layer(environ))
    for layer in (*manager, _profile_layer(*profile), *given):
        _lay(merged, layer)
    _expand_credentials(merged, environ)
    _look_into_state_dir(merged)
    origins = {".".join(path): origin for path, (_, origin) in merged.items()}
    try:
        settings = Settings.model_validate(_nested(merged))
    except ValidationError as error:
        raise config_error(*validation_problems(error, Settings, origins)) from None
    complete = {key: origins.get(key, "default") for key, _ in leaves(settings)}
    return Effective(settings, MappingProxyType(complete), ignored)


def profile_names() -> tuple[str, ...]:
    """The packaged profiles."""
    return tuple(sorted(path.stem for path in _PROFILES.glob("*.toml")))


def _lay(merged: Layer, layer: Layer) -> None:
    """Lay one more layer over what is merged already; an empty table takes nothing away."""
    for path, found in layer.items():
        below = [known for known in merged if known[: len(path)] == path]
        if found[0] == {} and below:
            continue
        if path[1:] == ("model",) and found[0] != merged.get(path, (None, ""))[0]:
            # A revision belongs to its model: another model starts without the old one's.
            revision = (path[0], "revision")
            if revision not in layer:
                merged.pop(revision, None)
        for known in (*below, *(path[:depth] for depth in range(1, len(path)))):
            merged.pop(known, None)
        merged[path] = found


def _flat(values: Mapping[str, Any], origin: str, above: tuple[str, ...] = ()) -> Layer:
    layer: Layer = {}
    for name, value in values.items():
        path = (*above, name)
        if isinstance(value, dict) and value:
            layer |= _flat(value, origin, path)
        else:
            layer[path] = (value, origin)
    return layer


def _nested(layer: Layer) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for (*tables, name), (value, _) in layer.items():
        table = values
        for part in tables:
            table = table.setdefault(part, {})
        table[name] = value
    return values


def _look_into_state_dir(merged: Layer) -> None:
    """Refuse a file in its place; name its tokens file, where no other is named."""
    state_dir, origin = merged.get(("state_dir",), (None, ""))
    if not isinstance(state_dir, (str, Path)) or not state_dir:
        return
    directory = os.path.expanduser(state_dir)  # noqa: PTH111 - it never raises
    try:
        usable = stat.S_ISDIR(os.stat(directory).st_mode)  # noqa: PTH116 - no Path of a bad text
    except NotADirectoryError:
        usable = False
    except (OSError, ValueError):
        # One that cannot be looked into is the daemon's or the command's to complain of.
        usable = True
    if not usable:
        # Else the file that is looked for first would be blamed.
        raise config_error(
            f"state_dir ({origin}): expected a directory, there or yet to be made; {directory} is, "
            "or is below, a file"
        )
    path = Path(directory) / TOKENS_FILE
    unnamed = merged.get(_TOKENS_KEY, (None, ""))[0] in (None, "")
    # A text in the place of the whole table is refused later, and must stay for that.
    replaced = merged.get(("auth",), ({}, ""))[0] != {}
    if unnamed and not replaced and os.path.isfile(path):  # noqa: PTH113 - it never raises
        _lay(merged, {_TOKENS_KEY: (path, "found in state_dir")})


def _credentials_layer(environ: Mapping[str, str]) -> Layer:
    """The secrets that systemd hands to this unit alone, those of them that it was given."""
    origin, layer = f"environment {CREDENTIALS}", Layer()
    if directory := environ.get(CREDENTIALS):
        for name, key in _CREDENTIALS.items():
            path = Path(directory) / name
            try:
                given = path.is_file()
            except OSError as error:
                # Without its tokens the daemon would be open to more callers than it should.
                raise config_error(
                    f"{'.'.join(key)} ({origin}): {path}: {error.strerror}"
                ) from None
            if given:
                layer[key] = (path, origin)
    return layer


def _expand_credentials(merged: Layer, environ: Mapping[str, str]) -> None:
    """Replace a leading `$CREDENTIALS_DIRECTORY` in the paths of secrets; nowhere else."""
    for key in _CREDENTIALS.values():
        path, origin = merged.get(key, (None, ""))
        for written in (f"${CREDENTIALS}/", f"${{{CREDENTIALS}}}/"):
            if not isinstance(path, str) or not path.startswith(written):
                continue
            if not environ.get(CREDENTIALS):
                raise config_error(
                    f"{'.'.join(key)} ({origin}): ${CREDENTIALS} is not set; systemd sets "
                    "it for a unit with LoadCredential=, elsewhere give the whole path"
                )
            merged[key] = (f"{environ[CREDENTIALS]}/{path.removeprefix(written)}", origin)


def _environment_layer(environ: Mapping[str, str], ignored: Collection[str]) -> Layer:
    layer: Layer = {}
    for name in sorted(environ):
        if name.startswith(ENV_PREFIX) and name not in CLIENT_VARIABLES and name not in ignored:
            path = tuple(name.removeprefix(ENV_PREFIX).lower().split("__"))
            layer[path] = (environ[name], f"environment {name}")
    problems: list[str] = []
    for path, (_, origin) in layer.items():
        what = unknown_key(Settings, path, origin)
        if what and (like := client_variable_like(origin.removeprefix("environment "))):
            what = f"unknown; did you mean {like}?"
        if any(path[:depth] in layer for depth in range(1, len(path))):
            what = "a variable for the whole table is set too; set its keys one by one"
        if what:
            problems.append(f"{'.'.join(path)} ({origin}): {what}")
    if problems:
        raise config_error(*problems)
    return layer


def _file_layer(path: Path) -> Layer:
    what = f"configuration file {path}"
    try:
        text = read_trusted("configuration file", path)
    except OSError as error:
        raise os_error(f"{what}: cannot be read, expected a TOML file", error) from None
    return _toml_layer(text, what, f"file {path}")


def _profile_layer(name: object, origin: str) -> Layer:
    known = profile_names()
    if name not in known:
        raise config_error(
            f"profile ({origin}): no profile {name!r}; {did_you_mean(str(name), known)}"
        )
    text = (_PROFILES / f"{name}.toml").read_bytes()
    return _toml_layer(text, f"profile {name}", f"profile {name}")


def _state_dir_layer(environ: Mapping[str, str]) -> Layer:
    if systemd := environ.get("STATE_DIRECTORY"):
        # systemd lists several directories with colons; the unit's first one is ours.
        path, origin = Path(systemd.split(":")[0]), "environment STATE_DIRECTORY"
    elif (xdg := environ.get("XDG_STATE_HOME")) and Path(xdg).is_absolute():
        path, origin = Path(xdg) / "sage-fed", "environment XDG_STATE_HOME"
    else:
        home = Path(environ["HOME"]) if environ.get("HOME") else Path.home()
        path, origin = home / ".local" / "state" / "sage-fed", "default"
    return {("state_dir",): (path, origin)}


def _toml_layer(text: bytes, what: str, origin: str) -> Layer:
    try:
        # Decimal keeps an amount exactly as it was written.
        return _flat(tomllib.loads(text.decode(), parse_float=Decimal), origin)
    except UnicodeDecodeError:
        raise config_error(f"{what}: not UTF-8 text; expected a TOML file") from None
    except tomllib.TOMLDecodeError as error:
        raise config_error(f"{what}: not valid TOML: {error}") from None


def leaves(model: BaseModel) -> Iterator[tuple[str, str]]:
    """Dotted key and printed value of every leaf of `model`, in the order of declaration."""
    return ((key, _printed(key, value)) for key, value in _leaves(model, ""))


def plain_leaves(model: BaseModel) -> Iterator[tuple[str, object]]:
    """The same with values as JSON has them: sizes in bytes and amounts in ATP are numbers."""
    return ((key, _plain(value)) for key, value in _leaves(model, ""))


def _leaves(value: object, key: str) -> Iterator[tuple[str, object]]:
    below: Iterable[tuple[Any, object]] = ()
    if isinstance(value, (BaseModel, dict)):
        below = value if isinstance(value, BaseModel) else value.items()
    empty = True
    for name, item in below:
        empty = False
        yield from _leaves(item, f"{key}.{name}" if key else name)
    if empty:
        yield key, value


def _plain(value: object) -> object:
    if isinstance(value, Decimal):
        # Exact: an amount has 15 digits at most.
        return int(value) if value == value.to_integral_value() else float(value)
    return str(value) if isinstance(value, (Address, UnixSocket)) else to_jsonable_python(value)


def _printed(key: str, value: object) -> str:
    """The printed form of one value: sizes with a unit, nothing as `-`; a secret masks itself."""
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


def config_error(*problems: str) -> ConfigError:
    """One error for all `problems`, each on a line of its own."""
    # A key is printed as another's file had it: it must not repaint the operator's terminal.
    lines = [escaped(problem) for problem in problems]
    if len(lines) == 1:
        return ConfigError(lines[0])
    if (more := len(lines) - _MOST_LINES) > 0:
        lines[_MOST_LINES:] = [f"and {more} more"]
    return ConfigError("\n  ".join((f"{len(problems)} settings cannot be used:", *lines)))


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The tail of a message about `word`: the nearest known one, else the choice if it is small."""
    choice = sorted(known)
    near = difflib.get_close_matches(word, choice, n=1, cutoff=0.6)
    if near:
        return f"did you mean {near[0]}?"
    if len(choice) > _MOST_CHOICES:
        return "see `sage-fed config` for those that there are"
    return f"known: {', '.join(choice)}" if choice else "nothing can be set here"


def unknown_key(model: type[BaseModel], path: Sequence[str], origin: str) -> str:
    """What to say about the first part of `path`, from `origin`, that names no key; "" for none."""
    _, section, depth = _followed(model, path)
    if depth == len(path):
        return ""
    if meant := _respelled(model, path):
        if origin.startswith("environment "):
            meant = ENV_PREFIX + meant.replace(".", "__").upper()
        return f"unknown key; did you mean {meant}?"
    if elsewhere := _elsewhere(model, path[depth], depth):
        return f"unknown key; {elsewhere}"
    prefix = "".join(f"{part}." for part in path[:depth])
    known = [f"{prefix}{name}" for name in section.model_fields] if section is not None else []
    return f"unknown key; {did_you_mean(f'{prefix}{path[depth]}', known)}"


def _followed(
    model: type[BaseModel], path: Sequence[str]
) -> tuple[FieldInfo | None, type[BaseModel] | None, int]:
    """Follow `path` while it names keys: the last field, the table there, and how far it went.

    Pydantic appends names of its own to a location (union members, `[key]`); they name no key.
    """
    field: FieldInfo | None = None
    section: type[BaseModel] | None = model
    depth = 0
    while depth < len(path) and section is not None and path[depth] in section.model_fields:
        field = section.model_fields[path[depth]]
        section = section_of(field.annotation)
        depth += 1
        if depth < len(path) and section is not None and get_origin(field.annotation) is dict:
            depth += 1  # any name is allowed there (accounts)
    return field, section, depth


def _respelled(model: type[BaseModel], path: Sequence[str]) -> str:
    """The key that `path` is with a dot for an underscore, or as a port's name; "" for none."""
    word = "_".join(path)
    stem, _, last = word.rpartition("_")
    listen = f"{stem}_listen".lstrip("_")
    if last in _PORT_WORDS and listen in model.model_fields:
        return listen
    if len(path) == 2 and word in model.model_fields:
        return word
    keys = (f"{name}.{key}" for name, table in _tables(model) for key in table.model_fields)
    return next((key for key in keys if len(path) == 1 and key.replace(".", "_") == word), "")


def _elsewhere(model: type[BaseModel], key: str, depth: int) -> str:
    """Where a key belongs that stands `depth` tables deep and is none there; "" if nowhere."""
    if depth:
        here = key in model.model_fields and section_of(model.model_fields[key].annotation) is None
        return f"{key} is a top-level key, not one of a table" * here
    holders = [f"{name}.{key}" for name, table in _tables(model) if key in table.model_fields]
    return f"{key} is a key of a table: {' or '.join(holders)}" if holders else ""


def _tables(model: type[BaseModel]) -> Iterator[tuple[str, type[BaseModel]]]:
    """The tables directly below, without those of any name (accounts)."""
    for name, field in model.model_fields.items():
        section = section_of(field.annotation)
        if section is not None and get_origin(field.annotation) is not dict:
            yield name, section


def section_of(annotation: object) -> type[BaseModel] | None:
    """The model inside an annotation such as `X`, `X | None` or `dict[str, X]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    found = (section_of(argument) for argument in get_args(annotation))
    return next((section for section in found if section is not None), None)


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
    field, _, depth = _followed(model, path)
    key = ".".join(path[:depth])
    meaning = f" [{field.description}]" if field is not None and field.description else ""
    if kind == "missing":
        return f"{key} ({origin_of(key, origins)}): missing{meaning}"
    if kind in ("model_type", "model_attributes_type", "dict_type"):
        message = "expected a table with keys of its own"
    secret = field is not None and SecretStr in (field.annotation, *get_args(field.annotation))
    shown = "" if secret else f", not {_short(details['input'])}"
    message = message.removeprefix("Value error, ").replace("Input should", "should")
    return f"{key} ({origin_of(key, origins)}): {message}{shown}{meaning}"


def _short(value: Any) -> str:  # noqa: ANN401 - whatever a file held
    if isinstance(value, Mapping):
        return "a table"
    text = str(value) if isinstance(value, Decimal) else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
