"""What an installation as a service consists of: which files, with what in them.

Owns the choice of the drop-ins for a machine, the name of an instance and where each file goes.
Pure: reads the packaged units and nothing else; who applies a plan is elsewhere (`cli`).
Fails with `ValueError` for a name that is none.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

UNITS = Path(__file__).parent / "units"
"""The unit and its drop-ins, as they are packaged."""

BACKOFF_SINCE = 254
"""The first systemd that knows RestartSteps."""

_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,31}")
_ENVIRONMENT = re.compile(r"^Environment=SAGE_FED_(?P<key>\w+)=(?P<value>.*)$", re.MULTILINE)
_HIDDEN = ("/root", "/home", "/run/user", "/tmp", "/var/tmp")  # noqa: S108 - what systemd hides


class Machine(enum.Enum):
    """What the service runs on: decides the device, its drop-in and the first configuration."""

    CPU = "cpu"
    CUDA = "cuda"
    JETSON = "jetson"


class Action(enum.Enum):
    """What applying a plan does to one file."""

    CREATE = "create"
    UPDATE = "update"
    UNCHANGED = "unchanged"
    KEEP = "keep"
    """It is the operator's: there already, and never overwritten."""
    REMOVE = "remove"


@dataclass(frozen=True, slots=True)
class PlannedFile:
    """One file, absolute on the machine; `operators` ones are only ever created."""

    path: Path
    content: str
    operators: bool = False

    def action(self, found: str | None) -> Action:
        """What is to be done where the file holds `found`; None: it is not there."""
        if found is None:
            return Action.CREATE
        if self.operators:
            return Action.KEEP
        return Action.UNCHANGED if found == self.content else Action.UPDATE


@dataclass(frozen=True, slots=True)
class Installation:
    """Everything that an instance has on a machine."""

    unit: str
    """As `systemctl` takes it: `sage-fed` or `sage-fed@second`."""
    files: tuple[PlannedFile, ...]
    owned: tuple[Path, ...]
    """What an uninstallation removes: our files, whatever the machine was."""
    left: tuple[Path, ...]
    """What it leaves: the operator's configuration, the books, the cache."""


def installation(
    machine: Machine,
    *,
    instance: str = "",
    profile: str = "",
    program: Path = Path("/opt/sage-fed/bin/sage-fed"),
    systemd_version: int = 0,
) -> Installation:
    """Plan an instance; the empty one is the machine's first.

    Args:
        machine: what it runs on.
        instance: a name for a further one.
        profile: of the settings in the first configuration; empty chooses by the machine.
        program: the absolute path of the command that the service runs.
        systemd_version: 0 where unknown; older ones are spared what they do not know.

    Raises:
        ValueError: a name that cannot be an instance's.
    """
    if instance and not _NAME.fullmatch(instance):
        raise ValueError("expected 1 to 32 lower-case letters, digits, - or _")
    unit = f"sage-fed@{instance}" if instance else "sage-fed"
    system = Path("/etc/systemd/system")
    unit_file = system / ("sage-fed@.service" if instance else "sage-fed.service")
    own = system / f"{unit}.service.d"
    drop_ins = {
        "10-location.conf": _location(program),
        "20-backoff.conf": _packaged("backoff") if systemd_version >= BACKOFF_SINCE else "",
        "30-machine.conf": _packaged(machine.value),
        "40-instance.conf": _packaged("instance") if instance else "",
    }
    configuration = Path("/etc") / unit / "config.toml"
    files = [PlannedFile(unit_file, (UNITS / "sage-fed.service").read_text(encoding="utf-8"))]
    files += [PlannedFile(own / name, text) for name, text in drop_ins.items() if text]
    files.append(
        PlannedFile(
            configuration,
            _configuration(profile or _profile(machine), unit, drop_ins),
            operators=True,
        )
    )
    # The template belongs to all instances: the last one to go leaves it, and it does no harm.
    owned = [own / name for name in drop_ins] + ([] if instance else [unit_file])
    left = (configuration, Path("/var/lib") / unit, Path("/var/cache/sage-fed"))
    return Installation(unit, tuple(files), tuple(owned), left)


def unreachable(paths: Sequence[Path]) -> Path | None:
    """The first of `paths`, absolute and resolved, that the service's sandbox hides or forbids."""
    for path in paths:
        if any(path.is_relative_to(hidden) for hidden in _HIDDEN):
            return path
        if not all(parent.stat().st_mode & 0o001 for parent in path.parents):
            return path
    return None


def _packaged(name: str) -> str:
    return (UNITS / "drop-ins" / f"{name}.conf").read_text(encoding="utf-8")


def _location(program: Path) -> str:
    if program == Path("/opt/sage-fed/bin/sage-fed"):
        return ""
    command = str(program).replace("%", "%%")
    return (
        "# Where this machine has the package.\n[Service]\nExecStart=\n"
        f'ExecStart="{command}" serve\n'
    )


def _profile(machine: Machine) -> str:
    return {Machine.CPU: "demo", Machine.CUDA: "qwen2.5", Machine.JETSON: "jetson-thor"}[machine]


def _overruled(unit: str, drop_ins: Mapping[str, str]) -> str:
    """The lines that say which settings the unit has already: its environment wins over a file."""
    lines = [
        f"#   {match['key'].lower().replace('__', '.')} = {match['value']} ({name})\n"
        for name, text in drop_ins.items()
        for match in _ENVIRONMENT.finditer(text)
    ]
    if not lines:
        return ""
    return (
        f"# The unit sets these, and wins over this file; `systemctl edit {unit}` changes them\n"
        "# (Environment=SAGE_FED_...):\n" + "".join(lines)
    )


def _configuration(profile: str, unit: str, drop_ins: Mapping[str, str]) -> str:
    return (
        "# sage-fed's settings on this machine; yours: no installation overwrites it.\n"
        "# `sage-fed config --config FILE` prints all of them, and where each value comes from.\n"
        f"{_overruled(unit, drop_ins)}"
        f'profile = "{profile}"\n'
    )
