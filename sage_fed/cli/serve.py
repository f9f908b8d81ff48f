"""`sage-fed serve` and `sage-fed config`: the daemon, and the settings it would run with.

Owns: flags to settings, the start's progress on the terminal.
Does not know: what a daemon is made of (`sage_fed.daemon`); torch is imported only when it starts.
Fails: exit code 78 for settings that cannot work, 1 for a model or ledger that cannot be used;
a service manager is told why in either case.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sage_fed.cli import options
from sage_fed.cli.exits import daemon_exit_code, explain, reported
from sage_fed.cli.render import print_json, print_table
from sage_fed.cli.streams import complain, leave_on_interrupt
from sage_fed.errors import SageFedError
from sage_fed.systemd import ServiceManager

if TYPE_CHECKING:
    from sage_fed.cli.log_progress import LogProgress
    from sage_fed.cli.progress import BarProgress
    from sage_fed.settings import Effective

_log = logging.getLogger(__name__)

Listen = Annotated[
    str | None, typer.Option("--listen", metavar="ADDRESS", help="HOST:PORT of the gRPC API.")
]
MetricsListen = Annotated[
    str | None, typer.Option("--metrics-listen", metavar="ADDRESS", help="HOST:PORT of /metrics.")
]
Device = Annotated[str | None, typer.Option("--device", metavar="NAME", help="cuda:N or cpu.")]
LogLevel = Annotated[
    str | None, typer.Option("--log-level", metavar="LEVEL", help="debug, info, warning or error.")
]

LogFormat = Annotated[
    str | None, typer.Option("--log-format", metavar="FORM", help="auto, json or pretty.")
]


def serve(
    *,
    profile: options.Profile = None,
    config_file: options.ConfigFile = None,
    listen: Listen = None,
    metrics_listen: MetricsListen = None,
    state_dir: options.StateDir = None,
    device: Device = None,
    log_level: LogLevel = None,
    log_format: LogFormat = None,
    assignments: options.Assignments = None,
) -> None:
    """Run the daemon.

    SIGTERM or Ctrl-C lets running jobs finish and then ends it; a second one ends it at once.
    Flags win over SAGE_FED_* variables, those over --config, that over --profile.
    """
    flags = _flags(
        assignments,
        profile=profile,
        listen=listen,
        metrics_listen=metrics_listen,
        state_dir=state_dir,
        device=device,
        log_level=log_level,
        log_format=log_format,
    )
    # The stacks of all threads in the journal when the watchdog aborts us: what hung, and where.
    faulthandler.enable(file=2)
    manager = ServiceManager.of(os.environ)
    # Until the settings are read: they may be what is wrong.
    form = str(flags.get("log_format") or os.environ.get("SAGE_FED_LOG_FORMAT") or "auto")
    with (
        reported(codes=daemon_exit_code, tell=lambda line: _tell(line, form)),
        _failure_told(manager),
    ):
        found = effective(flags, config_file)
        form = found.settings.log_format
        code = _run(found, manager)
    raise typer.Exit(code)


def _run(found: Effective, manager: ServiceManager) -> int:
    """The daemon's exit code, once it has left."""
    settings = found.settings
    # What is imported stays, so looking through it for garbage, again and again, finds none, and
    # is a twentieth of the start. The daemon enables it when all is imported.
    gc.disable()
    # Torch takes seconds to import: no other command, and no mistyped setting, pays for it.
    with leave_on_interrupt():
        from sage_fed.daemon import serve as run_daemon  # noqa: PLC0415
        from sage_fed.logs import logging_to  # noqa: PLC0415

    pretty = _for_people(settings.log_format)
    progress, handler = _picture(watched=pretty and sys.stderr.isatty())
    with logging_to(settings.log_level, as_json=not pretty, handler=handler):
        if found.ignored:
            _log.info(
                "%s, which Kubernetes sets for a service: not taken for settings",
                ", ".join(found.ignored),
            )
        try:
            return run_daemon(settings, progress, manager)
        finally:
            progress.close()


def _for_people(log_format: str) -> bool:
    """Whether lines are for eyes; what is no format at all is taken for `auto`."""
    form = log_format.lower()
    return form == "pretty" or (form != "json" and sys.stderr.isatty())


def _tell(line: str, log_format: str) -> None:
    """Say why it ends in the form of the log: who parses that parses its last line, too."""
    if _for_people(log_format):
        complain(line)
        return
    from sage_fed.logs import logging_to  # noqa: PLC0415 - where no daemon was imported

    head, *more = (part.strip() for part in line.splitlines())
    with logging_to("error", as_json=True):
        logging.getLogger("sage_fed").error("%s", f"{head} {'; '.join(more)}".strip())


def _picture(*, watched: bool) -> tuple[BarProgress | LogProgress, logging.Handler | None]:
    """What the start reports to, and the handler of log lines that belongs to it."""
    from sage_fed.cli.log_progress import LogProgress  # noqa: PLC0415

    if not watched:
        return LogProgress(), None
    from sage_fed.cli.progress import BarProgress  # noqa: PLC0415 - rich, a tenth of a second
    from sage_fed.cli.tables import stderr_console  # noqa: PLC0415

    bars = BarProgress(stderr_console())
    return bars, bars.log_handler()


@contextlib.contextmanager
def _failure_told(manager: ServiceManager) -> Iterator[None]:
    """Leave the reason of a failed start where `systemctl status` shows it."""
    try:
        yield
    except SageFedError as error:
        manager.status(explain(error))
        raise


def config(
    *,
    profile: options.Profile = None,
    config_file: options.ConfigFile = None,
    listen: Listen = None,
    metrics_listen: MetricsListen = None,
    state_dir: options.StateDir = None,
    device: Device = None,
    log_level: LogLevel = None,
    log_format: LogFormat = None,
    assignments: options.Assignments = None,
    as_json: options.AsJson = False,
) -> None:
    """Print the settings that `serve` would run with.

    Each with where its value came from: flag, environment, file, profile or default.
    """
    flags = _flags(
        assignments,
        profile=profile,
        listen=listen,
        metrics_listen=metrics_listen,
        state_dir=state_dir,
        device=device,
        log_level=log_level,
        log_format=log_format,
    )
    with reported(as_json=as_json):
        found = effective(flags, config_file)
        if as_json:
            print_json(found.objects())
        else:
            print_table(("setting", "value", "from"), found.rows())


def effective(flags: dict[str, Any], config_file: Path | None) -> Effective:
    """The settings from flags, this process's environment, the file and the profile."""
    # Pydantic takes half a second to import: a question to a running daemon does without.
    from sage_fed.settings import load_settings  # noqa: PLC0415

    return load_settings(flags, os.environ, config_file)


def _flags(assignments: list[str] | None, **named: str | None) -> dict[str, Any]:
    """Flags by settings key; a flag of its own wins over `--set`."""
    return {
        **options.assigned(assignments),
        **{key: value for key, value in named.items() if value is not None},
    }
