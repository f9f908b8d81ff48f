"""What an installation as a service did, or would do, for a person and for a program.

Owns: its table, its warnings and its JSON.
Does not know: how anything is installed.
Fails: never.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import typer

from sage_fed.cli.render import print_json, print_table
from sage_fed.cli.streams import complain
from sage_fed.systemd import Action, Change, Installation

Command = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Outcome:
    """Changed files and commands that were run; with `dry_run` those that would be.

    `doubt` is why the service could not run what it is told to; `left` is what stays behind.
    """

    plan: Installation
    changes: Sequence[Change]
    commands: Sequence[Command]
    dry_run: bool
    doubt: str = ""
    left: tuple[Path, ...] = ()

    @property
    def overruled(self) -> tuple[str, ...]:
        """Settings that a configuration which was kept may not know to be the unit's."""
        kept = any(change.action is Action.KEEP for change in self.changes)
        return self.plan.overruled if kept else ()


def show(outcome: Outcome, *, as_json: bool) -> None:
    """Print it on stdout, and the doubt on stderr."""
    if outcome.doubt:
        complain(f"warning: {outcome.doubt}")
    if as_json:
        print_json(_object(outcome))
        return
    rows = [(change.action.value, str(change.path)) for change in outcome.changes]
    rows += [("run", " ".join(command)) for command in outcome.commands]
    if not rows:
        typer.echo(f"{outcome.plan.unit} is not installed; nothing to do")
        return
    print_table(("would" if outcome.dry_run else "done", ""), rows)
    if outcome.dry_run:
        for change in outcome.changes:
            if change.content:
                typer.echo(f"\n--- {change.path}\n{change.content.rstrip()}")
    if outcome.overruled:
        typer.echo(
            f"{outcome.plan.left[0]} is kept; the unit sets these, and wins over it "
            f"(`systemctl edit {outcome.plan.unit}` changes them, as Environment=SAGE_FED_...):"
        )
        for line in outcome.overruled:
            typer.echo(f"  {line}")


def _object(outcome: Outcome) -> dict[str, object]:
    return {
        "unit": outcome.plan.unit,
        "dry_run": outcome.dry_run,
        "files": [
            {"action": change.action.value, "path": str(change.path), "content": change.content}
            for change in outcome.changes
        ],
        "commands": [" ".join(command) for command in outcome.commands],
        "left": [str(path) for path in outcome.left],
        "overruled": list(outcome.overruled),
        "warnings": [outcome.doubt] if outcome.doubt else [],
    }
