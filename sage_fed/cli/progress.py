"""What a person sees while something takes long.

Owns: the pictures of a start, bars on a terminal and lines elsewhere, which are what
`sage_fed.daemon.serve` reports to; and the one bar of a command that ends.
Does not know: loading, gRPC, signals.
Fails: never; calls may come from any thread.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.highlighter import NullHighlighter
from rich.logging import RichHandler
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from sage_fed.cli.log_progress import ready_line
from sage_fed.cli.tables import stderr_console
from sage_fed.core import Tier

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


class LineProgress:
    """A plain line for each quarter that a tier has loaded."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._quarters: dict[Tier, int] = {}

    def tier_progress(self, tier: Tier, share: float, text: str) -> None:
        """Print where a new quarter begins."""
        quarter = int(share * 4)
        if quarter == self._quarters.get(tier):
            return
        self._quarters[tier] = quarter
        self._print(f"{tier.name}: {share:.0%} {text}")

    def ready(self, listen: str, metrics_url: str) -> None:
        """Say where to connect."""
        self._print(ready_line(listen, metrics_url))

    def close(self) -> None:
        """Nothing is open."""

    def _print(self, line: str) -> None:
        self._console.print(line, highlight=False, markup=False, soft_wrap=True)


StartProgress = BarProgress | LineProgress


def start_progress(console: Console) -> StartProgress:
    """Bars where somebody watches, lines where a journal reads."""
    return BarProgress(console) if console.is_terminal else LineProgress(console)


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
