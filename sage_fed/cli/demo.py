"""`sage-fed demo`: the whole product in one command.

Owns: what the demo asks, its own daemon (a real process on free ports with fresh books), and
what it prints.
Does not know: the wire, the daemon's insides; it is an ordinary client of an ordinary daemon.
Fails: exit code 1 where the daemon dies (`DaemonDied`, with the end of its log), a stream breaks
or the books do not balance; a model's wrong answer is shown as one and is no failure.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sage_fed.cli.ask import Answer, follow, footer
from sage_fed.cli.exits import ExitCode, explain, reported
from sage_fed.cli.options import ledger_file
from sage_fed.cli.render import atp_number, format_rate, format_seconds, plain_line, printable
from sage_fed.cli.streams import exit_on_signals
from sage_fed.cli.top import fetch
from sage_fed.client import Client, wait_serving
from sage_fed.core import (
    TIER_ROLES,
    UATP_PER_ATP,
    Budget,
    JobSpec,
    Message,
    Prompt,
    SamplingRequest,
    Tier,
    TierState,
    counted,
)
from sage_fed.errors import CannotAfford, SageFedError
from sage_fed.ledger import check

if TYPE_CHECKING:
    from rich.console import Console

    from sage_fed.cli.drawing import StartProgress

_ENDPOINT = "endpoint.json"
_POLL_S = 0.02
_LOG_LINES = 15
_START_S = 60.0
_STOP_S = 30.0
_INDENT = "     "
_GLANCE_S = 0.2  # between two looks at the loading models


_MAX_NEW_TOKENS = 48
_GREEDY = SamplingRequest(temperature=0.0, max_new_tokens=_MAX_NEW_TOKENS)
_SAMPLED = SamplingRequest(temperature=0.7, seed=7, max_new_tokens=_MAX_NEW_TOKENS)


_SERIES = (
    "sage_fed_requests_total",
    "sage_fed_route_decisions_total",
    "sage_fed_time_to_first_token_seconds_count",
    "sage_fed_time_to_first_token_seconds_sum",
    "sage_fed_tokens_total",
    "sage_fed_atp_charged_total",
    "sage_fed_cost_ratio",
)

_WIDE = 118  # columns of the terminal
_WIDE_ONLY = ("asked", ">first", ">tok/s", ">left")
_WIDE_PROMPT, _NARROW_PROMPT = 25, 21

_WRONG = "wrong answers are expected of models this small: see sage_fed/models/MODEL_CARD.md"

_ACTIVATE = ". .venv/bin/activate"
_NEXT = (
    "sage-fed serve --profile demo",
    'sage-fed ask --tier strategic "What is 128 plus 345?"   # in another terminal',
    "sage-fed ledger                                         # what it cost",
)


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
    from sage_fed.cli.drawing import stdout_console  # noqa: PLC0415

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


@dataclass(frozen=True, slots=True)
class Question:
    """One question with its one exact answer; no model was trained on it."""

    text: str
    answer: str


_SUM = Question("What is 2+57?", "59")
_HARD_SUM = Question("How much is 1827 plus 4902?", "6729")
_DIFFERENCE = Question("How much is 99 minus 9?", "90")
_LARGEST = Question("Of the numbers 798, 188, which is the biggest?", "798")
_SORT = Question("Write the letters of WJQTXE in order.", "EJQTWX")
_REVERSE = Question("Write OUXISVZ backwards.", "ZVSIXUO")
_SHIFT = Question("Give SLWB with each letter moved forward by 1.", "TMXC")
_PICK = Question("In KNPQGBNS, which letter is number 7 from the left?", "N")
_LOOKUP = Question(
    "Read this. Ivy has blue, Eva has green, Jo has grey, Finn has gold, Ana has red, Hal has tan, "
    "Bo has black. Who has tan?",
    "Hal",
)


@dataclass(frozen=True, slots=True)
class DemoRequest:
    """One request, and what it is there to show."""

    shows: str
    question: Question
    tier: Tier | None
    sampling: SamplingRequest = _GREEDY
    complexity: float | None = None
    allow_downgrade: bool = False
    max_cost_uatp: int | None = None
    expects_refusal: bool = False

    @property
    def spec(self) -> JobSpec:
        """The job that is asked for."""
        return JobSpec(
            account="",
            prompt=Prompt(messages=(Message("user", self.question.text),)),
            requested=self.tier,
            allow_downgrade=self.allow_downgrade,
            max_cost_uatp=self.max_cost_uatp,
            complexity=self.complexity,
            sampling=self.sampling,
        )

    @property
    def asked(self) -> str:
        """The tier asked for, as `--tier` has it."""
        return self.tier.name if self.tier else "auto"


def plan() -> tuple[DemoRequest, ...]:
    """The demo's requests, in order."""
    cheap = _MAX_NEW_TOKENS * 2 * UATP_PER_ATP
    return (
        DemoRequest("an easy one for the small model", _SUM, Tier.TACTICAL),
        DemoRequest("a hard sum on the small model", _HARD_SUM, Tier.TACTICAL),
        DemoRequest("the same sum on the large model", _HARD_SUM, Tier.STRATEGIC),
        DemoRequest("the large model, another family", _SORT, Tier.STRATEGIC),
        DemoRequest("the daemon chooses", _DIFFERENCE, None),
        DemoRequest("the daemon chooses, a longer prompt", _LOOKUP, None),
        DemoRequest("the client hints: easy", _LARGEST, None, complexity=0.1),
        DemoRequest("the client hints: hard", _REVERSE, None, complexity=0.9),
        DemoRequest("sampled, seed 7", _SHIFT, Tier.TACTICAL, sampling=_SAMPLED),
        DemoRequest(
            "a cap that only the small model meets, and leave to use it",
            _PICK,
            Tier.STRATEGIC,
            allow_downgrade=True,
            max_cost_uatp=cheap,
        ),
        DemoRequest(
            "the same cap without that leave",
            _PICK,
            Tier.STRATEGIC,
            max_cost_uatp=cheap,
            expects_refusal=True,
        ),
    )


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of one request; `failure` says what broke, "" where nothing did."""

    request: DemoRequest
    answer: Answer | None = None
    refusal: str = ""
    failure: str = ""

    @property
    def correct(self) -> bool:
        """Whether the model's answer is the right one, white space around it aside."""
        return self.answer is not None and self.answer.text.strip() == self.request.question.answer


def run(state_dir: Path, console: Console) -> list[str]:
    """The story, top-down; what went wrong, in words."""
    _title(console, "1. a daemon with two models")
    with _running(state_dir) as daemon:
        endpoint = _wait_ready(daemon, console)
        _title(console, "2. questions that no model was trained on")
        with Client(endpoint.listen) as client:
            print_terms(client.budget(), console)
            outcomes = [_ask(client, request, console) for request in plan()]
        _title(console, "3. what each of them took")
        print_outcomes(outcomes, console)
        _title(console, f"4. what Prometheus scrapes from {endpoint.metrics_url} (a selection)")
        failures = _show_metrics(endpoint, console)
    _title(console, "5. the books")
    failures += [
        f"{outcome.request.shows}: {outcome.failure}" for outcome in outcomes if outcome.failure
    ]
    failures += _audit(state_dir, console)
    if not failures:
        _title(console, "try next")
        print_next_steps(console)
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
    from sage_fed.cli.drawing import start_progress  # noqa: PLC0415 - as all drawing

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
    plain_line(console, f"[{request.asked}] {request.shows}", style="bold")
    plain_line(console, f"  Q: {printable(request.question.text)}")
    console.print("  A: ", end="")

    def show(text: str) -> None:
        console.print(printable(text), end="", highlight=False, markup=False, soft_wrap=True)

    try:
        answer = follow(client.stream(request.spec), show)
    except SageFedError as error:
        plain_line(console, explain(error))
        if request.expects_refusal and isinstance(error, CannotAfford):
            return Outcome(request, refusal=f"refused: {error.detail}")
        return Outcome(request, failure=error.message)
    outcome = Outcome(request, answer)
    console.print()
    for line in footer(answer, console.width - len(_INDENT)):
        plain_line(console, f"{_INDENT}{line}", style="dim")
    if request.expects_refusal:
        return Outcome(request, answer, failure="was answered, a refusal was due")
    if answer.finished is None:
        return Outcome(request, failure="the stream ended without Finished")
    return outcome


def _show_metrics(endpoint: Endpoint, console: Console) -> list[str]:
    try:
        print_metrics(fetch(endpoint.metrics_url), console)
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
    plain_line(console, ", ".join(found))
    violations = list(report.violations)
    if report.open_holds:
        violations.append(f"{report.open_holds} holds are open")
    plain_line(console, "the books do not balance" if violations else "books balance")
    return violations


def _title(console: Console, text: str) -> None:
    console.print()
    plain_line(console, text, style="bold")


def print_terms(budget: Budget, console: Console) -> None:
    """What the account starts with, so that the balances below can be followed."""
    start = f"{budget.balance_uatp / UATP_PER_ATP:,.0f}"
    refill = f"{budget.refill_uatp_per_s / UATP_PER_ATP:,g}"
    plain_line(
        console,
        f"the account starts with {start} ATP and refills {refill} ATP/s; prompt tokens cost too",
    )


def print_outcomes(outcomes: list[Outcome], console: Console) -> None:
    """One row a request; a narrow terminal gets what its answers above have not told."""
    from sage_fed.cli.drawing import draw  # noqa: PLC0415 - as all drawing

    wide = console.width >= _WIDE
    rows = [_row(outcome, _WIDE_PROMPT if wide else _NARROW_PROMPT) for outcome in outcomes]
    hidden = () if wide else _WIDE_ONLY
    draw([{name: row[name] for name in row if name not in hidden} for row in rows], console)
    answered = [outcome for outcome in outcomes if outcome.answer is not None]
    right = sum(outcome.correct for outcome in answered)
    console.print(f"\n{right} of {len(answered)} answers right", highlight=False)
    if right < len(answered):
        plain_line(console, _WRONG)


def _row(outcome: Outcome, prompt_width: int) -> dict[str, str]:
    """Every column's text."""
    prompt = printable(outcome.request.question.text).replace("\n", " ")
    if len(prompt) > prompt_width:
        prompt = f"{prompt[: prompt_width - 1]}…"
    row = {
        "prompt": prompt,
        "asked": outcome.request.asked,
        "tier: reason": outcome.refusal or outcome.failure,
        "right?": "-",
        ">tokens": "-",
        ">first": "-",
        ">tok/s": "-",
        ">ATP": "0.00",
        ">left": "-",
    }
    answer = outcome.answer
    if answer is None or answer.started is None or answer.finished is None:
        return row
    route, finished = answer.started.route, answer.finished
    rate = format_rate(finished.usage.output_tokens - 1, finished.timing.decode_s)
    return row | {
        "tier: reason": f"{route.tier.name}: {route.reason}",
        "right?": "yes" if outcome.correct else "no",
        ">tokens": str(finished.usage.output_tokens),
        ">first": format_seconds(finished.timing.time_to_first_token_s),
        ">tok/s": rate or "-",
        ">ATP": atp_number(finished.price.charged_uatp),
        ">left": atp_number(finished.balance_uatp),
    }


def print_metrics(page: str, console: Console) -> None:
    """The series that the requests above have moved, as they are scraped."""
    for line in page.splitlines():
        name, value = line.partition("{")[0], line.rpartition(" ")[2]
        # The other phases' ratios are the same on this card: one says it.
        other_phase = 'phase="' in line and 'phase="decode"' not in line
        if name in _SERIES and float(value) and not other_phase:
            plain_line(console, line)


def print_next_steps(console: Console) -> None:
    """What to try now, and before it how to find `sage-fed` where the shell does not."""
    preface = () if shutil.which("sage-fed") else (_ACTIVATE,)
    for command in (*preface, *_NEXT):
        plain_line(console, f"  {command}")


class DaemonDied(SageFedError):
    """The daemon's process ended when it should not have, or not when it should."""

    reason = "DAEMON_DIED"


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where the daemon listens, as it wrote it down once bound."""

    listen: str
    metrics: str

    @property
    def metrics_url(self) -> str:
        """The page that Prometheus scrapes."""
        return f"http://{self.metrics}/metrics"


class DemoDaemon:
    """`sage-fed serve --profile demo` as a subprocess; its state and log are in `state_dir`."""

    def __init__(self, state_dir: Path, *arguments: str, interpreter: str = sys.executable) -> None:
        """Start the process, with further flags of `serve`; it is not serving yet.

        `interpreter` is the one of another installation, for benchmarks that compare two.
        """
        self.state_dir = state_dir
        # A file of an earlier daemon would send us to its ports.
        (state_dir / _ENDPOINT).unlink(missing_ok=True)
        # The demo shows the shipped settings, whatever the caller's environment says.
        environ = {k: v for k, v in os.environ.items() if not k.startswith("SAGE_FED_")}
        with (state_dir / "daemon.log").open("wb") as log:
            self._process = subprocess.Popen(  # noqa: S603 - our own interpreter and module
                [
                    # -P: what is installed, and not what the working directory may have.
                    interpreter, "-P", "-m", "sage_fed.cli", "serve", "--profile", "demo",
                    "--listen", "127.0.0.1:0", "--metrics-listen", "127.0.0.1:0",
                    "--state-dir", str(state_dir), *arguments,
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environ,
                # Ctrl-C is for the demo, which then stops the daemon properly.
                start_new_session=True,
            )  # fmt: skip

    @property
    def pid(self) -> int:
        """The process, to measure it by."""
        return self._process.pid

    def endpoint(self, deadline_s: float) -> Endpoint:
        """Wait until the daemon has bound its ports."""
        path = self.state_dir / _ENDPOINT
        until = time.monotonic() + deadline_s
        while not path.exists():
            self.check()
            if time.monotonic() > until:
                raise DaemonDied(f"the daemon bound no port in {deadline_s:.0f} s:\n{self.log()}")
            # Across processes the file is the only event there is.
            time.sleep(_POLL_S)
        body = json.loads(path.read_text())
        return Endpoint(body["listen"], body["metrics"])

    def check(self) -> None:
        """Raise where the process has ended."""
        code = self._process.poll()
        if code is not None:
            raise DaemonDied(f"the daemon ended with exit code {code}:\n{self.log()}")

    def log(self) -> str:
        """The last lines that it logged."""
        lines = (self.state_dir / "daemon.log").read_text(errors="replace").splitlines()
        return "\n".join(lines[-_LOG_LINES:])

    def stop(self, deadline_s: float) -> int:
        """SIGTERM, then its exit code; killed where it does not leave in time."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
        try:
            return self._process.wait(deadline_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            raise DaemonDied(
                f"the daemon did not leave in {deadline_s:.0f} s:\n{self.log()}"
            ) from None
