"""The ledger's file: who may open it, and how.

Owns the connection, its pragmas and the words for what a disk does. Knows no bookkeeping.
One process writes, the holder of the lock. Readers need no lock, they see the last commit.
The lock remembers that there was a ledger and where it ended. One that is lost is never begun
anew, with every account's first grant; one that ends earlier, because its log or a part of it is
gone or a file is an older copy, is not gone on with: unless somebody asks for it by removing the
lock. It also remembers how much of the books was in the one file when its log was last begun anew,
which an older copy of that file under the newer log does not have. An opening that is refused
takes nothing out of the files.
Fails with `ConfigError` where there is no ledger to open, `LedgerCorrupt` where it is damaged or
lost, and `LedgerUnusable` where the disk or its permissions are in the way.

The file beside the ledger: who may write, and how far its writers have got.

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

Whether the files that the writer has open are still the ones that people see.

Owns what they were when they were opened. Knows neither SQL nor what is in them.
A file that was removed, replaced or cut takes what is written to it along: nothing may be
acknowledged then. Fails with `LedgerUnusable`, whose text names the file.
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
from sage_fed.ledger import schema
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
"""Of `IOError`, what may pass. A failed `fsync` is not among them: nobody knows what it left."""

FULL = (errno.ENOSPC, errno.EDQUOT)

log = logging.getLogger(__name__)


class OpenBook:
    """The ledger, open for its writer.

    `doubted`: its file was not looked into without its log, so only an audit of everything can
    tell whether the two belong together.
    """

    def __init__(self, db: apsw.Connection, held: Lock, *, doubted: bool) -> None:
        self.db = db
        self.doubted = doubted
        self._files = files_of(db)
        self._lock = held
        self._log = os.open(db.filename_wal, os.O_RDONLY | os.O_CLOEXEC)
        self._salts = self._read_salts()
        self._last_entry_id = last_entry_id(db)

    def close(self) -> None:
        """Let go of the log; the connection is its owner's."""
        os.close(self._log)

    def verify(self) -> None:
        """Make sure that what is written goes where people find it; around each commit."""
        self._files.verify()

    def acknowledge(self) -> None:
        """Remember, behind a commit, how far the books have got, and how far without their log.

        SQLite begins the log anew, under other salts, once all that was in it is in the book.
        """
        last, in_book = last_entry_id(self.db), None
        if (salts := self._read_salts()) != self._salts:
            self._salts, in_book = salts, self._last_entry_id
        self._last_entry_id = last
        self._lock.acknowledge(last, in_book)

    def _read_salts(self) -> bytes:
        return os.pread(self._log, 8, 16)


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
        held = stack.enter_context(hold_lock(path))
        if path.exists():
            _require_book(path)
            _require_trusted(path)
        else:
            _require_no_book(path)
            _make(path)
        logged = path.with_name(path.name + "-wal").exists()
        alone = _without_log(path) if logged and held.in_book() else None
        with contextlib.closing(apsw.Connection(str(path))) as db:
            if db.readonly("main"):
                # SQLite would only say so at the first write, when the daemon is up.
                raise LedgerUnusable(f"the ledger {path} cannot be used: it may not be written")
            if path.stat().st_mode & 0o077:
                path.chmod(0o600)
            _configure(db)
            version = schema.require_known(db)
            with _untidied(db):
                if version == 0:
                    raise _lost_ledger(path, "is empty or damaged")
                if missing := missing_entries(path, db, held.acknowledged()):
                    raise LedgerCorrupt(missing)
                if alone is not None and alone < (held.in_book() or 0):
                    raise LedgerCorrupt(
                        f"the ledger {path} ends at entry {alone} without its log, which was begun "
                        f"after entry {held.in_book()}: it is an older copy under a newer log. Put "
                        "the files back as they were, or restore a backup"
                    )
                _migrate(path, db, version, prove)
                held.begin(last_entry_id(db), None if logged else last_entry_id(db))
                book = OpenBook(db, held, doubted=logged and alone is None)
                with contextlib.closing(book):
                    yield book


def _migrate(
    path: Path, db: apsw.Connection, version: int, prove: Callable[[apsw.Connection], None]
) -> None:
    if version == len(schema.MIGRATIONS):
        return
    began_s = time.monotonic()
    schema.migrate(db, prove)
    log.info(
        "the ledger %s was migrated from version %d to version %d in %.1f s",
        path, version, len(schema.MIGRATIONS), time.monotonic() - began_s,
    )  # fmt: skip


def _without_log(path: Path) -> int | None:
    """Where the book ends without its log; None where that cannot be said.

    A crash in the middle of putting the log into it leaves pages of two times, each one whole.
    """
    uri = f"{path.absolute().as_uri()}?immutable=1"
    try:
        with contextlib.closing(
            apsw.Connection(uri, flags=apsw.SQLITE_OPEN_READONLY | apsw.SQLITE_OPEN_URI)
        ) as db:
            return last_entry_id(db)
    except apsw.Error:
        return None


def files_of(db: apsw.Connection) -> OpenFiles:
    """The files that a connection to a ledger has open, as they are now, and the lock."""
    book = Path(db.filename)
    return OpenFiles(book, Path(db.filename_wal), Path(f"{book}-shm"), lock_path(book))


def connect_reader(path: Path) -> apsw.Connection:
    """Connect beside the writer of this process, to read only; each transaction sees the last."""
    return _connect_readonly(path)


@contextlib.contextmanager
def _untidied(db: apsw.Connection) -> Iterator[None]:
    """Where the block fails, leave the log where it is: it may be all that is left of something."""
    try:
        yield
    except BaseException:
        db.config(apsw.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, 1)
        raise


def last_acknowledged(path: Path) -> int | None:
    """The last entry that a writer acknowledged, where there has been one.

    To be read before the snapshot that is to have it: beside a running daemon both go on.
    """
    with _typed_errors(path):
        return read_acknowledged(path)


def last_entry_id(db: apsw.Connection) -> int:
    """Where the books end; ids are counted from 1 and never reused, also not of what was folded."""
    return int(db.execute("SELECT last_entry_id FROM book").get)


def missing_entries(path: Path, db: apsw.Connection, acknowledged: int | None) -> str:
    """What to tell and to do where the books end before what was acknowledged; else nothing."""
    last = schema.last_entry_id(db)
    if last >= (acknowledged or 0):
        return ""
    return (
        f"the ledger {path} ends at entry {last}, but entry {acknowledged} had been acknowledged: "
        f"its log {path.name}-wal was removed, cut or replaced, or {path.name} is an older copy. "
        "Put the files back as they were, or restore a backup. Only to go on without what is "
        f"missing, remove {lock_path(path)}, which remembers it"
    )


@contextlib.contextmanager
def readable(path: Path) -> Iterator[apsw.Connection]:
    """Open one snapshot of the ledger, beside a running writer or without one."""
    with _typed_errors(path):
        if not path.exists():
            _require_no_book(path)
            raise ConfigError(f"there is no ledger at {path}")
        _require_book(path)
        with contextlib.closing(_connect_readonly(path)) as db:
            version = schema.require_known(db)
            if version == 0:
                raise _lost_ledger(path, "is empty or damaged")
            if version != len(schema.MIGRATIONS):
                raise ConfigError(
                    f"{path} has an older version; start the daemon once to migrate it"
                )
            db.execute("BEGIN")
            yield db


def _require_book(path: Path) -> None:
    if not path.is_file():
        raise ConfigError(f"the ledger {path} is not a file")
    if path.stat().st_size == 0:
        raise _lost_ledger(path, "is empty or damaged")


def _require_trusted(path: Path) -> None:
    """Refuse books, or a log of them, that somebody else may have changed."""
    for file in (path, path.with_name(path.name + "-wal")):
        with contextlib.suppress(FileNotFoundError):
            refuse_link("the ledger", file)
            require_trusted("the ledger", file, file.stat())


def _require_no_book(path: Path) -> None:
    """Refuse to begin where a book has been: its mark, its log or a link to it is still there."""
    lock_file = lock_path(path)
    marked = lock_file.exists() and lock_file.stat().st_size > 0
    if marked or path.is_symlink() or path.with_name(path.name + "-wal").exists():
        raise _lost_ledger(path, "is gone, but there was one")


def _lost_ledger(path: Path, how: str) -> LedgerCorrupt:
    return LedgerCorrupt(
        f"the ledger {path} {how}; restore it from a copy. Only to begin new books, with every "
        f"account's first grant again, remove every {path.name}* beside it"
    )


def _make(path: Path) -> None:
    """Make an empty ledger, whole or not at all: a crash leaves nothing under its name."""
    fresh = path.with_name(path.name + ".new")
    for leftover in (fresh, fresh.with_name(fresh.name + "-journal")):
        leftover.unlink(missing_ok=True)
    os.close(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    with contextlib.closing(apsw.Connection(str(fresh))) as db:
        db.pragma("synchronous", "extra")
        schema.migrate(db)
    fresh.replace(path)
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _connect_readonly(path: Path) -> apsw.Connection:
    uri = path.absolute().as_uri()
    flags = apsw.SQLITE_OPEN_READONLY | apsw.SQLITE_OPEN_URI
    if not path.with_name(path.name + "-wal").exists():
        # Closed cleanly: everything is in the one file. Without this SQLite would make its
        # side files, which fails in a directory that the reader may not write.
        if writer_alive(path):
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


def unusable(path: Path, error: apsw.Error) -> LedgerUnusable:
    """Say in words what a disk did."""
    if isinstance(error, apsw.FullError):
        return LedgerUnusable(f"no space left on {path.parent}")
    if isinstance(error, apsw.BusyError | apsw.ProtocolError):
        return LedgerUnusable(f"another program has locked the ledger {path}")
    return LedgerUnusable(f"the ledger {path} cannot be used: {error}")


@contextlib.contextmanager
def _typed_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except (apsw.CorruptError, apsw.NotADBError) as error:
        raise LedgerCorrupt(f"{path} is damaged: {error}; restore it from a copy") from error
    except (apsw.FullError, *_DISK) as error:
        raise unusable(path, error) from error
    except OSError as error:
        if error.errno in FULL:
            raise LedgerUnusable(f"no space left on {path.parent}") from error
        raise LedgerUnusable(f"the ledger {path} cannot be used: {error.strerror}") from error


def _configure(db: apsw.Connection) -> None:
    db.set_busy_timeout(BUSY_MS)
    if db.pragma("journal_mode", "wal") != "wal":
        raise ConfigError(f"{db.filename} is on a file system without shared memory, WAL needs it")
    # FULL: an acknowledged hold or settlement survives power loss, not only a crash.
    db.pragma("synchronous", "full")
    db.pragma("foreign_keys", True)
    db.pragma("trusted_schema", False)
    db.pragma("journal_size_limit", 64 * 2**20)


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
def hold_lock(path: Path) -> Iterator[Lock]:
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


def read_acknowledged(path: Path) -> int | None:
    """What `Lock.acknowledged` says, without the lock and beside its holder."""
    file = lock_path(path)
    try:
        while (text := file.read_bytes()) != file.read_bytes():
            pass  # the holder wrote between the two, so half of it may be old
    except FileNotFoundError:
        return None
    return _parse(text, file)[0] if text else None


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
                raise _lost_file(path, "removed") from None
            if _identity(status) != opened:
                raise _lost_file(path, "replaced")
            if path == self._book:
                if status.st_size < self._bytes:
                    raise _lost_file(path, "cut short")
                self._bytes = status.st_size


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def _lost_file(path: Path, how: str) -> LedgerUnusable:
    return LedgerUnusable(
        f"{path} was {how} while the daemon had it open, so it writes nothing more; put the "
        "files back from a copy, then start again"
    )
