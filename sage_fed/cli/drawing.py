"""What is drawn with rich: tables, progress, the live picture of `top`; plain in a pipe.

Owns: consoles, tables, bars, the picture of a reading. Importing this costs a tenth of a second:
commands import it when they draw.
Does not know: loading, gRPC, signals, where a reading comes from.
Fails: `OSError` where stdout takes nothing; a console on stderr falls silent instead. Progress may
be reported from any thread.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Literal

from rich import box
from rich.console import Console, Group, RenderableType
from rich.highlighter import NullHighlighter
from rich.live import Live
from rich.logging import RichHandler
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text
from rich.theme import Theme

from sage_fed.cli.render import (
    LineProgress,
    format_bytes,
    format_seconds,
    plain_line,
    printable,
    ready_line,
)
from sage_fed.cli.top import Percentiles, Reading, TierReading, Watch
from sage_fed.core import Tier

_PLAIN_WIDTH = 160  # of a table that goes to a file or pipe: nothing is cut to a window there


# Rich's own yellow, pink and blue each vanish on a light or on a dark background.
_THEME = Theme(
    {
        "bar.complete": "none",
        "log.time": "dim",
        "logging.level.info": "none",
        "progress.elapsed": "dim",
    }
)


class _Console(Console):
    """One whose reader may leave: rich would end the process, in its own way."""

    def on_broken_pipe(self) -> None:
        """Raise where a result is printed; the daemon's progress on stderr falls silent."""
        if not self.stderr:
            # Called while the BrokenPipeError is handled.
            raise  # noqa: PLE0704
        self.quiet = True


def stdout_console() -> Console:
    """A console for tables: as wide as the terminal, or wide enough when piped."""
    console = _Console(highlight=False, theme=_THEME)
    if not console.is_terminal:
        console.width = _PLAIN_WIDTH
    return console


def stderr_console() -> Console:
    """A console for what is about the command, not its output."""
    return _Console(stderr=True, theme=_THEME)


def draw(rows: Sequence[Mapping[str, str]], console: Console | None = None) -> None:
    """Print a table, the numbers of the columns with a `>` to the right."""
    console = console or stdout_console()
    # The lines are for eyes: in a pipe there are columns only.
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    if console.is_terminal:
        # The line between the columns is a space, too.
        table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for index, heading in enumerate(rows[0] if rows else ()):
        # Folded, never cut: an id is there to be copied. What names the row stays whole.
        justify: Literal["left", "right"] = "right" if heading.startswith(">") else "left"
        table.add_column(
            heading.removeprefix(">"), justify=justify, overflow="fold", no_wrap=index == 0
        )
    for row in rows:
        # `Text`, not markup: square brackets in a prompt are themselves.
        table.add_row(*(Text(printable(cell)) for cell in row.values()))
    console.print(table)


Move = Callable[[float, str], None]
"""Takes the share that is done and what is going on."""


class BarProgress:
    """One bar a tier, then one line. Log lines scroll above the bars."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bars = Progress(
            TextColumn("{task.fields[tier]:<9}"),
            BarColumn(bar_width=32),
            TextColumn("{task.percentage:>3.0f} %"),
            TimeElapsedColumn(),
            TextColumn("{task.description}"),
            console=console,
            transient=True,
        )
        self._tasks: dict[Tier, TaskID] = {}

    def log_handler(self) -> logging.Handler:
        """Log lines through the same console: printed beside it they would tear the bars."""
        handler = RichHandler(
            console=self._console,
            show_path=False,
            log_time_format="%X",
            highlighter=NullHighlighter(),
        )
        handler.setFormatter(logging.Formatter("%(message)s"))
        return handler

    def tier_progress(self, tier: Tier, share: float, text: str) -> None:
        """Move the tier's bar."""
        if not self._tasks:
            self._bars.start()
        if tier not in self._tasks:
            self._tasks[tier] = self._bars.add_task(text, total=1.0, tier=tier.name)
        self._bars.update(self._tasks[tier], completed=share, description=text)

    def ready(self, listen: str, metrics_url: str) -> None:
        """Take the bars away and say where to connect."""
        self.close()
        self._console.print(ready_line(listen, metrics_url), highlight=False)

    def close(self) -> None:
        """Give the terminal back."""
        self._bars.stop()


StartProgress = BarProgress | LineProgress


def start_progress(console: Console) -> StartProgress:
    """Return bars on a terminal, lines elsewhere."""
    if console.is_terminal:
        return BarProgress(console)
    return LineProgress(functools.partial(plain_line, console))


@contextlib.contextmanager
def watched_bar(*, as_json: bool) -> Iterator[Move]:
    """A bar on stderr while a person watches a command that prints its result afterwards.

    Nothing with `--json` and nothing off a terminal: a log is for what happened.
    """
    console = stderr_console()
    if not _watched(console, as_json=as_json):
        yield lambda _share, _text: None
        return
    bar = Progress(
        BarColumn(bar_width=24),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeElapsedColumn(),
        TextColumn("{task.description}", markup=False),
        console=console,
        transient=True,
    )
    with bar:
        task = bar.add_task("", total=1.0)
        yield lambda share, text: bar.update(task, completed=share, description=text)


def watched_line(text: str, *, as_json: bool) -> None:
    """A line where there would be a bar: for an import, which may be left without a farewell."""
    console = stderr_console()
    if _watched(console, as_json=as_json):
        console.print(text, highlight=False, markup=False)


def _watched(console: Console, *, as_json: bool) -> bool:
    return console.is_terminal and not as_json


_GOOD, _BAD, _FAINT = "green", "bold red", "dim"
_DRIFT = 0.25
"""Of the live cost ratio from the card's: from there on it is worth a calibration."""


def show_live(console: Console, watch: Watch, interval_s: float) -> None:
    """Draw until interrupted; a daemon that is away is looked for at every interval."""
    last: Reading | None = None
    began = True
    with Live(console=console, screen=True, auto_refresh=False) as live:
        while True:
            reading = watch.look()
            last = reading or last
            live.update(_scene(last, watch, console.width), refresh=True)
            # The second look soon: an empty picture for a whole interval is no start.
            watch.wait(min(interval_s, 0.5) if began or reading is None else interval_s)
            began = False


def _scene(last: Reading | None, watch: Watch, width: int) -> RenderableType:
    if watch.away:
        lost = Text(f"no answer from {watch.address}: {watch.away}; looking for it", style=_BAD)
        faded = drawn(last, watch.address, width=width, style=_FAINT) if last else Text("")
        return Group(lost, Text(""), faded)
    if last is None:
        return Text(f"looking at {watch.address}", style=_FAINT)
    return drawn(last, watch.address, width=width)


def drawn(reading: Reading, address: str, *, width: int, style: str = "") -> RenderableType:
    """The whole reading; `style` over all of it."""
    return Group(
        _heading(reading, address), Text(""), _tiers(reading, style), _both(reading, width)
    )


def _heading(reading: Reading, address: str) -> Text:
    ready = bool(reading.tiers) and all(tier.state == "ready" for tier in reading.tiers)
    heading = Text("sage-fed ", style="bold")
    heading.append(f"{printable(reading.version)}  ", style="none")
    heading.append("ready" if ready else "not ready", style=_GOOD if ready else _BAD)
    if reading.device_fallback:
        heading.append("  on a fallback device", style=_BAD)
    if not reading.ledger_writable:
        heading.append("  the ledger takes no entries", style=_BAD)
    if reading.up_s is not None:
        heading.append(f"  up {format_seconds(reading.up_s)}", style="none")
    heading.append(f"  {address}  {time.strftime('%H:%M:%S')}", style=_FAINT)
    return heading


Row = tuple[str, Callable[[TierReading], str]]


def _drafts(tier: TierReading) -> str:
    if tier.accepted_share is None or tier.accepted_per_draft is None:
        return "-"
    return f"{_bar(tier.accepted_share)}, {tier.accepted_per_draft:.1f} each"


_ROWS: tuple[Row, ...] = (
    ("model", lambda t: t.model or "-"),
    ("running, waiting", lambda t: f"{_count(t.running)}, {_count(t.waiting)}"),
    ("longest wait", lambda t: _seconds(t.oldest_waiting_s)),
    ("jobs that end", lambda t: _per_s(t.requests_per_s)),
    ("output tokens", lambda t: _per_s(t.output_tokens_per_s)),
    ("prompt tokens", lambda t: _per_s(t.prompt_tokens_per_s)),
    ("first token", lambda t: _percentiles(t.first_token)),
    ("between tokens", lambda t: _percentiles(t.between_tokens)),
    ("  both tiers busy", lambda t: _percentiles(t.between_tokens_contended)),
    ("speculating", lambda t: _count(t.speculating)),
    ("  drafts accepted", _drafts),
    ("device time", lambda t: _bar(t.device_share)),
    ("memory bandwidth", lambda t: _bar(t.bandwidth_share)),
    ("KV cache used", lambda t: _bar(t.kv_used_share)),
    ("  kept for later", lambda t: _bar(t.kv_cached_share)),
    ("routed here", lambda t: _bar(t.route_share)),
    ("charged", lambda t: _per_s(t.charged_atp_per_s, "ATP")),
    ("held", lambda t: "-" if t.held_atp is None else f"{t.held_atp:,.0f} ATP"),
)


def _tiers(reading: Reading, style: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0), style=style)
    table.add_column("", no_wrap=True)
    for tier in reading.tiers:
        heading = Text(tier.tier, style="bold")
        heading.append(f"  {tier.state}", style=_GOOD if tier.state == "ready" else _BAD)
        table.add_column(heading, min_width=24, overflow="fold")
    for name, show in _ROWS:
        table.add_row(
            Text(name, style=_FAINT), *(Text(printable(show(tier))) for tier in reading.tiers)
        )
    return table


def _both(reading: Reading, width: int) -> Text:
    card, live = reading.cost_ratio_card, reading.cost_ratio_live
    drift = abs(live / card - 1) if card and live else 0.0
    endings = (f"{kind} {rate:.1f}/s" for kind, rate in reading.endings_per_s.items())
    left, own = _bytes(reading.memory_available_bytes), _bytes(reading.daemon_bytes)
    lines = [
        ("endings", ", ".join(endings)),
        ("prices", f"{reading.rate_card}{' (STALE)' * reading.rate_card_stale}"),
        ("  strategic : tactical", f"{_ratio(card)} charged, {_ratio(live)} live"),
        ("denied", _per_s(reading.denied_atp_per_s, "ATP")),
        ("saved by two tiers", _saved(reading)),
        ("cascades", ", ".join(f"{k} {rate:.1f}/s" for k, rate in reading.cascades_per_s.items())),
        ("calls", f"{_count(reading.open_calls)} on {_count(reading.connections)} connections"),
        ("  unread", f"{_count(reading.unread_replies)}, {_bytes(reading.unread_bytes)}"),
        ("ledger, p99", _seconds(reading.commit_p99_s)),
        ("event loop, p99 late", f"{_seconds(reading.loop_lag_p99_s)}, {_bar(reading.loop_share)}"),
        ("memory", f"{left} left, daemon {own}"),
    ]
    if reading.gpu_power_watts is not None:
        lines.append(("power", f"{reading.gpu_power_watts:.0f} W"))
    text = Text()
    for name, value in lines:
        loud = drift > _DRIFT and "strategic" in name
        text.append(f"\n{name:<24}", style=_FAINT)
        text.append(printable(value or "-")[: max(width - 24, 20)], style=_BAD if loud else "none")
    return text


def _saved(reading: Reading) -> str:
    text = _per_s(reading.saved_atp_per_s, "ATP")
    extra = reading.extra_atp_per_s
    return f"{text}, {_per_s(extra, 'ATP')} paid more" if extra else text


def _bar(share: float | None, cells: int = 10) -> str:
    if share is None:
        return "-"
    full = round(min(max(share, 0.0), 1.0) * cells)
    return f"{'█' * full}{'░' * (cells - full)} {share:.0%}"


def _percentiles(of: Percentiles | None) -> str:
    if of is None:
        return "-"
    return f"p50 {format_seconds(of.p50_s)}, p95 {format_seconds(of.p95_s)}"


def _per_s(rate: float | None, unit: str = "") -> str:
    if rate is None:
        return "-"
    digits = 1 if rate < 10 else 0
    return f"{rate:,.{digits}f}{f' {unit}' * bool(unit)}/s"


def _seconds(seconds: float | None) -> str:
    return "-" if not seconds else format_seconds(seconds)


def _count(number: float | None) -> str:
    return "-" if number is None else f"{number:.0f}"


def _ratio(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f} : 1"


def _bytes(number: float | None) -> str:
    return "-" if number is None else format_bytes(int(number))
