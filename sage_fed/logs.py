"""What the daemon says, and to whom: JSON for a journal or a pipe, lines for people.

Owns the cleaning of every record, also of the libraries' (control characters written as escapes,
tokens blotted out, no exception's own words), and that a reader who is slow or stuck never stalls
an event loop: records are written by a thread, and what it cannot keep up with is counted.
Does not know what is logged.
Fails never: a log that cannot be written is no reason to stop.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import os
import re
import sys
import threading
import traceback
from collections.abc import Iterator, Mapping
from logging.handlers import QueueHandler, QueueListener
from queue import Full, Queue
from typing import TextIO

# The formatter of JSON lines with the longest upkeep; logging's own module has none.
from pythonjsonlogger.json import JsonFormatter

from sage_fed.core import counted, escaped
from sage_fed.errors import SageFedError

MAX_PENDING = 10_000
"""Records that wait for the writer; more are counted and forgotten."""

_FLUSH_S = 2.0
"""How long the last lines may take, at the end, where they are not read."""

_PLAIN = "%(asctime)s %(levelname)s %(name)s: %(message)s"
_SECRET = re.compile(r"(?i)(bearer\s+|sagefed_)[\w.~+/=-]+")
_OWN = "sage_fed"
_PRIORITIES = {logging.CRITICAL: 2, logging.ERROR: 3, logging.WARNING: 4, logging.INFO: 6}
_SPOKEN = (SageFedError, OSError)
"""Errors whose own words may be shown: ours are written for it, the system's name files."""


def clean(text: str) -> str:
    """The text on one line, without secrets and without what would repaint a terminal."""
    return _SECRET.sub(r"\1***", escaped(text))


def story_of(error: BaseException, *, words: bool = False) -> str:
    """The traceback with what is safe to show: frames and types, and words only of some errors.

    The words of another exception may quote what it choked on, which can be a prompt; `words`
    shows them all.
    """
    lines: list[str] = []
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        said = f": {clean(str(current))}" if words or isinstance(current, _SPOKEN) else ""
        frames = "".join(traceback.format_tb(current.__traceback__))
        lines.append(f"{frames}{type(current).__qualname__}{said}")
        if isinstance(current, BaseExceptionGroup):
            lines += [story_of(part, words=words) for part in current.exceptions]
        hidden = current.__suppress_context__
        current = current.__cause__ or (None if hidden else current.__context__)
    return "\n".join(lines)


class _Sender(QueueHandler):
    """Cleans a record and hands it to the writer; never waits."""

    _num_lost = 0

    def prepare(self, record: logging.LogRecord) -> logging.LogRecord:
        """The record as it may be written."""
        safe = copy.copy(record)
        text = record.getMessage()
        if not record.name.startswith(_OWN):
            # A library's further lines hold its objects as they print themselves.
            text = text.partition("\n")[0]
        safe.msg, safe.args, safe.exc_info = clean(text), None, None
        if record.exc_info and record.exc_info[1] is not None:
            debug = logging.getLogger().isEnabledFor(logging.DEBUG)
            safe.exc_text = story_of(record.exc_info[1], words=debug)
        return safe

    def enqueue(self, record: logging.LogRecord) -> None:
        """Hand it over, or count it."""
        try:
            if self._num_lost:
                self.queue.put_nowait(self._notice())
                self._num_lost = 0
            self.queue.put_nowait(record)
        except Full:
            self._num_lost += 1

    def _notice(self) -> logging.LogRecord:
        text = f"the log was read too slowly: {counted(self._num_lost, 'line')} lost"
        return logging.LogRecord(_OWN, logging.WARNING, "", 0, text, None, None)


class _Writer(QueueListener):
    """Writes what was handed over, in its own thread."""

    queue: Queue[logging.LogRecord | None]

    def enqueue_sentinel(self) -> None:
        """Ask the thread to end, however much it still has to write."""
        self.queue.put(None)


class _Json(JsonFormatter):
    """One object a line; for a journal after the priority that it reads (sd-daemon(3))."""

    def __init__(self, *, journal: bool) -> None:
        super().__init__(
            ["levelname", "name", "message"],
            rename_fields={"levelname": "level", "name": "logger", "exc_info": "exception"},
            timestamp="time",
        )
        self._journal = journal

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        line = super().format(record)
        return f"<{_PRIORITIES.get(record.levelno, 7)}>{line}" if self._journal else line


@contextlib.contextmanager
def logging_to(
    level: str, *, as_json: bool, handler: logging.Handler | None = None
) -> Iterator[None]:
    """Log from `level` on while the block runs, to stderr or to the given handler."""
    if handler is None or as_json:
        handler = logging.StreamHandler(sys.stderr)
        journal = reads_journal(os.environ, sys.stderr)
        handler.setFormatter(_Json(journal=journal) if as_json else logging.Formatter(_PLAIN))
    records: Queue[logging.LogRecord | None] = Queue(MAX_PENDING)
    sender, writer = _Sender(records), _Writer(records, handler)
    root = logging.getLogger()
    before = root.level
    root.addHandler(sender)
    root.setLevel(level.upper())
    logging.captureWarnings(capture=True)
    writer.start()
    try:
        yield
    finally:
        root.removeHandler(sender)
        root.setLevel(before)
        logging.captureWarnings(capture=False)
        # In a thread: a reader that takes nothing must not keep the daemon from leaving.
        ending = threading.Thread(target=writer.stop, daemon=True)
        ending.start()
        ending.join(_FLUSH_S)


def reads_journal(environ: Mapping[str, str], stream: TextIO) -> bool:
    """Whether the stream is the journal, which systemd names by device and inode."""
    try:
        stat = os.fstat(stream.fileno())
    except OSError:  # one in memory has no descriptor
        return False
    return environ.get("JOURNAL_STREAM") == f"{stat.st_dev}:{stat.st_ino}"
