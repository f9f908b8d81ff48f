"""The books' tables, and how an older file becomes a current one.

Owns the DDL. Knows no operation: what an operation may never do is refused here, by the
database, so that a bug above cannot write it: entries are only ever added, numbered in order, and
leave only into their account's day, which keeps every sum; a balance is moved only by an entry and
never below zero; a hold ends once; what is open, or kept for a repeat, stays.
Fails with `ConfigError` on a file that is not a ledger or is newer than this program.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

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

-- The columns alone: version 2 copies them into a table of its own, which has the checks.
CREATE TABLE entry (
  entry_id INTEGER PRIMARY KEY, time_ns, account, kind, job_id, amount_uatp, debit, credit
);

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

CREATE TRIGGER job_ends_once BEFORE UPDATE ON job WHEN OLD.state <> 'held' BEGIN
  SELECT RAISE(ABORT, 'a hold ends once');
END;
CREATE TRIGGER account_no_delete BEFORE DELETE ON account BEGIN
  SELECT RAISE(ABORT, 'accounts are kept');
END;
"""

VERSION_2 = """
DROP TRIGGER IF EXISTS entry_posts;
DROP TRIGGER IF EXISTS entry_no_replace;
DROP TRIGGER IF EXISTS entry_no_update;
DROP TRIGGER IF EXISTS entry_no_delete;
DROP TRIGGER IF EXISTS job_no_delete;
DROP INDEX IF EXISTS entry_account;
DROP INDEX IF EXISTS entry_once;

ALTER TABLE account ADD COLUMN
  -- How many entries the account has ever had; the number of its newest.
  last_number INTEGER NOT NULL DEFAULT 0;

ALTER TABLE entry RENAME TO entry_1;
CREATE TABLE entry (
  entry_id INTEGER PRIMARY KEY,
  -- Counted per account, which is all that a client gets to see.
  number INTEGER NOT NULL,
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
INSERT INTO entry
  SELECT entry_id, row_number() OVER (PARTITION BY account ORDER BY entry_id), time_ns, account,
    kind, job_id, amount_uatp, debit, credit
  FROM entry_1 ORDER BY entry_id;
DROP TABLE entry_1;
CREATE UNIQUE INDEX entry_number ON entry (account, number);
CREATE UNIQUE INDEX entry_once ON entry (job_id, kind) WHERE job_id IS NOT NULL;
UPDATE account SET last_number =
  (SELECT coalesce(max(number), 0) FROM entry WHERE entry.account = account.account);

CREATE TABLE book (
  only INTEGER PRIMARY KEY CHECK (only = 1),
  -- Counted over all accounts from 1; never reused, also where the entry was folded.
  last_entry_id INTEGER NOT NULL,
  -- Of all results in `request` together.
  kept_bytes INTEGER NOT NULL CHECK (kept_bytes >= 0)
) STRICT;
INSERT INTO book SELECT 1, (SELECT coalesce(max(entry_id), 0) FROM entry),
  (SELECT coalesce(sum(length(result)), 0) FROM request);

-- What entries that are gone have moved, by the UTC day of their time: only entry_folds adds to it.
CREATE TABLE day (
  account TEXT NOT NULL REFERENCES account (account),
  day INTEGER NOT NULL,
  entries INTEGER NOT NULL CHECK (entries >= 0),
  charged_uatp INTEGER NOT NULL,
  held_uatp INTEGER NOT NULL,
  discharged_uatp INTEGER NOT NULL,
  -- Jobs of which nothing else is left, by how and when they ended; counted, proved by nothing.
  settled_jobs INTEGER NOT NULL DEFAULT 0,
  voided_jobs INTEGER NOT NULL DEFAULT 0,
  expired_jobs INTEGER NOT NULL DEFAULT 0,
  PRIMARY KEY (account, day)
) STRICT, WITHOUT ROWID;

CREATE INDEX request_result ON request (settled_ns) WHERE result IS NOT NULL;

CREATE TRIGGER entry_in_order BEFORE INSERT ON entry
WHEN NEW.entry_id IS NOT (SELECT last_entry_id + 1 FROM book)
  OR NEW.number IS NOT (SELECT last_number + 1 FROM account WHERE account = NEW.account) BEGIN
  SELECT RAISE(ABORT, 'entries are append-only');
END;
CREATE TRIGGER entry_posts AFTER INSERT ON entry BEGIN
  UPDATE account SET
    charged_uatp = charged_uatp + iif(NEW.credit = 'charged', NEW.amount_uatp, 0)
      - iif(NEW.debit = 'charged', NEW.amount_uatp, 0),
    held_uatp = held_uatp + iif(NEW.credit = 'held', NEW.amount_uatp, 0)
      - iif(NEW.debit = 'held', NEW.amount_uatp, 0),
    discharged_uatp = discharged_uatp + iif(NEW.credit = 'discharged', NEW.amount_uatp, 0),
    last_number = NEW.number
  WHERE account = NEW.account;
  UPDATE book SET last_entry_id = NEW.entry_id;
END;
CREATE TRIGGER entry_no_update BEFORE UPDATE ON entry BEGIN
  SELECT RAISE(ABORT, 'entries are append-only');
END;
CREATE TRIGGER entry_stays BEFORE DELETE ON entry
WHEN EXISTS (SELECT 1 FROM job WHERE job_id = OLD.job_id AND state = 'held')
  OR EXISTS (SELECT 1 FROM request WHERE job_id = OLD.job_id) BEGIN
  SELECT RAISE(ABORT, 'entries of an open hold, or of a request id that is kept, stay');
END;
CREATE TRIGGER entry_folds AFTER DELETE ON entry BEGIN
  INSERT INTO day (account, day, entries, charged_uatp, held_uatp, discharged_uatp) VALUES (
    OLD.account, OLD.time_ns / 86400000000000, 1,
    iif(OLD.credit = 'charged', OLD.amount_uatp, 0)
      - iif(OLD.debit = 'charged', OLD.amount_uatp, 0),
    iif(OLD.credit = 'held', OLD.amount_uatp, 0) - iif(OLD.debit = 'held', OLD.amount_uatp, 0),
    iif(OLD.credit = 'discharged', OLD.amount_uatp, 0))
  ON CONFLICT (account, day) DO UPDATE SET
    entries = entries + excluded.entries,
    charged_uatp = charged_uatp + excluded.charged_uatp,
    held_uatp = held_uatp + excluded.held_uatp,
    discharged_uatp = discharged_uatp + excluded.discharged_uatp;
END;
CREATE TRIGGER day_no_delete BEFORE DELETE ON day BEGIN
  SELECT RAISE(ABORT, 'days are kept');
END;
CREATE TRIGGER job_stays BEFORE DELETE ON job WHEN OLD.state = 'held' BEGIN
  SELECT RAISE(ABORT, 'an open hold stays');
END;
CREATE TRIGGER request_counts AFTER UPDATE OF result ON request BEGIN
  UPDATE book SET kept_bytes = kept_bytes
    + coalesce(length(NEW.result), 0) - coalesce(length(OLD.result), 0);
END;
CREATE TRIGGER request_uncounts AFTER DELETE ON request WHEN OLD.result IS NOT NULL BEGIN
  UPDATE book SET kept_bytes = kept_bytes - length(OLD.result);
END;
"""

VERSION_3 = """
ALTER TABLE job ADD COLUMN
  -- What the charge is for: JSON, [[tier, phase, tokens], ...]; empty for jobs of before.
  usage TEXT NOT NULL DEFAULT '';
"""

MIGRATIONS: tuple[str, ...] = (VERSION_1, VERSION_2, VERSION_3)
"""`MIGRATIONS[n]` takes a file from version n to n + 1; what a released one makes never changes.

Of version 1 only what version 2 keeps, or makes its tables of, is written here: a file that was
made by a program of then has more triggers and indexes, and loses them.
"""


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
def writing(db: apsw.Connection, begin: str = "BEGIN IMMEDIATE") -> Iterator[None]:
    """One transaction, which waits for another program's at its begin; the block may end it.

    Once it has read it could not: SQLite refuses a reader that begins to write beside another
    writer at once. And apsw's own `with db` would hold the interpreter's lock while it waits.
    """
    db.execute(begin)
    try:
        yield
        if db.in_transaction:
            db.execute("COMMIT")
    except BaseException:
        # A full disk has rolled back already.
        if db.in_transaction:
            db.execute("ROLLBACK")
        raise


def last_entry_id(db: apsw.Connection) -> int:
    """Where books of any version end.

    Ids are counted from 1 and never reused, also not of what was folded.
    """
    counted = "SELECT last_entry_id FROM book"
    if int(db.pragma("user_version")) == 1:  # nothing was folded yet
        counted = "SELECT coalesce(max(entry_id), 0) FROM entry"
    return int(db.execute(counted).get)


def migrate(db: apsw.Connection, prove: Callable[[apsw.Connection], None] = lambda _: None) -> None:
    """Bring the file to the current version, in one transaction.

    `prove` may raise, which undoes all of it; it is not asked where there is nothing to do.
    The steps keep what refers to what: looking each of millions of rows up again takes minutes.
    """
    checked = db.pragma("foreign_keys")
    db.pragma("foreign_keys", False)
    if steps := MIGRATIONS[require_known(db) :]:
        with writing(db):
            for step in steps:
                db.execute(step)
            db.pragma("application_id", APPLICATION_ID)
            db.pragma("user_version", len(MIGRATIONS))
            prove(db)
    db.pragma("foreign_keys", checked)
