"""Where settings come from: flags over environment over TOML file over profile over defaults.

Owns the order, the merge and the origin of every value. Reads one file at most besides the
packaged profile, and no environment but the one passed in.
Fails with `ConfigError` for everything: a missing file, bad TOML, unknown keys or variables.
"""

from __future__ import annotations

import os
import stat
import tomllib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from types import MappingProxyType
from typing import Any

from pydantic import ValidationError
from pydantic_settings import EnvSettingsSource

from sage_fed.environment import (
    CLIENT_VARIABLES,
    ENV_PREFIX,
    client_variable_like,
    of_kubernetes,
)
from sage_fed.settings.credentials import credentials_layer, expand_credentials
from sage_fed.settings.layers import Layer, Values, has, layer_of, merge, put
from sage_fed.settings.model import TOKENS_FILE, Settings
from sage_fed.settings.problems import (
    config_error,
    did_you_mean,
    origin_of,
    unknown_key,
    validation_problems,
)
from sage_fed.settings.table import leaves, plain_leaves
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
