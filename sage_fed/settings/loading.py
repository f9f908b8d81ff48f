"""Where settings come from: flags over environment over TOML file over profile over defaults.

Owns the order, the merge, the origin and the printed form of every value, and the wording of a
mistake: the dotted key, where its value came from, what is wrong and what would be right.
Reads one file at most besides the packaged profile, and no environment but the one passed in.
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
from pydantic_core import ErrorDetails
from pydantic_settings import EnvSettingsSource

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
    given = [_environment_layer(environ, ignored), _flag_layer(flags)]
    if config is not None:
        given.insert(0, _file_layer(config))
    profile, origin = DEFAULT_PROFILE, "default"
    for layer in given:
        if "profile" in layer.values:
            profile, origin = layer.values["profile"], layer.origins.get("profile", "")
    base = Layer({"profile": DEFAULT_PROFILE}, {"profile": "default"})
    merged: Values = {}
    origins: dict[str, str] = {}
    manager = (_state_dir_layer(environ), credentials_layer(environ))
    for layer in (base, *manager, _profile_layer(profile, origin), *given):
        merge(merged, origins, layer)
    expand_credentials(merged, origins, environ)
    _look_into_state_dir(merged, origins)
    try:
        settings = Settings.model_validate(merged)
    except ValidationError as error:
        raise config_error(*validation_problems(error, Settings, origins)) from None
    complete = {key: origins.get(key, "default") for key, _ in leaves(settings)}
    return Effective(settings, MappingProxyType(complete), ignored)


def profile_names() -> tuple[str, ...]:
    """The packaged profiles."""
    return tuple(sorted(path.stem for path in _PROFILES.glob("*.toml")))


def _look_into_state_dir(merged: Values, origins: dict[str, str]) -> None:
    """Refuse a file in its place; name its tokens file, where no other is named."""
    state_dir = merged.get("state_dir")
    if not isinstance(state_dir, (str, Path)) or not state_dir:
        return
    directory = os.path.expanduser(state_dir)  # noqa: PTH111 - it never raises
    try:
        usable = stat.S_ISDIR(os.stat(directory).st_mode)  # noqa: PTH116 - no Path of a bad text
    except NotADirectoryError:
        usable = False
    except (OSError, ValueError):
        # One that nobody may look into is the daemon's or the command's to complain of.
        usable = True
    if not usable:
        # Else whichever file is looked for first would be blamed.
        raise config_error(
            f"state_dir ({origin_of('state_dir', origins)}): expected a directory, there or yet "
            f"to be made; {directory} is, or is below, a file"
        )
    auth, path = merged.get("auth", {}), Path(directory) / TOKENS_FILE
    if not isinstance(auth, dict) or auth.get("tokens_file") not in (None, ""):
        return
    if os.path.isfile(path):  # noqa: PTH113 - it never raises
        put(merged, ("auth", "tokens_file"), path)
        origins["auth.tokens_file"] = "found in state_dir"


def _flag_layer(flags: Mapping[str, Any]) -> Layer:
    values: Values = {}
    for key, value in flags.items():
        if value is None:
            continue
        put(values, key.split("."), value)
    return layer_of(values, "flag")


def _environment_layer(environ: Mapping[str, str], ignored: Collection[str]) -> Layer:
    names = {
        name.lower(): name
        for name in environ
        if name.startswith(ENV_PREFIX) and name not in CLIENT_VARIABLES and name not in ignored
    }
    source = EnvSettingsSource(Settings)
    source.env_vars = {lower: environ[name] for lower, name in names.items()}
    values = source()
    origins: dict[str, str] = {}
    problems: list[str] = []
    for lower, name in sorted(names.items()):
        path = lower.removeprefix(ENV_PREFIX.lower()).split("__")
        if not has(values, path):
            # Pydantic's source skips what it does not know, so a typo would have no effect.
            like = client_variable_like(name)
            what = (
                f"unknown; did you mean {like}?"
                if like
                else unknown_key(Settings, path, f"environment {name}")
            )
            problems.append(f"{'.'.join(path)} (environment {name}): {what}")
        origins[".".join(path)] = f"environment {name}"
    if problems:
        raise config_error(*problems)
    return Layer(values, origins)


def _file_layer(path: Path) -> Layer:
    what = f"configuration file {path}"
    try:
        text = read_trusted("configuration file", path)
    except OSError as error:
        raise os_error(f"{what}: cannot be read, expected a TOML file", error) from None
    return layer_of(_parse_toml(text, what), f"file {path}")


def _profile_layer(name: object, origin: str) -> Layer:
    known = profile_names()
    if name not in known:
        raise config_error(
            f"profile ({origin}): no profile {name!r}; {did_you_mean(str(name), known)}"
        )
    text = (_PROFILES / f"{name}.toml").read_bytes()
    return layer_of(_parse_toml(text, f"profile {name}"), f"profile {name}")


def _state_dir_layer(environ: Mapping[str, str]) -> Layer:
    if systemd := environ.get("STATE_DIRECTORY"):
        # systemd lists several directories with colons; the unit's first one is ours.
        path, origin = Path(systemd.split(":")[0]), "environment STATE_DIRECTORY"
    elif (xdg := environ.get("XDG_STATE_HOME")) and Path(xdg).is_absolute():
        path, origin = Path(xdg) / "sage-fed", "environment XDG_STATE_HOME"
    else:
        home = Path(environ["HOME"]) if environ.get("HOME") else Path.home()
        path, origin = home / ".local" / "state" / "sage-fed", "default"
    return Layer({"state_dir": path}, {"state_dir": origin})


def _parse_toml(text: bytes, what: str) -> Values:
    try:
        # Decimal keeps an amount exactly as it was written.
        return tomllib.loads(text.decode(), parse_float=Decimal)
    except UnicodeDecodeError:
        raise config_error(f"{what}: not UTF-8 text; expected a TOML file") from None
    except tomllib.TOMLDecodeError as error:
        raise config_error(f"{what}: not valid TOML: {error}") from None


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


CREDENTIALS = "CREDENTIALS_DIRECTORY"
"""Where systemd puts the files of LoadCredential; the paths below may start with it."""

_CREDENTIALS = {
    "tokens.toml": "auth.tokens_file",
    "tls.crt": "tls.certificate",
    "tls.key": "tls.key",
    "client-ca.crt": "tls.client_ca",
}
"""Names of the credentials that the unit asks for, and the keys that take their paths."""


def credentials_layer(environ: Mapping[str, str]) -> Layer:
    """The secrets that systemd hands to this unit alone, those of them that it was given."""
    values: Values = {}
    if directory := environ.get(CREDENTIALS):
        for name, key in _CREDENTIALS.items():
            path = Path(directory) / name
            try:
                given = path.is_file()
            except OSError as error:
                # Without its tokens the daemon would be open to more callers than it should.
                raise config_error(
                    f"{key} (environment {CREDENTIALS}): {path}: {error.strerror}"
                ) from None
            if given:
                put(values, key.split("."), path)
    return layer_of(values, f"environment {CREDENTIALS}")


def expand_credentials(
    merged: Values, origins: Mapping[str, str], environ: Mapping[str, str]
) -> None:
    """Replace a leading `$CREDENTIALS_DIRECTORY` in the paths of secrets; nowhere else."""
    for key in _CREDENTIALS.values():
        section, name = key.split(".")
        table: Any = merged.get(section)
        path = table.get(name) if isinstance(table, dict) else None
        if not isinstance(path, str):
            continue
        for written in (f"${CREDENTIALS}/", f"${{{CREDENTIALS}}}/"):
            if not path.startswith(written):
                continue
            if not environ.get(CREDENTIALS):
                raise config_error(
                    f"{key} ({origin_of(key, origins)}): ${CREDENTIALS} is not set; systemd sets "
                    "it for a unit with LoadCredential=, elsewhere give the whole path"
                )
            table[name] = f"{environ[CREDENTIALS]}/{path.removeprefix(written)}"


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
