"""A plan against a machine's files: what would change, and changing it.

Owns reading and writing below one root: `/`, or the directory of an image that is being built.
A file is written beside its place and renamed, so systemd never reads half of one.
Fails with `OSError`, which names the file.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from sage_fed.systemd.plan import PORTS_FILE, Action, Installation, drop_ins_of, place_of
from sage_fed.trusted_files import replace_file


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
            # Whoever's umask: the service's user has to read it, and there are no secrets in it.
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
