"""The ledger's file: who may open it, and how.

Owns the lock, the connection and its pragmas. Knows no bookkeeping.
One process writes: it holds an advisory lock on `<path>.lock` as long as it lives; a second
one gets `ConfigError`. Readers need no lock, they see the last commit.
Fails with `ConfigError` where the file cannot be opened and `LedgerCorrupt` where it is damaged.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

import apsw

from sage_fed.errors import ConfigError, LedgerCorrupt
from sage_fed.ledger import schema

BUSY_MS = 5000


@contextlib.contextmanager
def writable(path: Path) -> Iterator[apsw.Connection]:
    """Open the ledger for its one writer, made or migrated where needed; closed at the end."""
    with _locked(path), _typed_errors(path):
        db = apsw.Connection(str(path))
        try:
            path.chmod(0o600)
            _configure(db)
            schema.migrate(db)
        except BaseException:
            db.close()
            raise
        with contextlib.closing(db):
            yield db


@contextlib.contextmanager
def readable(path: Path) -> Iterator[apsw.Connection]:
    """Open one snapshot of the ledger, beside a running writer or without one."""
    if not path.is_file():
        raise ConfigError(f"there is no ledger at {path}")
    with _typed_errors(path), contextlib.closing(_connect_readonly(path)) as db:
        if schema.require_known(db) != len(schema.MIGRATIONS):
            raise ConfigError(f"{path} has an older version; start the daemon once to migrate it")
        db.execute("BEGIN")
        yield db


def _connect_readonly(path: Path) -> apsw.Connection:
    uri = path.absolute().as_uri()
    flags = apsw.SQLITE_OPEN_READONLY | apsw.SQLITE_OPEN_URI
    if not path.with_name(path.name + "-wal").exists():
        # Closed cleanly: everything is in the one file. Without this SQLite would make its
        # side files, which fails in a directory that the reader may not write.
        if _writer_alive(path):
            raise ConfigError(f"{path} is just being opened or closed; try again")
        return apsw.Connection(f"{uri}?immutable=1", flags=flags)
    db = apsw.Connection(f"{uri}?mode=ro", flags=flags)
    db.set_busy_timeout(BUSY_MS)
    return db


def _writer_alive(path: Path) -> bool:
    try:
        descriptor = os.open(_lock_path(path), os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def _lock_path(path: Path) -> Path:
    return path.with_name(path.name + ".lock")


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    try:
        descriptor = os.open(_lock_path(path), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise ConfigError(f"the ledger's lock beside {path}: {error.strerror}") from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(
                f"the ledger {path} is open in another process; stop that daemon, or give this "
                "one its own state directory"
            ) from error
        yield
    finally:
        # The file stays: removing it would let two processes lock two different files.
        os.close(descriptor)


@contextlib.contextmanager
def _typed_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except (apsw.CorruptError, apsw.NotADBError) as error:
        raise LedgerCorrupt(f"{path} is damaged: {error}; restore it from a copy") from error
    except apsw.CantOpenError as error:
        raise ConfigError(f"the ledger {path} cannot be opened: {error}") from error


def _configure(db: apsw.Connection) -> None:
    db.set_busy_timeout(BUSY_MS)
    if db.pragma("journal_mode", "wal") != "wal":
        raise ConfigError(f"{db.filename} is on a file system without shared memory, WAL needs it")
    # FULL: an acknowledged hold or settlement survives power loss, not only a crash.
    db.pragma("synchronous", "full")
    db.pragma("foreign_keys", True)
    db.pragma("trusted_schema", False)
    db.pragma("journal_size_limit", 64 * 2**20)
