"""The files of an installation as a service, compared with a machine and put there.

Owns the choice of the drop-ins for a machine, the name of an instance, where each file goes, and
reading and writing below one root: `/`, or the directory of an image that is being built.
A file is written beside its place and renamed, so systemd never reads half of one.
Fails with `ValueError` for a bad instance name and with `OSError`, which names the file.
"""

from __future__ import annotations

import enum
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sage_fed.trusted_files import replace_file

UNITS = Path(__file__).parent / "units"
"""The unit and its drop-ins, as they are packaged."""

BACKOFF_SINCE = 254
"""The first systemd that knows RestartSteps."""

SYSTEM = Path("/etc/systemd/system")
"""Where an operator's units are."""

PORTS_FILE = "40-instance.conf"
"""The drop-in of a further instance that has its ports."""

_HOST, _PORT, _METRICS_PORT = "127.0.0.1", 6590, 9659
"""Where the first instance listens; the further ones count on from there."""

_MAX_PLACES = 1000

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
    overruled: tuple[str, ...]
    """The settings that the unit's environment decides, whatever the configuration says."""
    template: Path | None
    """The unit of all further instances, which goes with the last of them."""


def installation(
    machine: Machine,
    *,
    instance: str = "",
    profile: str = "",
    program: Path = Path("/opt/sage-fed/bin/sage-fed"),
    systemd_version: int = 0,
    place: int = 1,
) -> Installation:
    """Plan an instance; the empty one is the machine's first.

    Args:
        machine: what it runs on.
        instance: a name for a further one.
        profile: of the settings in the first configuration; empty chooses by the machine.
        program: the absolute path of the command that the service runs.
        systemd_version: 0 where unknown; older ones are spared what they do not know.
        place: of a further instance among them, from 1; its ports are so far from the first's.

    Raises:
        ValueError: a name that cannot be an instance's.
    """
    if instance and not _NAME.fullmatch(instance):
        raise ValueError("expected 1 to 32 lower-case letters, digits, - or _")
    unit = f"sage-fed@{instance}" if instance else "sage-fed"
    unit_file = SYSTEM / ("sage-fed@.service" if instance else "sage-fed.service")
    own = drop_ins_of(unit)
    drop_ins = {
        "10-location.conf": _location(program),
        "20-backoff.conf": _packaged("backoff") if systemd_version >= BACKOFF_SINCE else "",
        "30-machine.conf": _packaged(machine.value),
        PORTS_FILE: _instance(place) if instance else "",
    }
    configuration = Path("/etc") / unit / "config.toml"
    files = [PlannedFile(unit_file, (UNITS / "sage-fed.service").read_text(encoding="utf-8"))]
    files += [PlannedFile(own / name, text) for name, text in drop_ins.items() if text]
    overruled = _overruled(drop_ins)
    files.append(
        PlannedFile(
            configuration,
            _configuration(profile or _profile(machine), unit, overruled),
            operators=True,
        )
    )
    owned = [own / name for name in drop_ins] + ([] if instance else [unit_file])
    return Installation(
        unit,
        tuple(files),
        owned=tuple(owned),
        left=(configuration, Path("/var/lib") / unit, Path("/var/cache/sage-fed")),
        overruled=overruled,
        template=unit_file if instance else None,
    )


def drop_ins_of(unit: str) -> Path:
    """The directory of a unit's drop-ins; `*` for a name stands for every further instance."""
    return SYSTEM / f"{unit}.service.d"


def place_of(ports_file: str) -> int | None:
    """The place of the instance that has this `PORTS_FILE`; None where it is not ours to read."""
    found = re.search(rf"^Environment=SAGE_FED_LISTEN={_HOST}:(\d+)$", ports_file, re.MULTILINE)
    place = int(found[1]) - _PORT if found else 0
    return place if 1 <= place < _MAX_PLACES else None


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


def _instance(place: int) -> str:
    """The packaged drop-in, which is the first further instance's, with this one's ports."""
    text = _packaged("instance")
    for port in (_PORT, _METRICS_PORT):
        text = text.replace(f"{_HOST}:{port + 1}", f"{_HOST}:{port + place}")
    return text


def _overruled(drop_ins: Mapping[str, str]) -> tuple[str, ...]:
    """Which settings the unit has already: its environment wins over a file."""
    return tuple(
        f"{match['key'].lower().replace('__', '.')} = {match['value']} ({name})"
        for name, text in drop_ins.items()
        for match in _ENVIRONMENT.finditer(text)
    )


def _configuration(profile: str, unit: str, overruled: Sequence[str]) -> str:
    decided = (
        f"# The unit sets these, and wins over this file; `systemctl edit {unit}` changes them\n"
        "# (Environment=SAGE_FED_...):\n"
    ) + "".join(f"#   {line}\n" for line in overruled)
    return (
        "# sage-fed's settings on this machine; yours: no installation overwrites it.\n"
        "# `sage-fed config --config FILE` prints all of them, and where each value comes from.\n"
        f"{decided if overruled else ''}"
        f'profile = "{profile}"\n'
    )


@dataclass(frozen=True, slots=True)
class Change:
    """What happens to one file; `path` is the machine's, whatever the root."""

    action: Action
    path: Path
    content: str = ""


def to_install(plan: Installation, root: Path) -> tuple[Change, ...]:
    """Compare a plan with what is there; drop-ins of an earlier choice are removed."""
    changes = [
        Change(file.action(_read(_under(root, file.path))), file.path, file.content)
        for file in plan.files
    ]
    planned = {file.path for file in plan.files}
    changes += _removals((path for path in plan.owned if path not in planned), root)
    return tuple(changes)


def to_uninstall(plan: Installation, root: Path) -> tuple[Change, ...]:
    """What of the plan's own files is there, and the template where no other instance needs it."""
    own = _removals(plan.owned, root)
    if plan.template is not None and not _others(plan.unit, root):
        own += _removals((plan.template,), root)
    return tuple(own)


def place_for(instance: str, root: Path) -> int:
    """The place of a further instance: the one that it has, else the first that no other has."""
    unit = f"sage-fed@{instance}"
    own = _place(_under(root, drop_ins_of(unit) / PORTS_FILE))
    if own is not None:
        return own
    taken = {_place(path) for path in _others(unit, root)}
    return next(place for place in itertools.count(1) if place not in taken)


def _others(unit: str, root: Path) -> list[Path]:
    """The files with the ports of the other further instances."""
    pattern = str((drop_ins_of("sage-fed@*") / PORTS_FILE).relative_to("/"))
    own = _under(root, drop_ins_of(unit))
    return [path for path in root.glob(pattern) if path.parent != own]


def _place(path: Path) -> int | None:
    text = _read(path)
    return None if text is None else place_of(text)


def carry_out(changes: Iterable[Change], root: Path) -> None:
    """Make the changes.

    Raises:
        OSError: a file that cannot be written or removed.
    """
    for change in changes:
        place = _under(root, change.path)
        if change.action in (Action.CREATE, Action.UPDATE):
            place.parent.mkdir(parents=True, exist_ok=True)
            # Whatever the umask: the service's user has to read it, and there are no secrets in it.
            replace_file(place, change.content, mode=0o644)
        elif change.action is Action.REMOVE:
            place.unlink(missing_ok=True)
            _remove_empty(place.parent)


def _removals(paths: Iterable[Path], root: Path) -> list[Change]:
    return [Change(Action.REMOVE, path) for path in paths if _under(root, path).is_file()]


def _remove_empty(directory: Path) -> None:
    """Take away a drop-in directory that holds nothing more; the operator's own stay."""
    if directory.name.endswith(".d") and not any(directory.iterdir()):
        directory.rmdir()


def _under(root: Path, path: Path) -> Path:
    return root / path.relative_to("/")


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
