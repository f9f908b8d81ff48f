"""What the demo prints about its requests and metrics.

Owns: the outcome of a request, the table, the choice of series, the next commands.
Does not know: the daemon, how a request is made.
Fails: never.
"""

from __future__ import annotations

from dataclasses import dataclass

from rich.console import Console
from rich.text import Text

from sage_fed.cli.ask import Answer
from sage_fed.cli.demo_plan import DemoRequest
from sage_fed.cli.render import atp_number, format_rate, format_seconds, printable
from sage_fed.cli.scrape import samples
from sage_fed.cli.tables import plain_table
from sage_fed.tasks import is_correct

_SERIES = (
    "sage_fed_requests_total",
    "sage_fed_route_decisions_total",
    "sage_fed_time_to_first_token_seconds_count",
    "sage_fed_time_to_first_token_seconds_sum",
    "sage_fed_tokens_total",
    "sage_fed_atp_charged_total",
    "sage_fed_cost_ratio",
)

_PHASES = (None, "decode")

_NEXT = (
    "sage-fed serve --profile demo",
    'sage-fed ask --tier strategic "What is 128 plus 345?"   # in another terminal',
    "sage-fed ledger                                         # what it cost",
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
        """Whether the model's answer is the task's."""
        return self.answer is not None and is_correct(self.request.task, self.answer.text)


def print_outcomes(outcomes: list[Outcome], console: Console) -> None:
    """One row a request."""
    table = plain_table(console)
    table.add_column("prompt", no_wrap=True, overflow="ellipsis", max_width=30, ratio=1)
    table.add_column("asked")
    table.add_column("tier: reason")
    table.add_column("right?")
    for heading in ("tokens", "first", "tok/s", "ATP", "left"):
        table.add_column(heading, justify="right", no_wrap=True)
    for outcome in outcomes:
        table.add_row(*(Text(cell) for cell in _row(outcome)))
    console.print(table)
    answered = [outcome for outcome in outcomes if outcome.answer is not None]
    right = sum(outcome.correct for outcome in answered)
    console.print(f"{right} of {len(answered)} answers right", highlight=False)


def _row(outcome: Outcome) -> tuple[str, ...]:
    spec, task = outcome.request.spec, outcome.request.task
    asked = spec.requested.value if spec.requested else "auto"
    head = (printable(task.prompt).replace("\n", " "), asked)
    answer = outcome.answer
    if answer is None or answer.started is None or answer.finished is None:
        return (*head, outcome.refusal or outcome.failure, "-", "-", "-", "-", "0", "-")
    route, finished = answer.started.route, answer.finished
    return (
        *head,
        f"{route.tier.value}: {route.reason}",
        "yes" if outcome.correct else f"no ({task.answer})",
        str(finished.usage.output_tokens),
        format_seconds(finished.timing.time_to_first_token_s),
        format_rate(finished.usage.output_tokens - 1, finished.timing.decode_s),
        atp_number(finished.price.charged_uatp),
        atp_number(finished.balance_uatp),
    )


def print_metrics(page: str, console: Console) -> None:
    """The series that the requests above have moved, as they are scraped."""
    for sample in samples(page):
        # The other phases' ratios are the same on this card: one says it.
        if sample.name in _SERIES and sample.value and sample.labels.get("phase") in _PHASES:
            console.print(sample.line, highlight=False, markup=False, soft_wrap=True)


def print_next_steps(console: Console) -> None:
    """What to try now."""
    for command in _NEXT:
        console.print(f"  {command}", highlight=False, markup=False, soft_wrap=True)
