"""`sage-fed install-service` and `uninstall-service`: run by systemd from now on, or no more.

Owns: what is asked of the operator, and the calls of systemctl.
Does not know: what the files say (`sage_fed.systemd`), how it is shown (`service_view`).
Fails: exit code 1 with the file or the command that failed, before the next one is touched.
"""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

import typer

from sage_fed.cli import options
from sage_fed.cli.exits import reported
from sage_fed.cli.service_view import Command, Outcome, show
from sage_fed.errors import SageFedError
from sage_fed.systemd import (
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

_SYSTEMCTL_TIMEOUT_S = 3600.0
"""A start is over when the tactical tier serves; the service manager knows when to give up."""

_VERSION_TIMEOUT_S = 10.0

MachineOption = Annotated[
    Machine,
    typer.Option(
        "--machine", metavar="KIND", help="jetson, cuda or cpu: what the service runs on."
    ),
]
Instance = Annotated[
    str, typer.Option("--instance", metavar="NAME", help="A further one: sage-fed@NAME.")
]
Profile = Annotated[
    str,
    typer.Option(
        "--profile",
        metavar="NAME",
        help="Packaged settings for a new configuration; jetson-thor, qwen2.5 or demo by machine.",
    ),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Show the files, and write none.")]
Now = Annotated[
    bool, typer.Option("--now", help="Enable and start it, too; not in an image (--root).")
]
Root = Annotated[
    Path,
    typer.Option("--root", metavar="DIR", help="Write below DIR, an image; nothing is started."),
]
Program = Annotated[
    Path | None,
    typer.Option("--program", metavar="FILE", help="The sage-fed that it runs; else this one."),
]


class ServiceUnchanged(SageFedError):
    """An installation that could not be made; what was done before it stays."""

    reason = "SERVICE_UNCHANGED"


def install_service(
    *,
    machine: MachineOption,
    instance: Instance = "",
    profile: Profile = "",
    now: Now = False,
    dry_run: DryRun = False,
    root: Root = Path("/"),
    program: Program = None,
    as_json: options.AsJson = False,
) -> None:
    """Have systemd run the daemon.

    Writes the unit, what this machine adds to it, and a first configuration, which it never
    overwrites. Again, after an upgrade, it brings the unit up to date.
    """
    with reported(as_json=as_json), _files_named():
        _check_profile(profile)
        live = root == Path("/")
        if now and not live:
            raise typer.BadParameter(
                f"nothing runs in an image; have it started at boot with `systemctl --root {root} "
                "enable UNIT`",
                param_hint="--now",
            )
        version = _systemd_version()
        if live and not version and not dry_run:
            raise ServiceUnchanged("there is no systemctl here; --root DIR prepares an image")
        found = program or _this_program()
        doubt = "" if program else _doubt(found)
        if doubt and not dry_run:
            raise ServiceUnchanged(doubt)
        plan = _plan(
            machine,
            instance,
            profile,
            found,
            systemd_version=version if live else 0,
            place=place_for(instance, root) if instance else 1,
        )
        changes = to_install(plan, root)
        stale = live and any(c.action not in (Action.UNCHANGED, Action.KEEP) for c in changes)
        commands: list[Command] = [("systemctl", "daemon-reload")] if stale else []
        if live and now:
            commands.append(("systemctl", "enable", plan.unit))
            # One that runs already has to take the new unit.
            commands.append(("systemctl", "restart" if stale else "start", plan.unit))
        if not dry_run:
            _do(changes, root, commands)
    show(Outcome(plan, changes, commands, dry_run, doubt), as_json=as_json)
    if not as_json and not now and not dry_run:
        typer.echo(
            f"start it:    systemctl enable --now {plan.unit}\n"
            f"follow it:   journalctl -fu {plan.unit}\n"
            f"configure:   {plan.left[0]}, then systemctl restart {plan.unit}"
        )


def uninstall_service(
    *,
    instance: Instance = "",
    dry_run: DryRun = False,
    root: Root = Path("/"),
    as_json: options.AsJson = False,
) -> None:
    """Stop the service and remove its unit; the books and the configuration stay."""
    with reported(as_json=as_json), _files_named():
        plan = _plan(Machine.CPU, instance, "", Path("/"))
        changes = to_uninstall(plan, root)
        before: list[Command] = [("systemctl", "disable", "--now", plan.unit)]
        after: list[Command] = [("systemctl", "daemon-reload")]
        if root != Path("/") or not changes:
            before, after = [], []
        if not dry_run:
            # Stopped first: what runs is drained by the unit that it was started with.
            _do((), root, before)
            _do(changes, root, after)
    show(Outcome(plan, changes, before + after, dry_run, left=plan.left), as_json=as_json)
    if not as_json:
        typer.echo(f"left as they are: {', '.join(map(str, plan.left))}")


def _check_profile(name: str) -> None:
    from sage_fed.settings import profile_names  # noqa: PLC0415 - half a second

    if name and name not in profile_names():
        raise typer.BadParameter(
            f"{name!r} is not one of {', '.join(profile_names())}", param_hint="--profile"
        )


def _plan(
    machine: Machine,
    instance: str,
    profile: str,
    program: Path,
    *,
    systemd_version: int = 0,
    place: int = 1,
) -> Installation:
    try:
        return installation(
            machine,
            instance=instance,
            profile=profile,
            program=program,
            systemd_version=systemd_version,
            place=place,
        )
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--instance") from None


def _this_program() -> Path:
    """The `sage-fed` beside the interpreter that runs us."""
    return (Path(sys.executable).parent / "sage-fed").absolute()


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
def _files_named() -> Iterator[None]:
    try:
        yield
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
