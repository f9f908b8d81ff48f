"""Where settings come from: flags over environment over TOML file over profile over defaults.

Owns the order, the merge and the origin of every value. Reads one file at most besides the
packaged profile, and no environment but the one passed in.
Fails with `ConfigError` for everything: a missing file, bad TOML, unknown keys or variables.
"""

from __future__ import annotations

import os
import stat
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from types import MappingProxyType
from typing import Any

from pydantic import ValidationError
from pydantic_settings import EnvSettingsSource

from sage_fed.settings.model import TOKENS_FILE, Settings
from sage_fed.settings.problems import (
    config_error,
    did_you_mean,
    origin_of,
    unknown_key,
    validation_problems,
)
from sage_fed.settings.table import leaves, plain_leaves

DEFAULT_PROFILE = "qwen2.5"
ENV_PREFIX = "SAGE_FED_"
NOT_SETTINGS = frozenset(
    {
        "SAGE_FED_CONFIG",
        "SAGE_FED_ADDRESS",
        "SAGE_FED_TOKEN",
        "SAGE_FED_TOKEN_FILE",
        "SAGE_FED_TLS_CA",
        "SAGE_FED_TLS_CERT",
        "SAGE_FED_TLS_KEY",
        "SAGE_FED_TLS_NAME",
    }
)
"""Variables that are not keys: where the file is, and what a client uses."""

CREDENTIALS = "CREDENTIALS_DIRECTORY"
"""Where systemd puts the files of LoadCredential; the paths below may start with it."""

_CREDENTIALS = {
    "tokens.toml": "auth.tokens_file",
    "tls.crt": "tls.certificate",
    "tls.key": "tls.key",
    "client-ca.crt": "tls.client_ca",
}
"""Names of the credentials that the unit asks for, and the keys that take their paths."""

_PROFILES = Path(__file__).parent.parent / "profiles"

Values = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Effective:
    """Settings that hold, with the origin of each dotted key.

    An origin reads `flag`, `environment SAGE_FED_DEVICE`, `file config.toml`, `profile demo`,
    `found in state_dir` or `default`.
    """

    settings: Settings
    origins: Mapping[str, str]

    def rows(self) -> tuple[tuple[str, str, str], ...]:
        """(key, value, origin) of every key, secrets masked; what `sage-fed config` prints."""
        return tuple((key, value, self.origins[key]) for key, value in leaves(self.settings))

    def objects(self) -> dict[str, dict[str, object]]:
        """The same for a program: by key, the value as JSON has it and its origin."""
        return {
            key: {"value": value, "origin": self.origins[key]}
            for key, value in plain_leaves(self.settings)
        }


@dataclass(frozen=True, slots=True)
class _Layer:
    """Nested values of one source and the origin of each dotted leaf."""

    values: Values
    origins: Mapping[str, str]


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
    given = [_environment_layer(environ), _flag_layer(flags)]
    if config is not None:
        given.insert(0, _file_layer(config))
    profile, origin = DEFAULT_PROFILE, "default"
    for layer in given:
        if "profile" in layer.values:
            profile, origin = layer.values["profile"], layer.origins.get("profile", "")
    base = _Layer({"profile": DEFAULT_PROFILE}, {"profile": "default"})
    merged: Values = {}
    origins: dict[str, str] = {}
    manager = (_state_dir_layer(environ), _credentials_layer(environ))
    for layer in (base, *manager, _profile_layer(profile, origin), *given):
        _merge(merged, origins, layer)
    _expand_credentials(merged, origins, environ)
    _look_into_state_dir(merged, origins)
    try:
        settings = Settings.model_validate(merged)
    except ValidationError as error:
        raise config_error(*validation_problems(error, Settings, origins)) from None
    complete = {key: origins.get(key, "default") for key, _ in leaves(settings)}
    return Effective(settings, MappingProxyType(complete))


def profile_names() -> tuple[str, ...]:
    """The packaged profiles."""
    return tuple(sorted(path.stem for path in _PROFILES.glob("*.toml")))


def _expand_credentials(
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
        _put(merged, ("auth", "tokens_file"), path)
        origins["auth.tokens_file"] = "found in state_dir"


def _flag_layer(flags: Mapping[str, Any]) -> _Layer:
    values: Values = {}
    for key, value in flags.items():
        if value is None:
            continue
        _put(values, key.split("."), value)
    return _layer(values, "flag")


def _environment_layer(environ: Mapping[str, str]) -> _Layer:
    names = {
        name.lower(): name
        for name in environ
        if name.startswith(ENV_PREFIX) and name not in NOT_SETTINGS
    }
    source = EnvSettingsSource(Settings)
    source.env_vars = {lower: environ[name] for lower, name in names.items()}
    values = source()
    origins: dict[str, str] = {}
    problems: list[str] = []
    for lower, name in sorted(names.items()):
        path = lower.removeprefix(ENV_PREFIX.lower()).split("__")
        if not _has(values, path):
            # Pydantic's source skips what it does not know, so a typo would have no effect.
            problems.append(f"{'.'.join(path)} (environment {name}): {unknown_key(Settings, path)}")
        origins[".".join(path)] = f"environment {name}"
    if problems:
        raise config_error(*problems)
    return _Layer(values, origins)


def _file_layer(path: Path) -> _Layer:
    return _layer(_read_toml(path, f"configuration file {path}"), f"file {path}")


def _profile_layer(name: object, origin: str) -> _Layer:
    known = profile_names()
    if name not in known:
        raise config_error(
            f"profile ({origin}): no profile {name!r}; {did_you_mean(str(name), known)}"
        )
    return _layer(_read_toml(_PROFILES / f"{name}.toml", f"profile {name}"), f"profile {name}")


def _state_dir_layer(environ: Mapping[str, str]) -> _Layer:
    if systemd := environ.get("STATE_DIRECTORY"):
        # systemd lists several directories with colons; the unit's first one is ours.
        path, origin = Path(systemd.split(":")[0]), "environment STATE_DIRECTORY"
    elif (xdg := environ.get("XDG_STATE_HOME")) and Path(xdg).is_absolute():
        path, origin = Path(xdg) / "sage-fed", "environment XDG_STATE_HOME"
    else:
        home = Path(environ["HOME"]) if environ.get("HOME") else Path.home()
        path, origin = home / ".local" / "state" / "sage-fed", "default"
    return _Layer({"state_dir": path}, {"state_dir": origin})


def _credentials_layer(environ: Mapping[str, str]) -> _Layer:
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
                _put(values, key.split("."), path)
    return _layer(values, f"environment {CREDENTIALS}")


def _read_toml(path: Path, what: str) -> Values:
    try:
        with path.open("rb") as file:
            # Decimal keeps an amount exactly as it was written.
            return tomllib.load(file, parse_float=Decimal)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise config_error(f"{what}: cannot be read: {reason}; expected a TOML file") from None
    except tomllib.TOMLDecodeError as error:
        raise config_error(f"{what}: not valid TOML: {error}") from None


def _layer(values: Values, origin: str) -> _Layer:
    return _Layer(values, {".".join(path): origin for path, _ in _walk(values)})


def _walk(values: Values, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for name, value in values.items():
        if isinstance(value, dict) and value:
            yield from _walk(value, (*path, name))
        else:
            yield (*path, name), value


def _has(values: object, path: list[str]) -> bool:
    for part in path:
        if not isinstance(values, dict) or part not in values:
            return False
        values = values[part]
    return True


def _merge(merged: Values, origins: dict[str, str], layer: _Layer) -> None:
    for tier in ("tactical", "strategic"):
        old, new = (values.get(tier) for values in (merged, layer.values))
        if not isinstance(old, dict) or not isinstance(new, dict):
            continue
        if "model" in new and new["model"] != old.get("model"):
            # A revision belongs to its model: another model starts without the old one's.
            old.pop("revision", None)
            origins.pop(f"{tier}.revision", None)
    for path, value in _walk(layer.values):
        if _put(merged, path, value):
            key = ".".join(path)
            origins[key] = origin_of(key, layer.origins)


def _put(values: Values, path: Sequence[str], value: object) -> bool:
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
