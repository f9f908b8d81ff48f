"""What many jobs cost a ledger: its file, its migration, its start, and folding them.

    python bench/ledger_age.py [--jobs 1000000] [--jobs 10000000] [--directory DIR]

The physics: a job is a row and three entries, so a million of them are some hundreds of megabytes,
and adding them up is a scan of all that. A start that does not read them costs the same whatever
there is; the figure to look at is therefore how the start grows with the number of jobs (not), and
how long a hold waits while entries are folded beside it, next to the same hold without it.
The books are written by SQL in bulk: up to a million jobs as version 1, so that the first opening
is a migration, and more of them as they would be after it.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import apsw
import report

from sage_fed.ledger import AccountTerms, HoldRequest, Ledger, RequestKey, schema

ACCOUNTS = 10
STARTS = 5
MIGRATED_JOBS = 1_000_000
BESIDE_S = 10.0
DAYS = 60
HELD_UATP, CHARGED_UATP = 1000, 400
GRANT_UATP = 2**52


def write_books(path: Path, jobs: int, version: int) -> None:
    """Books with so many settled jobs, evenly over the last 60 days."""
    db = apsw.Connection(str(path))
    db.pragma("journal_mode", "wal")
    db.pragma("synchronous", "off")
    for migration in schema.MIGRATIONS[:version]:
        db.execute(migration)
    later = db.execute(
        "SELECT type, name, sql FROM sqlite_schema WHERE type = 'trigger' "
        "OR type = 'index' AND sql IS NOT NULL"
    ).fetchall()
    for kind, name, _ in later:
        db.execute(f"DROP {kind} {name}")
    step_ns = DAYS * 86_400 * 10**9 // jobs
    begun_ns = time.time_ns() - DAYS * 86_400 * 10**9
    each = jobs // ACCOUNTS
    with db:
        for number in range(ACCOUNTS):
            account = f"account-{number}"
            spent = each * CHARGED_UATP
            db.execute(
                "INSERT INTO account (account, charged_uatp, discharged_uatp, capacity_uatp, "
                "refill_uatp_per_s, strategic_floor_uatp, refill_epoch, refill_ns, "
                "refill_remainder) VALUES (?, ?, ?, ?, 0, 0, 'none', 0, 0)",
                (account, GRANT_UATP - spent, spent, GRANT_UATP),
            )
            db.execute(
                f"INSERT INTO entry VALUES (?, {'1, ' * (version > 1)}?, ?, 'grant', NULL, ?, "
                "'mint', 'charged')",
                (number + 1, begun_ns, account, GRANT_UATP),
            )
        numbers = "WITH RECURSIVE n(n) AS (SELECT 0 UNION ALL SELECT n + 1 FROM n LIMIT ?)"
        name = "'job-' || printf('%016x', n), 'account-' || (n % 10)"
        db.execute(
            f"{numbers} INSERT INTO job SELECT {name}, 'settled', ?, ?, 'card', 'tactical', "
            "'length', 0 FROM n",
            (jobs, HELD_UATP, CHARGED_UATP),
        )
        db.execute(
            f"{numbers}, k(k, kind, amount, debit, credit) AS (VALUES "
            f"(1, 'hold', {HELD_UATP}, 'charged', 'held'), "
            f"(2, 'settle', {CHARGED_UATP}, 'held', 'discharged'), "
            f"(3, 'release', {HELD_UATP - CHARGED_UATP}, 'held', 'charged')) "
            "INSERT INTO entry SELECT ? + 3 * n + k, "
            f"{'n / 10 * 3 + k + 1, ' * (version > 1)}? + n * ?, 'account-' || (n % 10), kind, "
            "'job-' || printf('%016x', n), amount, debit, credit FROM n CROSS JOIN k",
            (jobs, ACCOUNTS, begun_ns, step_ns),
        )
        for _, _, sql in sorted(later):
            db.execute(str(sql))
        db.pragma("application_id", schema.APPLICATION_ID)
        db.pragma("user_version", version)
        if version > 1:
            db.execute("UPDATE account SET last_number = 1 + 3 * ?", (each,))
            db.execute("UPDATE book SET last_entry_id = ? + 3 * ?", (ACCOUNTS, jobs))
    db.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_TRUNCATE)
    db.close()


class Audits(logging.Handler):
    """Hears when all entries were proved."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.said = asyncio.Event()
        self._loop = asyncio.get_running_loop()

    def emit(self, record: logging.LogRecord) -> None:  # noqa: ARG002 - the only one there is
        """Be told so, on the auditor's thread."""
        self._loop.call_soon_threadsafe(self.said.set)


async def start(path: Path, *, until_audited: bool = False) -> tuple[float, float]:
    """Seconds to open, and until everything was audited beside it, where that is waited for."""
    audits = Audits()
    log = logging.getLogger("sage_fed.ledger.check")
    log.setLevel(logging.INFO)
    log.addHandler(audits)
    began_s = time.perf_counter()
    ledger = await Ledger(path).open()
    opened_s = time.perf_counter() - began_s
    if until_audited:
        await audits.said.wait()
    audited_s = time.perf_counter() - began_s
    await ledger.close()
    log.removeHandler(audits)
    return opened_s, audited_s


async def leave_open(path: Path) -> None:
    """Open books, hold for 500 jobs, and be gone like a process that is killed."""
    ledger = await Ledger(path).open()
    await ledger.ensure_account("bench", AccountTerms(2**50, initial_uatp=2**50))
    for number in range(500):
        await ledger.hold(
            RequestKey("bench"),
            lambda _, n=number: HoldRequest(f"left-{n}", 1000, "card", "tactical"),
        )
    os._exit(0)


def start_after_a_kill(path: Path) -> float:
    """Seconds to open what it left: a log, and 500 holds to be given back."""
    subprocess.run([sys.executable, __file__, "--leave-open", str(path)], check=True)
    opened_s, _ = asyncio.run(start(path))
    return opened_s


async def latencies(ledger: Ledger, for_s: float, name: str) -> list[float]:
    """How long holds take that come one by one."""
    found: list[float] = []
    until_s = time.perf_counter() + for_s
    while time.perf_counter() < until_s:
        began_s = time.perf_counter()
        await ledger.hold(
            RequestKey("bench"),
            lambda _: HoldRequest(f"{name}-{len(found)}", 1, "card", "tactical"),
        )
        found.append(time.perf_counter() - began_s)
        await asyncio.sleep(0.002)
    return found


def percentiles_ms(found: list[float]) -> dict[str, float]:
    """The usual two."""
    points = report.percentiles(found, 1e3)
    return {f"{point}_ms": points[point] for point in ("p50", "p99")}


async def folding(path: Path) -> dict[str, Any]:
    """Holds alone, and beside folding; how many entries went."""
    counts: list[int] = []
    ledger = await Ledger(path, on_fold=counts.append).open()
    await ledger.ensure_account("bench", AccountTerms(2**50, initial_uatp=2**50))
    alone = await latencies(ledger, BESIDE_S, "alone")
    tidying = asyncio.create_task(ledger.tidy(BESIDE_S))
    beside = await latencies(ledger, BESIDE_S, "beside")
    await tidying
    await ledger.close()
    return {
        "entries_folded_per_s": round(sum(counts) / BESIDE_S),
        "hold_alone": percentiles_ms(alone),
        "hold_beside_folding": percentiles_ms(beside),
    }


def measure(folder: Path, jobs: int) -> dict[str, Any]:
    """Everything of books with so many jobs."""
    path = folder / f"{jobs}.db"
    version = 1 if jobs <= MIGRATED_JOBS else len(schema.MIGRATIONS)
    write_books(path, jobs, version)
    row: dict[str, Any] = {"jobs": jobs, "load_1min": round(os.getloadavg()[0], 1)}
    if version == 1:
        row["bytes_of_version_1"] = path.stat().st_size
        began_s, began_cpu_s = time.perf_counter(), time.process_time()
        asyncio.run(start(path))
        row["migration_s"] = round(time.perf_counter() - began_s, 2)
        row["migration_cpu_s"] = round(time.process_time() - began_cpu_s, 2)
    row["bytes"] = path.stat().st_size
    starts = [asyncio.run(start(path))[0] for _ in range(STARTS)]
    row["start_s"] = round(statistics.median(starts), 4)
    row["start_spread_s"] = [round(min(starts), 4), round(max(starts), 4)]
    row["audited_beside_s"] = round(asyncio.run(start(path, until_audited=True))[1], 2)
    row["start_after_a_kill_s"] = round(start_after_a_kill(path), 4)
    row |= asyncio.run(folding(path))
    path.unlink()
    return row


def main() -> None:
    """Measure, print a table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, action="append", help="in the books; may be repeated")
    parser.add_argument("--directory", type=Path, help="on the disk to measure")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--leave-open", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.leave_open is not None:
        asyncio.run(leave_open(arguments.leave_open))
    rows = []
    with tempfile.TemporaryDirectory(dir=arguments.directory) as folder:
        for jobs in arguments.jobs or [100_000, 1_000_000, 10_000_000]:
            rows.append(measure(Path(folder), jobs))
            for key, value in rows[-1].items():
                print(f"{key:24} {value}")
    report.write("ledger_age", {"starts": STARTS, "results": rows}, arguments.output)


if __name__ == "__main__":
    main()
