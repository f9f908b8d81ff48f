"""The ledger's files: who may open them, and how; and the lock, which remembers how far they got.

Owns the connection, its pragmas, `<path>.lock`, and the words for what a disk does. Knows no
bookkeeping. One process writes, the holder of the lock; readers need none.
The lock remembers that there was a ledger and where it ended. One that is lost is never begun
anew, with every account's first grant; one that ends earlier, because its log or a part of it is
gone or a file is an older copy, is not gone on with: unless an operator asks for it by removing the
lock. It also remembers how much of the books was in the one file when its log was last begun anew,
which an older copy of that file under the newer log does not have. An opening that is refused
takes nothing out of the files.
Fails with `ConfigError` where there is no ledger to open or no lock can be made, `Occupied` where
another process writes, `LedgerCorrupt` where it is damaged or lost, and `LedgerUnusable` where the
disk or its permissions are in the way.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import apsw

from sage_fed.errors import ConfigError, LedgerCorrupt, LedgerUnusable, Occupied
from sage_fed.ledger.schema import MIGRATIONS, last_entry_id, migrate, require_known
from sage_fed.trusted_files import refuse_link, require_trusted

BUSY_MS = 5000
"""How long an opening or a reader waits for another program that has the ledger locked."""

_DISK = (
    apsw.BusyError,
    apsw.CantOpenError,
    apsw.IOError,
    apsw.LockedError,
    apsw.PermissionsError,
    apsw.ProtocolError,
    apsw.ReadOnlyError,
)
"""Errors of the world; SQLite's others are bugs of ours."""

_PASSING = (
    apsw.SQLITE_IOERR_WRITE,
    apsw.SQLITE_IOERR_SHMSIZE,
    apsw.SQLITE_IOERR_TRUNCATE,
)
"""Of `IOError`, what may pass. A failed `fsync` is not among them: what it left is unknown."""

_FULL = (errno.ENOSPC, errno.EDQUOT)

log = logging.getLogger(__name__)


@contextlib.contextmanager
def writable(
    path: Path, prove: Callable[[apsw.Connection], None] = lambda _: None
) -> Iterator[OpenBook]:
    """Open the ledger for its one writer, made or migrated where needed; closed at the end.

    A migration is undone where `prove` raises. Where the block fails the files are left as they
    are: what SQLite would tidy up may not be ours any more.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(_typed_errors(path))
        # First: a start that is refused leaves no lock behind, which would say that there were
        # books. Again under the lock, which is what counts.
        _require_trusted(path)
        lock = stack.enter_context(hold_lock(path))
        if path.exists():
            _require_book(path)
            _require_trusted(path)
        else:
            _require_no_book(path)
            with made_whole(path) as fresh, contextlib.closing(apsw.Connection(str(fresh))) as db:
                migrate(db)
        logged = _beside(path, "-wal").exists()
        alone = _without_log(path) if logged and lock.in_book else None
        db = stack.enter_context(contextlib.closing(apsw.Connection(str(path))))
        if db.readonly("main"):
            # SQLite would only say so at the first write, when the daemon is up.
            raise LedgerUnusable(f"the ledger {path} cannot be used: it may not be written")
        if path.stat().st_mode & 0o077:
            path.chmod(0o600)
        _configure(db)
        version = require_known(db)
        stack.enter_context(_untidied(db))
        if version == 0:
            raise _lost_ledger(path, "is empty or damaged")
        if missing := _missing_entries(path, db, lock.last):
            raise LedgerCorrupt(missing)
        if alone is not None and alone < lock.in_book:
            raise LedgerCorrupt(
                f"the ledger {path} ends at entry {alone} without its log, which was begun "
                f"after entry {lock.in_book}: it is an older copy under a newer log. Put "
                "the files back as they were, or restore a backup"
            )
        if version < len(MIGRATIONS):
            began_s = time.monotonic()
            migrate(db, prove)
            log.info(
                "the ledger %s was migrated from version %d to version %d in %.1f s",
                path, version, len(MIGRATIONS), time.monotonic() - began_s,
            )  # fmt: skip
        last = last_entry_id(db)
        lock.begin(last, lock.in_book if logged else last)
        book = OpenBook(db, lock, doubted=logged and alone is None)
        yield stack.enter_context(contextlib.closing(book))


class OpenBook:
    """The ledger, open for its writer.

    `doubted`: its file was not looked into without its log, so only an audit of everything can
    tell whether the two belong together.
    """

    def __init__(self, db: apsw.Connection, lock: Lock, *, doubted: bool) -> None:
        self.db = db
        self.doubted = doubted
        self._files = OpenFiles(db)
        self._lock = lock
        self._log = os.open(db.filename_wal, os.O_RDONLY | os.O_CLOEXEC)
        self._salts = self._read_salts()

    def close(self) -> None:
        """Let go of the log; the connection is its owner's."""
        os.close(self._log)

    def verify(self) -> None:
        """Make sure that what is written goes where people find it; around each commit."""
        self._files.verify()

    def acknowledge(self) -> None:
        """Remember, behind a commit, how far the books have got, and how far without their log.

        SQLite begins the log anew, under other salts, once all that was in it is in the book: what
        the commit before this one had acknowledged.
        """
        in_book = self._lock.in_book
        if (salts := self._read_salts()) != self._salts:
            self._salts, in_book = salts, self._lock.last
        self._lock.acknowledge(last_entry_id(self.db), in_book)

    def _read_salts(self) -> bytes:
        return os.pread(self._log, 8, 16)


class OpenFiles:
    """The files that a connection to a ledger has just opened, and the lock, as they were then.

    A file that was removed, replaced or cut takes what is written to it along: nothing may be
    acknowledged then.
    """

    def __init__(self, db: apsw.Connection) -> None:
        self._book = Path(db.filename)
        others = (Path(db.filename_wal), _beside(self._book, "-shm"), lock_path(self._book))
        self._opened = {path: _identity(path.stat()) for path in (self._book, *others)}
        self._bytes = self._book.stat().st_size

    def verify(self) -> None:
        """Look at every file; a few microseconds, beside the milliseconds of a commit.

        Raises `LedgerUnusable`, whose text names the file.
        """
        for path, opened in self._opened.items():
            try:
                status = path.stat()
            except FileNotFoundError:
                raise _lost_file(path, "removed") from None
            if _identity(status) != opened:
                raise _lost_file(path, "replaced")
            if path == self._book:
                if status.st_size < self._bytes:
                    raise _lost_file(path, "cut short")
                self._bytes = status.st_size


@contextlib.contextmanager
def snapshot(path: Path) -> Iterator[tuple[apsw.Connection, str]]:
    """Open one snapshot of the ledger, beside a running writer or without one.

    With it goes what to tell where the books end before what had been acknowledged; else "".
    """
    with _typed_errors(path):
        # Before the snapshot that is to have it: beside a running daemon both go on.
        acknowledged = read_acknowledged(path)
        if not path.exists():
            _require_no_book(path)
            raise ConfigError(f"there is no ledger at {path}")
        _require_book(path)
        with contextlib.closing(connect_reader(path)) as db:
            version = require_known(db)
            if version == 0:
                raise _lost_ledger(path, "is empty or damaged")
            if version != len(MIGRATIONS):
                raise ConfigError(
                    f"{path} has an older version; start the daemon once to migrate it"
                )
            db.execute("BEGIN")
            yield db, _missing_entries(path, db, acknowledged or 0)


def connect_reader(path: Path) -> apsw.Connection:
    """Connect to read only; beside a writer each transaction sees its last commit."""
    uri = path.absolute().as_uri()
    flags = apsw.SQLITE_OPEN_READONLY | apsw.SQLITE_OPEN_URI
    if not _beside(path, "-wal").exists():
        # Closed cleanly: everything is in the one file. Without this SQLite would make its
        # side files, which fails in a directory that the reader may not write.
        if _writer_alive(path):
            raise ConfigError(f"{path} is just being opened or closed; try again")
        return apsw.Connection(f"{uri}?immutable=1", flags=flags)
    db = apsw.Connection(f"{uri}?mode=ro", flags=flags)
    db.set_busy_timeout(BUSY_MS)
    return db


def may_pass(error: apsw.Error) -> bool:
    """Whether a write was refused, so that nothing was changed and it may be tried again.

    By a disk, or by another program that has the ledger locked.
    """
    if isinstance(error, apsw.IOError):
        # Set on every error; the stubs of apsw leave it out.
        return error.extendedresult in _PASSING  # type: ignore[attr-defined]
    return isinstance(
        error, apsw.BusyError | apsw.FullError | apsw.ProtocolError | apsw.ReadOnlyError
    )


def unusable(path: Path, error: apsw.Error | OSError) -> LedgerUnusable:
    """Say in words what a disk did."""
    if isinstance(error, OSError):
        full, why = error.errno in _FULL, error.strerror
    else:
        full, why = isinstance(error, apsw.FullError), str(error)
    if full:
        return LedgerUnusable(f"no space left on {path.parent}")
    if isinstance(error, apsw.BusyError | apsw.ProtocolError):
        return LedgerUnusable(f"another program has locked the ledger {path}")
    return LedgerUnusable(f"the ledger {path} cannot be used: {why}")


@contextlib.contextmanager
def made_whole(path: Path) -> Iterator[Path]:
    """Make a private file beside `path`, which takes its name at the end: whole or not at all."""
    fresh = _beside(path, ".new")
    files = [fresh, *(_beside(fresh, suffix) for suffix in ("-journal", "-wal", "-shm"))]
    try:
        for leftover in files:
            leftover.unlink(missing_ok=True)
        # Others may write to this directory: nothing is written through a link there.
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        os.close(os.open(fresh, flags, 0o600))
        yield fresh
        _sync(fresh)
        fresh.rename(path)
        _sync(path.parent)
    finally:
        for leftover in files:
            leftover.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def lock_path(path: Path) -> Path:
    """The lock of the ledger at `path`."""
    return _beside(path, ".lock")


MARK = b"Keep this file: it keeps a second daemon out, and lost books from being begun anew.\n"

_LAST = re.compile(
    re.escape(MARK)
    + rb"last acknowledged entry: (\d{20})\n"
    + rb"(?:in the book without its log: (\d{20})\n)?"
)


class Lock:
    """The lock, held: `last` is the last acknowledged entry, or 0.

    `in_book` is the last of which it is known that the book has it without its log, or 0.
    The numbers are written behind the commit and without a sync of its own. The death of a process
    takes nothing of them along, a power failure perhaps their last seconds, and they are never
    ahead of what is on disk: books that end before them have lost something.
    """

    def __init__(self, descriptor: int, path: Path) -> None:
        self._descriptor = descriptor
        # A size first: what is no file may have an endless content.
        self._begun = os.fstat(descriptor).st_size > 0
        text = os.pread(descriptor, 4096, 0) if self._begun else MARK
        self.last, self.in_book = _parse(text, path)

    def begin(self, last: int, in_book: int) -> None:
        """Remember, durably, that there is a ledger and where it ends."""
        if not self._begun or (last, in_book) != (self.last, self.in_book):
            self._write(last, in_book)
            os.fsync(self._descriptor)

    def acknowledge(self, last: int, in_book: int) -> None:
        """Remember a later end, and how much of it is in the book itself.

        A disk that takes nothing now leaves earlier numbers, which are also true.
        """
        if last <= self.last and in_book == self.in_book:
            return
        try:
            self._write(last, in_book)
        except OSError as error:
            if error.errno not in (*_FULL, errno.EROFS):
                raise

    def _write(self, last: int, in_book: int) -> None:
        # Always as long, and within one sector: an overwriting is whole or did not happen.
        numbers = b"last acknowledged entry: %020d\nin the book without its log: %020d\n"
        os.pwrite(self._descriptor, MARK + numbers % (last, in_book), 0)
        self.last, self.in_book = last, in_book


@contextlib.contextmanager
def hold_lock(path: Path) -> Iterator[Lock]:
    """Keep every other writer of the ledger at `path` out."""
    file = lock_path(path)
    refuse_link("the ledger's lock", file)
    try:
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(file, flags, 0o600)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        raise ConfigError(f"the ledger's lock beside {path}: {error.strerror}") from error
    try:
        require_trusted("the ledger's lock", file, os.fstat(descriptor), opened=descriptor)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise Occupied(
                f"the ledger {path} is open in another process; stop that daemon, or give this "
                "one its own state directory"
            ) from error
        yield Lock(descriptor, file)
    finally:
        # The file stays: removing it would let two processes lock two different files.
        os.close(descriptor)


def read_acknowledged(path: Path) -> int | None:
    """The last acknowledged entry, without the lock and beside its holder; None before any."""
    file = lock_path(path)
    try:
        while (text := file.read_bytes()) != file.read_bytes():
            pass  # the holder wrote between the two, so half of it may be old
    except FileNotFoundError:
        return None
    return _parse(text, file)[0] if text else None


def _parse(text: bytes, file: Path) -> tuple[int, int]:
    if text == MARK:
        return 0, 0  # of a program that did not count yet
    match = _LAST.fullmatch(text)
    if match is None:
        raise LedgerCorrupt(
            f"{file} is damaged, which remembers how far the ledger had got; put it back, or "
            "remove it where `sage-fed ledger check` says that the books are as they should be"
        )
    return int(match[1]), int(match[2] or 0)


def _writer_alive(path: Path) -> bool:
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


def _missing_entries(path: Path, db: apsw.Connection, acknowledged: int) -> str:
    """What to tell and to do where the books end before what was acknowledged; else nothing."""
    last = last_entry_id(db)
    if last >= acknowledged:
        return ""
    return (
        f"the ledger {path} ends at entry {last}, but entry {acknowledged} had been acknowledged: "
        f"its log {path.name}-wal was removed, cut or replaced, or {path.name} is an older copy. "
        "Put the files back as they were, or restore a backup. Only to go on without what is "
        f"missing, remove {lock_path(path)}, which remembers it"
    )


def _without_log(path: Path) -> int | None:
    """Where the book ends without its log; None where that cannot be said.

    A crash in the middle of putting the log into it leaves pages of two times, each one whole.
    """
    uri = f"{path.absolute().as_uri()}?immutable=1"
    flags = apsw.SQLITE_OPEN_READONLY | apsw.SQLITE_OPEN_URI
    try:
        with contextlib.closing(apsw.Connection(uri, flags=flags)) as db:
            return last_entry_id(db)
    except apsw.Error:
        return None


@contextlib.contextmanager
def _untidied(db: apsw.Connection) -> Iterator[None]:
    """Where the block fails, leave the log where it is: it may be all that is left of something."""
    try:
        yield
    except BaseException:
        db.config(apsw.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, 1)
        raise


def _beside(path: Path, suffix: str) -> Path:
    return path.with_name(path.name + suffix)


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def _lost_file(path: Path, how: str) -> LedgerUnusable:
    return LedgerUnusable(
        f"{path} was {how} while the daemon had it open, so it writes nothing more; put the "
        "files back from a copy, then start again"
    )


def _lost_ledger(path: Path, how: str) -> LedgerCorrupt:
    return LedgerCorrupt(
        f"the ledger {path} {how}; restore it from a copy. Only to begin new books, with every "
        f"account's first grant again, remove every {path.name}* beside it"
    )


def _require_book(path: Path) -> None:
    if not path.is_file():
        raise ConfigError(f"the ledger {path} is not a file")
    if path.stat().st_size == 0:
        raise _lost_ledger(path, "is empty or damaged")


def _require_trusted(path: Path) -> None:
    """Refuse books, or a log of them, that another user may have changed."""
    for file in (path, _beside(path, "-wal")):
        with contextlib.suppress(FileNotFoundError):
            refuse_link("the ledger", file)
            require_trusted("the ledger", file, file.stat())


def _require_no_book(path: Path) -> None:
    """Refuse to begin where a book has been: its mark, its log or a link to it is still there."""
    lock_file = lock_path(path)
    marked = lock_file.exists() and lock_file.stat().st_size > 0
    if marked or path.is_symlink() or _beside(path, "-wal").exists():
        raise _lost_ledger(path, "is gone, but there was one")


def _configure(db: apsw.Connection) -> None:
    db.set_busy_timeout(BUSY_MS)
    if db.pragma("journal_mode", "wal") != "wal":
        raise ConfigError(f"{db.filename} is on a file system without shared memory, WAL needs it")
    # FULL: an acknowledged hold or settlement survives power loss, not only a crash.
    db.pragma("synchronous", "full")
    db.pragma("foreign_keys", True)
    db.pragma("trusted_schema", False)
    db.pragma("journal_size_limit", 64 * 2**20)


@contextlib.contextmanager
def _typed_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except (apsw.CorruptError, apsw.NotADBError) as error:
        raise LedgerCorrupt(f"{path} is damaged: {error}; restore it from a copy") from error
    except (apsw.FullError, *_DISK, OSError) as error:
        raise unusable(path, error) from error
