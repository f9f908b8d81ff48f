"""A copy of the books as they are at one instant, taken beside a running daemon or without one.

Owns the copy: whole and audited, or not there. Knows nothing of schedules, and of where copies are
kept only that an older one is never written over.
Fails as `check` does, with `LedgerCorrupt` where the books, or their copy, are not sound, and with
`CannotWrite` where the copy cannot be put where it was asked for.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import apsw

from sage_fed.errors import CannotWrite, LedgerCorrupt
from sage_fed.ledger import store
from sage_fed.ledger.check import CheckReport, check


def backup(path: Path, copy: Path) -> CheckReport:
    """Copy the ledger at `path` into the new file `copy`; what is in it, by its own audit.

    It has everything that was acknowledged before the call. The writer goes on meanwhile.
    """
    if copy.exists() or copy.is_symlink():
        raise CannotWrite(f"{copy} is there already, and a backup replaces none; name another file")
    fresh = copy.with_name(copy.name + ".new")
    try:
        # A directory for backups may be everybody's: nothing is written through a link there.
        fresh.unlink(missing_ok=True)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        os.close(os.open(fresh, flags, 0o600))
        try:
            _copy(path, fresh)
            report = check(fresh)
            if report.violations:
                raise LedgerCorrupt(
                    f"the copy of {path} was not kept: {'; '.join(report.violations)}"
                )
            _sync(fresh)
            fresh.rename(copy)
            _sync(copy.parent)
        finally:
            for suffix in ("", "-journal", "-wal", "-shm"):
                fresh.with_name(fresh.name + suffix).unlink(missing_ok=True)
    except OSError as error:
        raise CannotWrite(f"{copy} cannot be written: {error.strerror}") from error
    return report


def _copy(path: Path, fresh: Path) -> None:
    acknowledged = store.acknowledged(path)
    with store.readable(path) as db, contextlib.closing(apsw.Connection(str(fresh))) as copied:
        if missing := store.missing_entries(path, db, acknowledged):
            raise LedgerCorrupt(missing)
        try:
            with copied.backup("main", db, "main") as pages:
                pages.step()
            # One file and nothing beside it, wherever it is read.
            copied.pragma("journal_mode", "delete")
        except (apsw.FullError, apsw.IOError) as error:
            raise CannotWrite(
                f"{fresh} cannot be written, its disk is full or failing: {error}"
            ) from error


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
