"""`serve`, `config`, `install-service`: the daemon, its settings, and systemd that runs it.

Owns: flags to settings, the start's progress, what is asked before an installation, and the calls
of systemctl.
Does not know: what a daemon is made of (`sage_fed.daemon`; torch is imported only when it starts),
what the service's files say (`sage_fed.systemd`).
Fails: `serve` with exit code 78 for settings that cannot work, 1 for a model or ledger that cannot
be used, and a service manager is told why; an installation with 1 and the file or the command that
failed, before the next one is touched.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from sage_fed.cli import options
from sage_fed.cli.exits import daemon_exit_code, explain, reported
from sage_fed.cli.options import OptionGroup, grouped, option, report
from sage_fed.cli.render import LineProgress, print_json, print_table
from sage_fed.cli.streams import complain, leave_on_interrupt
from sage_fed.errors import SageFedError
from sage_fed.systemd.notify import ServiceManager
from sage_fed.systemd.unit import (
    Action,
    Change,
    Installation,
    Machine,
    carry_out,
    installation,
    place_for,
    to_install,
    to_uninstall,
    unreachable,
)

if TYPE_CHECKING:
    from sage_fed.cli.drawing import BarProgress
    from sage_fed.settings import Effective

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class SettingsFlags(OptionGroup):
    """Where the daemon's settings come from; the fields but two are settings of that name."""

    profile: options.Profile = None
    config_file: options.ConfigFile = None
    listen: str | None = option("--listen", "HOST:PORT of the gRPC API.", "ADDRESS")
    metrics_listen: str | None = option("--metrics-listen", "HOST:PORT of /metrics.", "ADDRESS")
    state_dir: options.StateDir = None
    device: str | None = option("--device", "cuda:N or cpu.", "NAME")
    log_level: str | None = option("--log-level", "debug, info, warning or error.", "LEVEL")
    log_format: str | None = option("--log-format", "auto, json or pretty.", "FORM")
    assignments: list[str] | None = option(
        "--set", "Any setting, such as tactical.max_batch=8.", "KEY=VALUE"
    )

    def by_key(self) -> dict[str, str]:
        """Return the flags by settings key; a flag of its own wins over `--set`."""
        named = {field.name: getattr(self, field.name) for field in fields(self)}
        del named["config_file"], named["assignments"]
        given = {key: value for key, value in named.items() if value is not None}
        return options.assigned(self.assignments) | given


@grouped
def serve(*, given: SettingsFlags) -> None:
    """Run the daemon.

    SIGTERM or Ctrl-C lets running jobs finish and then ends it; a second one ends it at once.
    Flags win over SAGE_FED_* variables, those over --config, that over --profile.
    """
    flags = given.by_key()
    # The stacks of all threads in the journal when the watchdog aborts us: what hung, and where.
    faulthandler.enable(file=2)
    manager = ServiceManager.of(os.environ)
    # Until the settings are read: they may be what is wrong.
    form = str(flags.get("log_format") or os.environ.get("SAGE_FED_LOG_FORMAT") or "auto")
    with (
        reported(codes=daemon_exit_code, tell=lambda line: _tell(line, form)),
        _failure_told(manager),
    ):
        found = effective(flags, given.config_file)
        form = found.settings.log_format
        code = _run(found, manager)
    raise typer.Exit(code)


def _run(found: Effective, manager: ServiceManager) -> int:
    """Run the daemon and return its exit code."""
    settings = found.settings
    # What is imported stays, so looking through it for garbage, again and again, finds none, and
    # is a twentieth of the start. The daemon enables it when all is imported.
    gc.disable()
    # Torch takes seconds to import: no other command, and no mistyped setting, pays for it.
    with leave_on_interrupt():
        from sage_fed.daemon import serve as run_daemon  # noqa: PLC0415
        from sage_fed.logs import logging_to  # noqa: PLC0415

    pretty = _for_people(settings.log_format)
    progress: BarProgress | LineProgress = LineProgress(lambda line: _log.info("%s", line))
    handler = None
    if pretty and sys.stderr.isatty():
        from sage_fed.cli.drawing import BarProgress, stderr_console  # noqa: PLC0415 - rich, 0.1 s

        progress = BarProgress(stderr_console())
        handler = progress.log_handler()
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


@contextlib.contextmanager
def _failure_told(manager: ServiceManager) -> Iterator[None]:
    """Leave the reason of a failed start where `systemctl status` shows it."""
    try:
        yield
    except SageFedError as error:
        manager.status(explain(error))
        raise


@grouped
def config(*, given: SettingsFlags, as_json: options.AsJson = False) -> None:
    """Print the settings that `serve` would run with.

    Each with where its value came from: flag, environment, file, profile or default.
    """
    flags = given.by_key()
    report(
        lambda: effective(flags, given.config_file),
        _print_settings,
        lambda found: found.objects(),
        as_json=as_json,
    )


def _print_settings(found: Effective) -> None:
    print_table(
        {"setting": key, "value": value, "from": origin} for key, value, origin in found.rows()
    )


def effective(flags: dict[str, Any], config_file: Path | None) -> Effective:
    """The settings from flags, this process's environment, the file and the profile."""
    # Pydantic takes half a second to import: a question to a running daemon does without.
    from sage_fed.settings import load_settings  # noqa: PLC0415

    return load_settings(flags, os.environ, config_file)


_SYSTEMCTL_TIMEOUT_S = 3600.0
"""A start is over when the tactical tier serves; the service manager knows when to give up."""

_VERSION_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class OldService(OptionGroup):
    """What systemd is to run no more."""

    instance: str = option("--instance", "A further one: sage-fed@NAME.", "NAME", default="")
    dry_run: bool = option("--dry-run", "Show the files, and write none.", default=False)
    root: Path = option(
        "--root", "Write below DIR, an image; nothing is started.", "DIR", default=Path("/")
    )
    as_json: options.AsJson = False


@dataclass(frozen=True, slots=True, kw_only=True)
class NewService(OldService):
    """What systemd is to run."""

    machine: Machine = option(
        "--machine", "jetson, cuda or cpu: what the service runs on.", "KIND", default=MISSING
    )
    profile: str = option(
        "--profile",
        "Packaged settings for a new configuration; jetson-thor, qwen2.5 or demo by machine.",
        "NAME",
        default="",
    )
    now: bool = option(
        "--now", "Enable and start it, too; not in an image (--root).", default=False
    )
    program: Path | None = option("--program", "The sage-fed that it runs; else this one.", "FILE")


class ServiceUnchanged(SageFedError):
    """An installation that could not be made; what was done before it stays."""

    reason = "SERVICE_UNCHANGED"


@grouped
def install_service(*, wanted: NewService) -> None:
    """Have systemd run the daemon.

    Writes the unit, what this machine adds to it, and a first configuration, which it never
    overwrites. Again, after an upgrade, it brings the unit up to date.
    """
    with reported(as_json=wanted.as_json), _refusals_told():
        plan, outcome = _install(wanted)
    show(plan, outcome, as_json=wanted.as_json)
    if not wanted.as_json and not wanted.now and not wanted.dry_run:
        typer.echo(
            f"start it:    systemctl enable --now {plan.unit}\n"
            f"follow it:   journalctl -fu {plan.unit}\n"
            f"configure:   {plan.left[0]}, then systemctl restart {plan.unit}"
        )


def _install(wanted: NewService) -> tuple[Installation, Outcome]:
    _check_profile(wanted.profile)
    root, live = wanted.root, wanted.root == Path("/")
    if wanted.now and not live:
        raise typer.BadParameter(
            f"nothing runs in an image; have it started at boot with `systemctl --root {root} "
            "enable UNIT`",
            param_hint="--now",
        )
    version = _systemd_version()
    if live and not version and not wanted.dry_run:
        raise ServiceUnchanged("there is no systemctl here; --root DIR prepares an image")
    # Else the `sage-fed` beside the interpreter that runs us.
    program = wanted.program or (Path(sys.executable).parent / "sage-fed").absolute()
    doubt = "" if wanted.program else _doubt(program)
    if doubt and not wanted.dry_run:
        raise ServiceUnchanged(doubt)
    plan = installation(
        wanted.machine,
        instance=wanted.instance,
        profile=wanted.profile,
        program=program,
        systemd_version=version if live else 0,
        place=place_for(wanted.instance, root) if wanted.instance else 1,
    )
    changes = to_install(plan, root)
    stale = live and any(c.action not in (Action.UNCHANGED, Action.KEEP) for c in changes)
    commands: list[Command] = [("systemctl", "daemon-reload")] if stale else []
    if live and wanted.now:
        commands.append(("systemctl", "enable", plan.unit))
        # One that runs already has to take the new unit.
        commands.append(("systemctl", "restart" if stale else "start", plan.unit))
    if not wanted.dry_run:
        _do(changes, root, commands)
    kept = any(change.action is Action.KEEP for change in changes)
    return plan, Outcome(
        plan.unit,
        wanted.dry_run,
        changes,
        [" ".join(command) for command in commands],
        overruled=plan.overruled if kept else (),
        warnings=(doubt,) if doubt else (),
    )


@grouped
def uninstall_service(*, wanted: OldService) -> None:
    """Stop the service and remove its unit; the books and the configuration stay."""
    with reported(as_json=wanted.as_json), _refusals_told():
        plan = installation(Machine.CPU, instance=wanted.instance, program=Path("/"))
        changes = to_uninstall(plan, wanted.root)
        before: list[Command] = [("systemctl", "disable", "--now", plan.unit)]
        after: list[Command] = [("systemctl", "daemon-reload")]
        if wanted.root != Path("/") or not changes:
            before, after = [], []
        if not wanted.dry_run:
            # Stopped first: what runs is drained by the unit that it was started with.
            _do((), wanted.root, before)
            _do(changes, wanted.root, after)
    commands = [" ".join(command) for command in before + after]
    outcome = Outcome(plan.unit, wanted.dry_run, changes, commands, left=plan.left)
    show(plan, outcome, as_json=wanted.as_json)
    if not wanted.as_json:
        typer.echo(f"left as they are: {', '.join(map(str, plan.left))}")


def _check_profile(name: str) -> None:
    from sage_fed.settings import profile_names  # noqa: PLC0415 - half a second

    if name and name not in profile_names():
        raise typer.BadParameter(
            f"{name!r} is not one of {', '.join(profile_names())}", param_hint="--profile"
        )


def _doubt(program: Path) -> str:
    """Why a service could not run it with our interpreter, and what to do; "" where it could."""
    if not program.is_file():
        return f"there is no {program}; say with --program which one to run"
    python = Path(sys.executable)
    hidden = unreachable((python.absolute(), python.resolve(), program))
    if hidden is None:
        return ""
    return (
        f"a service cannot reach {hidden}: it sees no home and no /tmp, and it has a user of its "
        "own; install sage-fed into /opt/sage-fed (deploy/install.sh does), or say with --program "
        "which one to run"
    )


def _systemd_version() -> int:
    """The version of this machine's systemd; 0 where there is none."""
    systemctl = shutil.which("systemctl")
    if systemctl is None:
        return 0
    said = subprocess.run(  # noqa: S603 - found above
        [systemctl, "--version"],
        capture_output=True,
        text=True,
        timeout=_VERSION_TIMEOUT_S,
        check=False,
    ).stdout.split()
    return int(said[1]) if len(said) > 1 and said[1].isdecimal() else 0


@contextlib.contextmanager
def _refusals_told() -> Iterator[None]:
    """Name the file that cannot be written, or the option that makes no installation."""
    try:
        yield
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--instance") from None
    except OSError as error:
        advice = "; run it with sudo" if isinstance(error, PermissionError) else ""
        raise ServiceUnchanged(f"{error.filename}: {error.strerror}{advice}") from None


def _do(changes: Sequence[Change], root: Path, commands: Sequence[Command]) -> None:
    carry_out(changes, root)
    for command in commands:
        try:
            done = subprocess.run(  # noqa: S603 - systemctl and a checked name
                command, capture_output=True, text=True, timeout=_SYSTEMCTL_TIMEOUT_S, check=False
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise ServiceUnchanged(f"{' '.join(command)}: {error}") from None
        if done.returncode:
            said = " ".join((done.stderr or done.stdout).split())
            raise ServiceUnchanged(f"{' '.join(command)}: {said}")


Command = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Outcome:
    """Changed files and commands that were run; with `dry_run` those that would be.

    Its fields are what `--json` has. `left` is what stays behind, `overruled` the settings that a
    configuration which was kept may not know to be the unit's.
    """

    unit: str
    dry_run: bool
    files: Sequence[Change]
    commands: Sequence[str]
    left: tuple[Path, ...] = ()
    overruled: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


def show(plan: Installation, outcome: Outcome, *, as_json: bool) -> None:
    """Print it on stdout, and the warnings on stderr."""
    for warning in outcome.warnings:
        complain(f"warning: {warning}")
    if as_json:
        print_json(outcome)
        return
    done = "would" if outcome.dry_run else "done"
    rows = [{done: change.action.value, "": str(change.path)} for change in outcome.files]
    rows += [{done: "run", "": command} for command in outcome.commands]
    if not rows:
        typer.echo(f"{plan.unit} is not installed; nothing to do")
        return
    print_table(rows)
    if outcome.dry_run:
        for change in outcome.files:
            if change.content:
                typer.echo(f"\n--- {change.path}\n{change.content.rstrip()}")
    if outcome.overruled:
        typer.echo(
            f"{plan.left[0]} is kept; the unit sets these, and wins over it "
            f"(`systemctl edit {plan.unit}` changes them, as Environment=SAGE_FED_...):"
        )
        for line in outcome.overruled:
            typer.echo(f"  {line}")
