"""Drawing on a terminal, and the plain form of the same in a pipe.

Owns: consoles, tables. Importing this costs a tenth of a second: commands import it when they draw.
Does not know: what is drawn.
Fails: `OSError` where stdout takes nothing; a console on stderr falls silent instead.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text
from rich.theme import Theme

from sage_fed.cli.render import printable

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
        """Tell whoever prints, unless it is the daemon's own story: that goes on untold."""
        if not self.stderr:
            # Called while the BrokenPipeError is handled.
            raise  # noqa: PLE0704
        self.quiet = True


def stdout_console() -> Console:
    """A console for tables: as wide as the terminal, or wide enough when piped."""
    console = _Console(highlight=False, theme=_THEME)
    return (
        console
        if console.is_terminal
        else _Console(highlight=False, theme=_THEME, width=_PLAIN_WIDTH)
    )


def stderr_console() -> Console:
    """A console for what is about the command, not its output."""
    return _Console(stderr=True, theme=_THEME)


def plain_table(console: Console) -> Table:
    """An empty table; its lines are for eyes, in a pipe there are columns only."""
    if console.is_terminal:
        # The line between the columns is a space, too.
        return Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    return Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))


def draw(headings: Sequence[str], rows: Iterable[Sequence[str]], right: Sequence[str]) -> None:
    """A table on stdout; `right` names the headings whose columns are numbers."""
    console = stdout_console()
    table = plain_table(console)
    for index, heading in enumerate(headings):
        # Folded, never cut: an id is there to be copied. What names the row stays whole.
        justify: Literal["left", "right"] = "right" if heading in right else "left"
        table.add_column(heading, justify=justify, overflow="fold", no_wrap=index == 0)
    for row in rows:
        # `Text`, not markup: square brackets in a prompt are themselves.
        table.add_row(*(Text(printable(cell)) for cell in row))
    console.print(table)
