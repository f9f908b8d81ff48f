"""What `sage-fed demo` tells.

Owns: the story: start a real daemon, ask it in all three modes, show what came of it, stop it,
audit its books.
Does not know: the wire, the daemon's insides; it is an ordinary client of an ordinary daemon.
Fails: `DaemonDied` where the daemon does; a broken stream and books that do not balance are
told in words; a wrong answer of a model is shown as one and is no failure.
"""

from __future__ import annotations

import contextlib
import http.client
import time
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console

from sage_fed.cli import demo_report
from sage_fed.cli.ask import follow, footer
from sage_fed.cli.demo_daemon import DaemonDied, DemoDaemon, Endpoint
from sage_fed.cli.demo_plan import DemoRequest, plan
from sage_fed.cli.demo_report import Outcome
from sage_fed.cli.exits import explain
from sage_fed.cli.paths import ledger_file
from sage_fed.cli.progress import StartProgress, start_progress
from sage_fed.cli.render import printable
from sage_fed.cli.scrape import fetch
from sage_fed.client import Client
from sage_fed.client.health import wait_serving
from sage_fed.core import TIER_ROLES, TierState, counted
from sage_fed.errors import CannotAfford, SageFedError
from sage_fed.ledger import check

_START_S = 60.0
_STOP_S = 30.0
_INDENT = "     "
_GLANCE_S = 0.2  # between two looks at the loading models


def run(state_dir: Path, console: Console) -> list[str]:
    """The story, top-down; what went wrong, in words."""
    _title(console, "1. a daemon with two models")
    with _running(state_dir) as daemon:
        endpoint = _wait_ready(daemon, console)
        _title(console, "2. questions that no model was trained on")
        with Client(endpoint.listen) as client:
            demo_report.print_terms(client.budget(), console)
            outcomes = [_ask(client, request, console) for request in plan()]
        _title(console, "3. what each of them took")
        demo_report.print_outcomes(outcomes, console)
        _title(console, f"4. what Prometheus scrapes from {endpoint.metrics_url} (a selection)")
        failures = _show_metrics(endpoint, console)
    _title(console, "5. the books")
    failures += [
        f"{outcome.request.shows}: {outcome.failure}" for outcome in outcomes if outcome.failure
    ]
    failures += _audit(state_dir, console)
    if not failures:
        _title(console, "try next")
        demo_report.print_next_steps(console)
    return failures


@contextlib.contextmanager
def _running(state_dir: Path) -> Iterator[DemoDaemon]:
    """A daemon for the time of the block; leaving it otherwise than with 0 is an error."""
    daemon = DemoDaemon(state_dir)
    try:
        yield daemon
        daemon.check()
    except BaseException:
        # What happened first is the story; a failed stop must not hide it.
        with contextlib.suppress(DaemonDied):
            daemon.stop(_STOP_S)
        raise
    code = daemon.stop(_STOP_S)
    if code != 0:
        raise DaemonDied(f"the daemon left with exit code {code}:\n{daemon.log()}")


def _wait_ready(daemon: DemoDaemon, console: Console) -> Endpoint:
    """Show the models load, until the health service says that both tiers serve."""
    until = time.monotonic() + _START_S
    progress = start_progress(console)
    try:
        endpoint = daemon.endpoint(_START_S)
        with Client(endpoint.listen) as client:
            for tier in TIER_ROLES:
                while not wait_serving(endpoint.listen, tier.name, _GLANCE_S):
                    daemon.check()
                    _show_loading(client, progress)
                    if time.monotonic() > until:
                        raise DaemonDied(f"{tier.name} does not serve:\n{daemon.log()}")
            _show_loading(client, progress)
        progress.ready(endpoint.listen, endpoint.metrics)
    finally:
        progress.close()
    return endpoint


def _show_loading(client: Client, progress: StartProgress) -> None:
    for model in client.models():
        share = 1.0 if model.state is TierState.READY else model.load_progress
        progress.tier_progress(model.tier, share, model.name)


def _ask(client: Client, request: DemoRequest, console: Console) -> Outcome:
    """One question, its answer as it comes, and what came of it."""
    asked = request.spec.requested.name if request.spec.requested else "auto"
    _line(console, f"[{asked}] {request.shows}", style="bold")
    _line(console, f"  Q: {printable(request.task.prompt)}")
    console.print("  A: ", end="")

    def show(text: str) -> None:
        console.print(printable(text), end="", highlight=False, markup=False, soft_wrap=True)

    try:
        answer = follow(client.stream(request.spec), show)
    except SageFedError as error:
        _line(console, explain(error))
        if request.expects_refusal and isinstance(error, CannotAfford):
            return Outcome(request, refusal=f"refused: {error.detail}")
        return Outcome(request, failure=error.message)
    outcome = Outcome(request, answer)
    console.print()
    for line in footer(answer, console.width - len(_INDENT)):
        _line(console, f"{_INDENT}{line}", style="dim")
    if request.expects_refusal:
        return Outcome(request, answer, failure="was answered, a refusal was due")
    if answer.finished is None:
        return Outcome(request, failure="the stream ended without Finished")
    return outcome


def _show_metrics(endpoint: Endpoint, console: Console) -> list[str]:
    try:
        demo_report.print_metrics(fetch(endpoint.metrics_url), console)
    except (OSError, http.client.HTTPException) as error:
        return [f"metrics could not be read: {error}"]
    return []


def _audit(state_dir: Path, console: Console) -> list[str]:
    """What the ledger's own audit says of the stopped daemon's books."""
    report = check(ledger_file(state_dir))
    found = (
        counted(report.jobs, "job"),
        counted(report.entries, "entry", "entries"),
        counted(report.open_holds, "open hold"),
    )
    _line(console, ", ".join(found))
    violations = list(report.violations)
    if report.open_holds:
        violations.append(f"{report.open_holds} holds are open")
    _line(console, "the books do not balance" if violations else "books balance")
    return violations


def _title(console: Console, text: str) -> None:
    console.print()
    _line(console, text, style="bold")


def _line(console: Console, text: str, style: str | None = None) -> None:
    console.print(text, style=style, highlight=False, markup=False, soft_wrap=True)
