"""The audit (do the books balance, from the entries alone?), and the copy that has passed it.

Owns the list of what must hold, the thread that audits beside the writer, and the backup. Reads
only, in one transaction, so that it works beside a running daemon. Reports every violation in
words; never repairs. What was folded into days counts as what it moved.
`ENDS` is the part that every start affords, `BALANCES` the one that is done beside a running
daemon where there are many entries, and `check` is all of it, for the command.
Fails with `ConfigError`, `LedgerCorrupt`, and with `CannotWrite` where a copy cannot be put where
it was asked for.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import apsw

from sage_fed.errors import CannotWrite, LedgerCorrupt, SageFedError
from sage_fed.ledger import schema
from sage_fed.ledger.entries import MOVES
from sage_fed.ledger.ledger_files import connect_reader, made_whole, snapshot

_NICE = 10
"""All other work is more urgent than an audit beside it."""

log = logging.getLogger(__name__)

SIGNED = "sum(CASE '{book}' WHEN credit THEN amount_uatp WHEN debit THEN -amount_uatp ELSE 0 END)"
"""What entries leave in a book. One signed sum: those of each side alone could overflow."""

KINDS = ", ".join(f"'{kind.value} {debit} {credit}'" for kind, (debit, credit) in MOVES.items())
"""Every move that an entry may be. SQLite skips CHECK constraints on read-only connections."""

ENDS = (
    (
        "entries: the last of all is {0}, the accounts have had {1}: some are missing",
        """
        SELECT last_entry_id, coalesce((SELECT sum(last_number) FROM account), 0) AS had FROM book
        WHERE last_entry_id <> had
        """,
    ),
    (
        "entries: there is one of the number {0}, after the last, {1}",
        """
        SELECT newest, last_entry_id FROM book, (SELECT max(entry_id) AS newest FROM entry)
        WHERE newest > last_entry_id
        """,
    ),
    (
        "account {0}: {1} uATP are held, its open jobs hold {2}",
        """
        SELECT account.account, account.held_uatp, coalesce(open.held, 0) FROM account LEFT JOIN (
          SELECT account, sum(held_uatp) AS held FROM job WHERE state = 'held' GROUP BY account
        ) AS open USING (account) WHERE account.held_uatp <> coalesce(open.held, 0)
        """,
    ),
)
"""What can be told from the accounts and what is open: as fast for many entries as for few."""

BALANCES = (
    (
        "entries: there are {0} and {1} were folded, but the last of all is {2}: some were removed",
        """
        SELECT there, folded, last_entry_id FROM book, (SELECT count(*) AS there FROM entry),
          (SELECT coalesce(sum(entries), 0) AS folded FROM day)
        WHERE there + folded <> last_entry_id
        """,
    ),
    (
        "account {0}: there are {1} entries and {2} were folded, but the last is {3}",
        """
        SELECT account, coalesce(there, 0), coalesce(folded, 0), last_number FROM account
        LEFT JOIN (SELECT account, count(*) AS there FROM entry GROUP BY account) USING (account)
        LEFT JOIN (SELECT account, sum(entries) AS folded FROM day GROUP BY account) USING (account)
        WHERE coalesce(there, 0) + coalesce(folded, 0) <> last_number
        """,
    ),
    (
        "account {0}: {1} is {2} uATP, its entries say {3}",
        f"""
        WITH moved AS (
          SELECT account, {SIGNED.format(book="charged")} AS charged,
            {SIGNED.format(book="held")} AS held, {SIGNED.format(book="discharged")} AS discharged
          FROM entry GROUP BY account
          UNION ALL SELECT account, charged_uatp, held_uatp, discharged_uatp FROM day),
        said AS (
          SELECT account, sum(charged) AS charged, sum(held) AS held,
            sum(discharged) AS discharged FROM moved GROUP BY account),
        pair AS (
          SELECT account.account, 'charged' AS book, charged_uatp AS kept, said.charged AS said
            FROM account LEFT JOIN said USING (account)
          UNION ALL SELECT account.account, 'held', held_uatp, said.held
            FROM account LEFT JOIN said USING (account)
          UNION ALL SELECT account.account, 'discharged', discharged_uatp, said.discharged
            FROM account LEFT JOIN said USING (account))
        SELECT account, book, kept, coalesce(said, 0) FROM pair WHERE kept <> coalesce(said, 0)
        """,  # noqa: S608 - a constant
    ),
    *ENDS,
)

HISTORY = (
    (
        "account {1}: entry {0} is a {2} of {3} uATP from {4} to {5}",
        f"""
        SELECT entry_id, account, kind, amount_uatp, debit, credit FROM entry
        WHERE amount_uatp <= 0 OR kind || ' ' || debit || ' ' || credit NOT IN ({KINDS})
          OR (job_id IS NULL) <> (kind IN ('grant', 'refill', 'revoke'))
        """,  # noqa: S608 - a constant
    ),
    (
        "account {0}: {1} fell to {2} uATP at entry {3}",
        f"""
        WITH folded AS (
          SELECT account, sum(charged_uatp) AS charged, sum(held_uatp) AS held FROM day
          GROUP BY account),
        run AS (
          SELECT account, entry_id,
            coalesce(folded.charged, 0) + {SIGNED.format(book="charged")} OVER line AS charged,
            coalesce(folded.held, 0) + {SIGNED.format(book="held")} OVER line AS held
          FROM entry LEFT JOIN folded USING (account)
          WINDOW line AS (PARTITION BY account ORDER BY entry_id))
        SELECT account, 'charged', charged, min(entry_id) FROM run WHERE charged < 0
          GROUP BY account
        UNION ALL
        SELECT account, 'held', held, min(entry_id) FROM run WHERE held < 0 GROUP BY account
        """,  # noqa: S608 - a constant
    ),
    (
        "entry {0} of job {1} is on account {2}, the job on {3}",
        """
        SELECT entry_id, job.job_id, entry.account, job.account FROM entry JOIN job USING (job_id)
        WHERE entry.account <> job.account
        """,
    ),
    (
        (
            "job {0} of account {1} is {2} at {4} of {3} uATP, its entries say "
            "hold {5}, settle {6}, release {7}, void {8}, expire {9}"
        ),
        """
        WITH said AS (
          SELECT job_id, sum(iif(kind = 'hold', amount_uatp, 0)) AS hold,
            sum(iif(kind = 'settle', amount_uatp, 0)) AS settle,
            sum(iif(kind = 'release', amount_uatp, 0)) AS release,
            sum(iif(kind = 'void', amount_uatp, 0)) AS void,
            sum(iif(kind = 'expire', amount_uatp, 0)) AS expire
          FROM entry WHERE job_id IS NOT NULL GROUP BY job_id),
        pair AS (
          SELECT job.job_id, account, state, held_uatp, charged_uatp, coalesce(hold, 0) AS hold,
            coalesce(settle, 0) AS settle, coalesce(release, 0) AS release,
            coalesce(void, 0) AS void, coalesce(expire, 0) AS expire
          FROM job LEFT JOIN said USING (job_id))
        SELECT * FROM pair WHERE (hold, settle, release, void, expire) IS NOT (
          held_uatp, iif(state = 'settled', charged_uatp, 0),
          iif(state = 'settled', held_uatp - charged_uatp, 0),
          iif(state = 'voided', held_uatp, 0), iif(state = 'expired', held_uatp, 0))
        """,
    ),
    (
        "job {0} of account {1} is {2}, {3} uATP charged",
        """
        SELECT job_id, account, state, charged_uatp FROM job
        WHERE state <> 'settled' AND charged_uatp <> 0
        """,
    ),
    (
        "job {0} of account {1} ended at entry {2}, before its hold at {3}",
        """
        SELECT first.job_id, first.account, min(other.entry_id), first.entry_id
        FROM entry AS first JOIN entry AS other USING (job_id)
        WHERE first.kind = 'hold' AND other.entry_id < first.entry_id GROUP BY first.job_id
        """,
    ),
    (
        "requests: {0} bytes of results are counted, there are {1}",
        """
        SELECT kept_bytes, (SELECT coalesce(sum(length(result)), 0) FROM request) AS there
        FROM book WHERE kept_bytes <> there
        """,
    ),
    (
        "account {0}: client request {1!r} stands for job {2} of account {3}, which is {4}",
        """
        SELECT request.account, client_request_id, job.job_id, job.account, state
        FROM request JOIN job USING (job_id)
        WHERE job.account <> request.account OR state NOT IN ('held', 'settled')
          OR (state = 'held') <> (settled_ns IS NULL)
        """,
    ),
)


@dataclass(frozen=True, slots=True)
class CheckReport:
    """What was looked at and every violation found; balanced where there is none."""

    accounts: int
    jobs: int
    open_holds: int
    entries: int
    folded_entries: int
    violations: tuple[str, ...]


def check(path: Path) -> CheckReport:
    """Audit the ledger at `path`, which a daemon may have open.

    Raises `ConfigError` where there is none and `LedgerCorrupt` where SQLite cannot read it.
    """
    with snapshot(path) as (db, missing):
        return CheckReport(
            accounts=int(db.execute("SELECT count(*) FROM account").get),
            jobs=int(db.execute("SELECT count(*) FROM job").get),
            open_holds=int(db.execute("SELECT count(*) FROM job WHERE state = 'held'").get),
            entries=int(db.execute("SELECT count(*) FROM entry").get),
            folded_entries=num_folded(db),
            violations=(
                *_file_violations(db),
                *_schema_violations(db),
                *audit(db),
                *([missing] if missing else []),
            ),
        )


def num_folded(db: apsw.Connection) -> int:
    """Entries that were folded into days."""
    return int(db.execute("SELECT coalesce(sum(entries), 0) FROM day").get)


def audit(
    db: apsw.Connection, rules: tuple[tuple[str, str], ...] = (*BALANCES, *HISTORY)
) -> tuple[str, ...]:
    """Say every way in which accounts, jobs, requests and entries break the rules."""
    found = []
    for sentence, query in rules:
        try:
            found += [sentence.format(*row) for row in db.execute(query)]
        except apsw.SQLError as error:
            # Amounts that no operation could have written, for example.
            found.append(f"the audit {sentence!r} could not be computed: {error}")
    return tuple(found)


def _file_violations(db: apsw.Connection) -> tuple[str, ...]:
    lines = [str(row[0]) for row in db.execute("PRAGMA integrity_check")]
    links = db.execute("PRAGMA foreign_key_check").fetchall()
    return (
        *(f"file: {line}" for line in lines if line != "ok"),
        *(
            f"table {table}: a row names something that is not in {parent}"
            for table, _, parent, _ in links
        ),
    )


def _schema_violations(db: apsw.Connection) -> tuple[str, ...]:
    fresh = apsw.Connection(":memory:")
    schema.migrate(fresh)
    kept, expected = _objects(db), _objects(fresh)
    fresh.close()
    return tuple(
        f"schema: {name} is {'altered' if name in kept else 'missing'}"
        for name, text in sorted(expected.items())
        if kept.get(name) != text
    )


def _objects(db: apsw.Connection) -> dict[str, str]:
    return dict(db.execute("SELECT type || ' ' || name, coalesce(sql, '') FROM sqlite_schema"))


@contextlib.contextmanager
def auditing(path: Path, on_violations: Callable[[tuple[str, ...]], None]) -> Iterator[None]:
    """Audit all entries while the block runs: what a start of many entries has no time for.

    On a thread and one snapshot of its own; the end of the block ends it, wherever it is.
    `on_violations` is called on that thread, once, and not at all where everything balances.
    """
    stopped = threading.Event()
    opened: list[apsw.Connection] = []

    def run() -> None:
        with contextlib.suppress(OSError):  # a kernel that allows no thread its own
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)
        began_s = time.monotonic()
        try:
            with contextlib.closing(connect_reader(path)) as db:
                opened.append(db)
                db.execute("BEGIN")
                violations = audit(db, BALANCES)
        except (apsw.Error, SageFedError) as error:
            violations = (f"they could not be audited: {error}",)
        if stopped.is_set():
            return
        if violations:
            on_violations(violations)
        else:
            log.info("the books balance, all entries audited in %.1f s", time.monotonic() - began_s)

    thread = threading.Thread(target=run, name="ledger-audit", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stopped.set()
        while thread.is_alive():
            # Again and again: an interruption between two statements is none.
            for db in opened:
                with contextlib.suppress(apsw.ConnectionClosedError):
                    db.interrupt()
            thread.join(0.01)


def backup(path: Path, copy: Path) -> CheckReport:
    """Copy the ledger at `path` into the new file `copy`; what is in it, by its own audit.

    It has everything that was acknowledged before the call. The writer goes on meanwhile.
    """
    if copy.exists() or copy.is_symlink():
        raise CannotWrite(f"{copy} is there already, and a backup replaces none; name another file")
    try:
        with made_whole(copy) as fresh:
            _copy(path, fresh)
            report = check(fresh)
            if report.violations:
                raise LedgerCorrupt(
                    f"the copy of {path} was not kept: {'; '.join(report.violations)}"
                )
    except OSError as error:
        raise CannotWrite(f"{copy} cannot be written: {error.strerror}") from error
    return report


def _copy(path: Path, fresh: Path) -> None:
    with (
        snapshot(path) as (db, missing),
        contextlib.closing(apsw.Connection(str(fresh))) as copied,
    ):
        if missing:
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
