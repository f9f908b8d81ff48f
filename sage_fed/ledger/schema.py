"""The books' tables, and how an older file becomes a current one.

Owns the DDL. Knows no operation: what an operation may never do is refused here, by the
database, so that a bug above cannot write it: entries are only ever added, a balance is moved
only by an entry and never below zero, a hold ends once.
Fails with `ConfigError` on a file that is not a ledger or is newer than this program.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import apsw

from sage_fed.errors import ConfigError

APPLICATION_ID = 0x53414745
"""Marks the file as a ledger: "SAGE" in SQLite's `application_id`."""

VERSION_1 = """
CREATE TABLE account (
  account TEXT PRIMARY KEY,
  -- Moved only by the trigger entry_posts; checked against the entries by `check`.
  charged_uatp INTEGER NOT NULL DEFAULT 0 CHECK (charged_uatp >= 0),
  held_uatp INTEGER NOT NULL DEFAULT 0 CHECK (held_uatp >= 0),
  discharged_uatp INTEGER NOT NULL DEFAULT 0 CHECK (discharged_uatp >= 0),
  capacity_uatp INTEGER NOT NULL CHECK (capacity_uatp >= 0),
  refill_uatp_per_s INTEGER NOT NULL CHECK (refill_uatp_per_s >= 0),
  strategic_floor_uatp INTEGER NOT NULL CHECK (strategic_floor_uatp >= 0),
  -- What the settings said last, so that only a change of theirs overrides the operator's.
  declared_capacity_uatp INTEGER,
  declared_refill_uatp_per_s INTEGER,
  declared_floor_uatp INTEGER,
  -- The high-water mark of refill: counted until refill_ns of refill_epoch.
  refill_epoch TEXT NOT NULL,
  refill_ns INTEGER NOT NULL,
  refill_remainder INTEGER NOT NULL CHECK (refill_remainder BETWEEN 0 AND 999999999)
) STRICT, WITHOUT ROWID;

CREATE TABLE job (
  job_id TEXT PRIMARY KEY,
  account TEXT NOT NULL REFERENCES account (account),
  state TEXT NOT NULL CHECK (state IN ('held', 'settled', 'voided', 'expired')),
  held_uatp INTEGER NOT NULL CHECK (held_uatp >= 0),
  charged_uatp INTEGER NOT NULL DEFAULT 0 CHECK (charged_uatp BETWEEN 0 AND held_uatp),
  rate_card TEXT NOT NULL,
  tier TEXT NOT NULL,
  outcome TEXT NOT NULL DEFAULT '',
  -- On the boot clock of the process that made the hold; no hold outlives its process.
  expires_ns INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
CREATE INDEX job_open ON job (expires_ns) WHERE state = 'held';

CREATE TABLE entry (
  entry_id INTEGER PRIMARY KEY,
  time_ns INTEGER NOT NULL,
  account TEXT NOT NULL REFERENCES account (account),
  kind TEXT NOT NULL,
  job_id TEXT REFERENCES job (job_id),
  amount_uatp INTEGER NOT NULL CHECK (amount_uatp > 0),
  debit TEXT NOT NULL,
  credit TEXT NOT NULL,
  CHECK (kind || ' ' || debit || ' ' || credit IN (
    'grant mint charged', 'refill mint charged', 'revoke charged mint',
    'hold charged held', 'settle held discharged', 'release held charged',
    'void held charged', 'expire held charged')),
  CHECK ((job_id IS NULL) = (kind IN ('grant', 'refill', 'revoke')))
) STRICT;
CREATE INDEX entry_account ON entry (account);
CREATE UNIQUE INDEX entry_once ON entry (job_id, kind) WHERE job_id IS NOT NULL;

CREATE TABLE request (
  account TEXT NOT NULL REFERENCES account (account),
  client_request_id TEXT NOT NULL,
  payload_hash BLOB NOT NULL,
  job_id TEXT NOT NULL UNIQUE REFERENCES job (job_id),
  -- NULL while the job is open.
  settled_ns INTEGER,
  -- NULL while the job is open, and where the result was too large to keep.
  result BLOB,
  PRIMARY KEY (account, client_request_id)
) STRICT;
CREATE INDEX request_settled ON request (settled_ns) WHERE settled_ns IS NOT NULL;

CREATE TRIGGER entry_posts AFTER INSERT ON entry BEGIN
  UPDATE account SET
    charged_uatp = charged_uatp + iif(NEW.credit = 'charged', NEW.amount_uatp, 0)
      - iif(NEW.debit = 'charged', NEW.amount_uatp, 0),
    held_uatp = held_uatp + iif(NEW.credit = 'held', NEW.amount_uatp, 0)
      - iif(NEW.debit = 'held', NEW.amount_uatp, 0),
    discharged_uatp = discharged_uatp + iif(NEW.credit = 'discharged', NEW.amount_uatp, 0)
  WHERE account = NEW.account;
END;
CREATE TRIGGER entry_no_replace BEFORE INSERT ON entry
WHEN EXISTS (SELECT 1 FROM entry WHERE entry_id = NEW.entry_id) BEGIN
  SELECT RAISE(ABORT, 'entries are append-only');
END;
CREATE TRIGGER entry_no_update BEFORE UPDATE ON entry BEGIN
  SELECT RAISE(ABORT, 'entries are append-only');
END;
CREATE TRIGGER entry_no_delete BEFORE DELETE ON entry BEGIN
  SELECT RAISE(ABORT, 'entries are append-only');
END;
CREATE TRIGGER job_ends_once BEFORE UPDATE ON job WHEN OLD.state <> 'held' BEGIN
  SELECT RAISE(ABORT, 'a hold ends once');
END;
CREATE TRIGGER job_no_delete BEFORE DELETE ON job BEGIN
  SELECT RAISE(ABORT, 'jobs are kept');
END;
CREATE TRIGGER account_no_delete BEFORE DELETE ON account BEGIN
  SELECT RAISE(ABORT, 'accounts are kept');
END;
"""

MIGRATIONS: tuple[str, ...] = (VERSION_1,)
"""`MIGRATIONS[n]` takes a file from version n to n + 1; a released one never changes."""


def require_known(db: apsw.Connection) -> int:
    """Return the file's version (0: empty); `ConfigError` where it is not ours or too new."""
    version = int(db.pragma("user_version"))
    if version == 0 and db.execute("SELECT count(*) FROM sqlite_schema").get == 0:
        return 0
    if int(db.pragma("application_id")) != APPLICATION_ID:
        raise ConfigError(f"{db.filename} is not a ledger; name another file or remove it")
    if version > len(MIGRATIONS):
        raise ConfigError(
            f"{db.filename} has ledger version {version}, this sage-fed knows up to "
            f"{len(MIGRATIONS)}; use the newer program"
        )
    return version


@contextlib.contextmanager
def writing(db: apsw.Connection) -> Iterator[None]:
    """One transaction, which waits for another program's at its begin.

    Once it has read it could not: SQLite refuses a reader that begins to write beside another
    writer at once. And apsw's own `with db` would hold the interpreter's lock while it waits.
    """
    db.execute("BEGIN IMMEDIATE")
    try:
        yield
        db.execute("COMMIT")
    except BaseException:
        if db.in_transaction:
            db.execute("ROLLBACK")
        raise


def migrate(db: apsw.Connection) -> None:
    """Bring the file to the current version, in one transaction a version."""
    for version in range(require_known(db), len(MIGRATIONS)):
        with writing(db):
            db.execute(MIGRATIONS[version])
            db.pragma("application_id", APPLICATION_ID)
            db.pragma("user_version", version + 1)
