"""What the demo prints about its requests and metrics.

Owns: the outcome of a request, the account's terms, the table, the choice of series, the next
commands.
Does not know: the daemon, how a request is made.
Fails: never.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass

from rich.console import Console
from rich.text import Text

from sage_fed.cli.ask import Answer
from sage_fed.cli.demo_plan import DemoRequest
from sage_fed.cli.render import atp_number, format_rate, format_seconds, printable
from sage_fed.cli.scrape import samples
from sage_fed.cli.tables import plain_table
from sage_fed.core import UATP_PER_ATP, Budget
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

_COLUMNS = (
    "prompt", "asked", "tier: reason", "right?", "tokens", "first", "tok/s", "ATP", "left",
)  # fmt: skip
_NUMBERS = frozenset({"tokens", "first", "tok/s", "ATP", "left"})
_WIDE = 118  # columns of the terminal
_WIDE_ONLY = frozenset({"asked", "first", "tok/s", "left"})
_WIDE_PROMPT, _NARROW_PROMPT = 25, 21

_PHASES = (None, "decode")

_WRONG = "wrong answers are expected of models this small: see sage_fed/models/MODEL_CARD.md"

_ACTIVATE = ". .venv/bin/activate"
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
    """One row a request; a narrow terminal gets what its answers above have not told."""
    wide = console.width >= _WIDE
    shown = _COLUMNS if wide else tuple(name for name in _COLUMNS if name not in _WIDE_ONLY)
    table = plain_table(console)
    for name in shown:
        table.add_column(name, justify="right" if name in _NUMBERS else "left", no_wrap=True)
    for outcome in outcomes:
        row = _row(outcome, _WIDE_PROMPT if wide else _NARROW_PROMPT)
        table.add_row(*(Text(row[name]) for name in shown))
    console.print(table)
    answered = [outcome for outcome in outcomes if outcome.answer is not None]
    right = sum(outcome.correct for outcome in answered)
    console.print(f"\n{right} of {len(answered)} answers right", highlight=False)
    if right < len(answered):
        _plain(_WRONG, console)


def _row(outcome: Outcome, prompt_width: int) -> dict[str, str]:
    """Every column's text."""
    spec, task = outcome.request.spec, outcome.request.task
    prompt = printable(task.prompt).replace("\n", " ")
    if len(prompt) > prompt_width:
        prompt = f"{prompt[: prompt_width - 1]}…"
    row = dict.fromkeys(_COLUMNS, "-")
    row |= {"prompt": prompt, "asked": spec.requested.name if spec.requested else "auto"}
    answer = outcome.answer
    if answer is None or answer.started is None or answer.finished is None:
        return row | {"tier: reason": outcome.refusal or outcome.failure, "ATP": "0.00"}
    route, finished = answer.started.route, answer.finished
    rate = format_rate(finished.usage.output_tokens - 1, finished.timing.decode_s)
    return row | {
        "tier: reason": f"{route.tier.name}: {route.reason}",
        "right?": "yes" if outcome.correct else "no",
        "tokens": str(finished.usage.output_tokens),
        "first": format_seconds(finished.timing.time_to_first_token_s),
        "tok/s": rate or "-",
        "ATP": atp_number(finished.price.charged_uatp),
        "left": atp_number(finished.balance_uatp),
    }


def print_metrics(page: str, console: Console) -> None:
    """The series that the requests above have moved, as they are scraped."""
    for sample in samples(page):
        # The other phases' ratios are the same on this card: one says it.
        if sample.name in _SERIES and sample.value and sample.labels.get("phase") in _PHASES:
            _plain(sample.line, console)


def print_next_steps(console: Console) -> None:
    """What to try now, and before it how to find `sage-fed` where the shell does not."""
    preface = () if shutil.which("sage-fed") else (_ACTIVATE,)
    for command in (*preface, *_NEXT):
        _plain(f"  {command}", console)


def print_terms(budget: Budget, console: Console) -> None:
    """What the account starts with, so that the balances below can be followed."""
    start = f"{budget.balance_uatp / UATP_PER_ATP:,.0f}"
    refill = f"{budget.refill_uatp_per_s / UATP_PER_ATP:,g}"
    _plain(
        f"the account starts with {start} ATP and refills {refill} ATP/s; prompt tokens cost too",
        console,
    )


def _plain(line: str, console: Console) -> None:
    console.print(line, highlight=False, markup=False, soft_wrap=True)
