"""How amounts, times and values look on a terminal, in JSON and, for a start, in the log.

Owns: formatting and parsing of ATP, seconds, bytes; fields under each other; a start's progress as
log lines.
Does not know: where a value came from; rich, until a table is drawn.
Fails: `ValueError` for an amount that is no amount.
"""

from __future__ import annotations

import json
import shutil
import sys
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from decimal import ROUND_HALF_EVEN, Decimal, InvalidOperation
from typing import TYPE_CHECKING

import typer

from sage_fed.cli.streams import between_words
from sage_fed.core import UATP_PER_ATP, CardFit, DaemonStatus, Tier, to_plain

if TYPE_CHECKING:
    from rich.console import Console

_CENT = Decimal("0.01")
_LARGEST_ATP = Decimal(2**63 - 1) / UATP_PER_ATP


def format_atp(uatp: int) -> str:
    """`12.35 ATP`; below a tenth every digit counts, so none is dropped."""
    return f"{atp_number(uatp)} ATP"


def atp_number(uatp: int) -> str:
    """The number of `format_atp` without its unit, for a column that names it."""
    amount = Decimal(uatp) / UATP_PER_ATP
    if uatp and abs(amount) < Decimal("0.1"):
        return f"{amount:.6f}".rstrip("0")
    return f"{amount.quantize(_CENT, ROUND_HALF_EVEN):,}"


def parse_atp(text: str) -> int:
    """ATP as a person writes it to uATP, rounded down: a limit never grows by rounding."""
    try:
        amount = Decimal(text)
    except InvalidOperation:
        raise ValueError(f"{text!r} is not an amount of ATP, such as 12.5") from None
    if not amount.is_finite() or not 0 <= amount <= _LARGEST_ATP:
        raise ValueError(f"{text!r} is not an amount of ATP of 0 or more")
    return int(amount * UATP_PER_ATP)


def format_seconds(seconds: float) -> str:
    """Three digits or so with the unit that fits: `850 us`, `12.3 ms`, `1.25 s`, `3 min 20 s`."""
    if seconds < 0.001:
        return f"{seconds * 1e6:.0f} us"
    if seconds < 1:
        return f"{seconds * 1e3:.{1 if seconds < 0.1 else 0}f} ms"
    if seconds < 120:
        return f"{seconds:.{2 if seconds < 10 else 1}f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def format_bytes(num_bytes: int) -> str:
    """Binary units, as the KV budgets are set in: `15.2 MiB`."""
    amount = float(num_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if amount < 1024:
            return f"{amount:.0f} B" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1024
    return f"{amount:.1f} TiB"


def format_rate(tokens: int, seconds: float) -> str:
    """Tokens a second, or nothing where nothing was timed."""
    return f"{tokens / seconds:,.0f}" if tokens > 0 and seconds > 0 else ""


def card_fit(now: DaemonStatus) -> str:
    """Whether the prices belong to this machine, loudly where they do not."""
    fit = now.rate_card_fit
    return f"{'STALE' if fit is CardFit.STALE else fit.value}: {headline(now.rate_card_note)}"


def headline(note: str) -> str:
    """A card's note for a person; the lines below it are for the log and for programs."""
    return note.partition("\n")[0]


def join_parts(parts: Iterable[str], width: int) -> list[str]:
    """The parts with dots between them, on lines of at most `width` that break only there."""
    lines: list[str] = []
    for part in parts:
        longer = f"{lines[-1]} · {part}" if lines else part
        if lines and len(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(part)
    return lines


def printable(text: str) -> str:
    """The text without terminal control codes: a model's output must not drive the terminal."""
    return "".join(char for char in text if char in "\n\t" or unicodedata.category(char) != "Cc")


def print_json(value: object) -> None:
    """One object on one line, so that `jq` and a line reader both work."""
    typer.echo(json.dumps(to_plain(value), ensure_ascii=False))


def print_table(rows: Iterable[Mapping[str, str]]) -> None:
    """Print rows of cells by heading on stdout; a heading with `>` before it is of numbers."""
    from sage_fed.cli.drawing import draw  # noqa: PLC0415 - a tenth of a second that `ask` saves

    draw(tuple(rows))


def plain_line(console: Console, line: str, style: str | None = None) -> None:
    """Print a line as it is: no markup, no highlighting, not broken to the console's width."""
    console.print(line, style=style, highlight=False, markup=False, soft_wrap=True)


def print_fields(fields: Sequence[tuple[str, str]]) -> None:
    """Names and values under each other; on a terminal a long value is broken between words."""
    indent = max(len(name) for name, _ in fields) + 2
    width = 0
    if sys.stdout.isatty():
        width = shutil.get_terminal_size().columns - indent
    for name, value in fields:
        for index, line in enumerate(between_words(value, width)):
            typer.echo(f"{'' if index else name:<{indent}}{line}")


class LineProgress:
    """A start's progress where nothing is drawn: a line for each quarter that a tier has loaded."""

    def __init__(self, show: Callable[[str], None]) -> None:
        self._show = show
        self._quarters: dict[Tier, int] = {}

    def tier_progress(self, tier: Tier, share: float, text: str) -> None:
        """Say where a new quarter begins."""
        quarter = int(share * 4)
        if quarter != self._quarters.get(tier):
            self._quarters[tier] = quarter
            self._show(f"{tier.name}: {share:.0%} {text}")

    def ready(self, listen: str, metrics_url: str) -> None:
        """Say where to connect."""
        self._show(ready_line(listen, metrics_url))

    def close(self) -> None:
        """Nothing is open."""


def ready_line(listen: str, metrics_url: str) -> str:
    """The one line that says where to connect."""
    return f"ready on {listen}, metrics on {metrics_url}"
