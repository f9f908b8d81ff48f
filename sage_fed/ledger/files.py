"""Whether the files that the writer has open are still the ones that people see.

Owns what they were when they were opened. Knows neither SQL nor what is in them.
A file that was removed, replaced or cut takes what is written to it along: nothing may be
acknowledged then. Fails with `LedgerUnusable`, whose text names the file.
"""

from __future__ import annotations

import os
from pathlib import Path

from sage_fed.errors import LedgerUnusable


class OpenFiles:
    """The book, which only ever grows, and the files beside it, all just opened by their names."""

    def __init__(self, book: Path, *others: Path) -> None:
        self._book = book
        self._opened = {path: _identity(path.stat()) for path in (book, *others)}
        self._bytes = book.stat().st_size

    def verify(self) -> None:
        """Look at every file; a few microseconds, beside the milliseconds of a commit."""
        for path, opened in self._opened.items():
            try:
                status = path.stat()
            except FileNotFoundError:
                raise _lost(path, "removed") from None
            if _identity(status) != opened:
                raise _lost(path, "replaced")
            if path == self._book:
                if status.st_size < self._bytes:
                    raise _lost(path, "cut short")
                self._bytes = status.st_size


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def _lost(path: Path, how: str) -> LedgerUnusable:
    return LedgerUnusable(
        f"{path} was {how} while the daemon had it open, so it writes nothing more; put the "
        "files back from a copy, then start again"
    )
