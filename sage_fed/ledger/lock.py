"""The file beside the ledger: who may write, and how far its writers have got.

Owns `<path>.lock`: the advisory lock that one process holds as long as it lives, and the lines in
it, which say that there is a ledger, which entry of it was the last acknowledged one, and which one
was the last when the log was begun anew, so that everything up to it is in the book itself.
Knows no SQL.
The numbers are written behind the commit and without a sync of its own. The death of a process
takes nothing of them along, a power failure perhaps their last seconds, and they are never ahead of
what is on disk: books that end before them have lost something, whoever took it.
Fails with `Occupied` where another process writes, `ConfigError` where no lock can be made or
somebody else may change it, and
`LedgerCorrupt` where the lines are not ours.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
from collections.abc import Iterator
from pathlib import Path

from sage_fed.errors import ConfigError, LedgerCorrupt, Occupied
from sage_fed.trusted_files import refuse_link, require_trusted

MARK = b"Keep this file: it keeps a second daemon out, and lost books from being begun anew.\n"

_LAST = re.compile(
    re.escape(MARK)
    + rb"last acknowledged entry: (\d{20})\n"
    + rb"(?:in the book without its log: (\d{20})\n)?"
)

_TAKES_NOTHING = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


def lock_path(path: Path) -> Path:
    """The lock of the ledger at `path`."""
    return path.with_name(path.name + ".lock")


class Lock:
    """The lock, held."""

    def __init__(self, descriptor: int, path: Path) -> None:
        self._descriptor = descriptor
        self._path = path
        self._last, self._in_book = self._read() or (0, 0)

    def acknowledged(self) -> int | None:
        """The last acknowledged entry; None where there has been no ledger yet."""
        read = self._read()
        return None if read is None else read[0]

    def in_book(self) -> int:
        """The last entry of which it is known that the book has it without its log; or 0."""
        return self._in_book

    def begin(self, last_entry_id: int, in_book: int | None = None) -> None:
        """Remember, durably, that there is a ledger and where it ends; see `acknowledge`."""
        wanted = (last_entry_id, self._in_book if in_book is None else in_book)
        if self._read() != wanted:
            os.pwrite(self._descriptor, _text(*wanted), 0)
            os.fsync(self._descriptor)
        self._last, self._in_book = wanted

    def acknowledge(self, last_entry_id: int, in_book: int | None = None) -> None:
        """Remember a later end, and, where it is told, how much of it is in the book itself.

        A disk that takes nothing now leaves earlier numbers, which are also true.
        """
        in_book = self._in_book if in_book is None else in_book
        if last_entry_id <= self._last and in_book == self._in_book:
            return
        try:
            os.pwrite(self._descriptor, _text(last_entry_id, in_book), 0)
        except OSError as error:
            if error.errno not in _TAKES_NOTHING:
                raise
        else:
            self._last, self._in_book = last_entry_id, in_book

    def _read(self) -> tuple[int, int] | None:
        # A size first: what is no file may have an endless content.
        if os.fstat(self._descriptor).st_size == 0:
            return None
        return _parse(os.pread(self._descriptor, 4096, 0), self._path)


@contextlib.contextmanager
def held(path: Path) -> Iterator[Lock]:
    """Keep every other writer of the ledger at `path` out."""
    refuse_link("the ledger's lock", lock_path(path))
    try:
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(lock_path(path), flags, 0o600)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        raise ConfigError(f"the ledger's lock beside {path}: {error.strerror}") from error
    try:
        status = os.fstat(descriptor)
        require_trusted("the ledger's lock", lock_path(path), status, opened=descriptor)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise Occupied(
                f"the ledger {path} is open in another process; stop that daemon, or give this "
                "one its own state directory"
            ) from error
        yield Lock(descriptor, lock_path(path))
    finally:
        # The file stays: removing it would let two processes lock two different files.
        os.close(descriptor)


def writer_alive(path: Path) -> bool:
    """Whether a process holds the lock now."""
    try:
        descriptor = os.open(lock_path(path), os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def acknowledged(path: Path) -> int | None:
    """What `Lock.acknowledged` says, without the lock and beside its holder."""
    lock = lock_path(path)
    try:
        while (text := lock.read_bytes()) != lock.read_bytes():
            pass  # the holder wrote between the two, so half of it may be old
    except FileNotFoundError:
        return None
    return _parse(text, lock)[0] if text else None


def _text(last_entry_id: int, in_book: int) -> bytes:
    """Always as long, and within one sector: an overwriting is whole or did not happen."""
    return MARK + b"last acknowledged entry: %020d\nin the book without its log: %020d\n" % (
        last_entry_id,
        in_book,
    )


def _parse(text: bytes, lock: Path) -> tuple[int, int]:
    if text == MARK:
        return 0, 0  # of a program that did not count yet
    match = _LAST.fullmatch(text)
    if match is None:
        raise LedgerCorrupt(
            f"{lock} is damaged, which remembers how far the ledger had got; put it back, or "
            "remove it where `sage-fed ledger check` says that the books are as they should be"
        )
    return int(match[1]), int(match[2] or 0)
