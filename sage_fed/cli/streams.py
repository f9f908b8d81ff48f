"""The three standard streams, as a shell may hand them over: closed, full, or left by their reader.

Owns: what happens then; how a complaint looks on a terminal.
Does not know: what is read or written.
Fails: with an exit code, after one line on stderr where a person can still read it.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import shutil
import signal
import sys
import textwrap
import threading
from collections.abc import Iterator
from types import FrameType
from typing import NoReturn

_INTERRUPTED = 130
_PIPE_CLOSED = 141
_WRITE_ERRORS = frozenset(
    {errno.EPIPE, errno.ENOSPC, errno.EBADF, errno.EIO, errno.EDQUOT, errno.EFBIG}
)


def open_standard_streams() -> None:
    """Make all three exist, and able to carry any text.

    A closed one would be None here, and its number would go to the next socket, into which
    stray output then lands. Reading a closed stdin finds nothing; writing to a closed
    stdout fails, because an answer that is paid for must not vanish silently.
    """
    if sys.stdin is None:
        sys.stdin = os.fdopen(os.open(os.devnull, os.O_RDONLY))
    if sys.stdout is None:
        sys.stdout = os.fdopen(os.open(os.devnull, os.O_RDONLY), "w")
    if sys.stderr is None:
        sys.stderr = os.fdopen(os.open(os.devnull, os.O_WRONLY), "w")
    for stream, errors in ((sys.stdin, "surrogateescape"), (sys.stdout, "backslashreplace")):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=errors)


@contextlib.contextmanager
def leave_on_interrupt() -> Iterator[None]:
    """Leave at once on Ctrl-C: for imports, which have nothing to clean up.

    A KeyboardInterrupt in the middle of an import is a traceback at best.
    """
    ours = (
        threading.current_thread() is threading.main_thread()
        # Ignored by a parent such as nohup: it stays ignored.
        and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    )
    if ours:
        signal.signal(signal.SIGINT, lambda *_: os._exit(_INTERRUPTED))
    try:
        yield
    finally:
        if ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)


@contextlib.contextmanager
def exit_on_signals() -> Iterator[None]:
    """Leave by an exception on SIGTERM and SIGHUP, so that what was started is stopped."""

    def leave(number: int, _frame: FrameType | None) -> NoReturn:
        # A second one must not interrupt the stopping.
        signal.signal(number, signal.SIG_IGN)
        sys.exit(128 + number)

    before = {number: signal.signal(number, leave) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def complain(line: str) -> None:
    """Write one line to stderr; a terminal gets it broken between words."""
    width = 0
    if sys.stderr.isatty():
        width = shutil.get_terminal_size().columns
    print("\n".join(between_words(line, width)), file=sys.stderr, flush=True)


def between_words(text: str, width: int) -> list[str]:
    """The text in lines of at most `width`, no word cut; one line where `width` is 0."""
    if width <= 0:
        return [text]
    return textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False) or [""]


def is_output_failure(error: OSError) -> bool:
    """Whether a write failed, and not something with a file of ours, which has a name."""
    return error.filename is None and error.errno in _WRITE_ERRORS


def give_up_output(failure: OSError) -> int:
    """Write nothing more, and return the exit code.

    A reader that has enough is no error to tell anybody, as with every Unix tool.
    """
    silenced = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            # Otherwise the interpreter tries once more when it exits, and complains.
            os.dup2(silenced, stream.fileno())
    if isinstance(failure, BrokenPipeError):
        return _PIPE_CLOSED
    complain(f"error: the output cannot be written: {failure.strerror}")
    return 1
