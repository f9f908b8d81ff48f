"""`sage-fed demo`: the whole product in one command.

Owns: where the demo keeps its state, its exit code.
Does not know: the story (`demo_story.py`).
Fails: exit code 1 where the daemon dies, a stream breaks or the books do not balance.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated

import typer

from sage_fed.cli.exits import ExitCode, reported
from sage_fed.cli.streams import exit_on_signals


def demo(
    *,
    state_dir: Annotated[
        str | None,
        typer.Option(
            "--state-dir",
            metavar="DIR",
            help="Keep books and log here; otherwise they are deleted.",
        ),
    ] = None,
) -> None:
    """Show the whole product in a minute.

    Starts a daemon with the bundled pair of models, asks it a dozen questions, shows what each
    cost and the metrics, stops it and audits its books.
    """
    if state_dir == "":
        raise typer.BadParameter("expected a directory", param_hint="--state-dir")
    # Drawing takes a tenth of a second to import, which no other command should pay.
    from sage_fed.cli.demo_story import run  # noqa: PLC0415
    from sage_fed.cli.tables import stdout_console  # noqa: PLC0415

    with (
        reported(),
        exit_on_signals(),
        tempfile.TemporaryDirectory(prefix="sage-fed-demo-") as temporary,
    ):
        folder = Path(state_dir or temporary)
        folder.mkdir(parents=True, exist_ok=True)
        failures = run(folder, stdout_console())
        if failures:
            typer.echo(f"demo failed: {'; '.join(failures)}", err=True)
            raise typer.Exit(ExitCode.ERROR)
