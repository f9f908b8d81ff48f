"""The copy of the books: whole, audited, restorable; or not there."""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import apsw
import pytest
import pytest_asyncio
from holds import Asked, asked
from small_disks import Disk, small_tmpfs

from sage_fed.errors import CannotWrite, ConfigError, LedgerCorrupt
from sage_fed.ledger import AccountTerms, Ledger, backup, check

TERMS = AccountTerms(capacity_uatp=10**9, initial_uatp=10**9)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "state").mkdir()
    return tmp_path / "state" / "ledger.db"


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    (tmp_path / "backups").mkdir()
    return tmp_path / "backups" / "monday.db"


@pytest_asyncio.fixture
async def ledger(path: Path) -> AsyncIterator[Ledger]:
    """Books with a settled job and an open hold, most of them in the log."""
    made = await Ledger(path).open()
    await made.ensure_account("ann", TERMS)
    await made.hold(*request("done"))
    await made.settle("done", 4, "length", b"answer")
    await made.hold(*request("running"))
    yield made
    await made.close()


def request(job_id: str) -> Asked:
    return asked(job_id, "ann", 10, "card", "tactical")


async def test_a_copy_beside_a_running_writer_has_all_that_was_acknowledged(
    ledger: Ledger, path: Path, copy: Path
) -> None:
    """One file for its owner alone; the writer goes on, and what it does then is not in it."""
    report = await asyncio.to_thread(backup, path, copy)
    await ledger.settle("running", 10, "length")

    assert [copy.name] == [file.name for file in copy.parent.iterdir()]
    assert 0o600 == copy.stat().st_mode & 0o777  # noqa: ASYNC240 - nothing else runs on this loop
    assert (2, 1, 5, ()) == (report.jobs, report.open_holds, report.entries, report.violations)
    assert report == check(copy)


async def test_copies_are_whole_while_the_books_move(
    ledger: Ledger, path: Path, copy: Path
) -> None:
    """Each balances, and has no less than the one before."""

    async def work() -> None:
        for number in range(10_000):
            await ledger.hold(*request(f"job-{number}"))
            await ledger.settle(f"job-{number}", 4, "length")

    working = asyncio.create_task(work())
    reports = [
        await asyncio.to_thread(backup, path, copy.with_name(f"{number}.db"))
        for number in range(10)
    ]
    working.cancel()
    await asyncio.gather(working, return_exceptions=True)

    entries = [report.entries for report in reports]
    assert sorted(entries) == entries
    assert entries[-1] > entries[0]


async def test_a_copy_put_in_the_place_of_lost_books_is_gone_on_with(
    ledger: Ledger, path: Path, copy: Path
) -> None:
    """As docs/operations.md says: all files away, the copy there; open holds are given back."""
    backup(path, copy)
    await ledger.settle("running", 10, "length")
    await ledger.close()
    for file in path.parent.iterdir():
        file.unlink()
    shutil.copy(copy, path)

    again = await Ledger(path).open()
    assert 1 == again.recovery.voided_jobs
    budget = await again.budget("ann")
    assert (10**9 - 4, 0, 4) == (budget.balance_uatp, budget.held_uatp, budget.discharged_uatp)
    await again.ensure_account("ann", TERMS)
    assert 4 == (await again.budget("ann")).discharged_uatp
    await again.close()
    assert () == check(path).violations


async def test_a_copy_put_beside_what_is_left_of_the_books_is_refused(
    ledger: Ledger, path: Path, copy: Path
) -> None:
    """Somebody who did not mean it would lose what came after it."""
    backup(path, copy)
    await ledger.settle("running", 10, "length")
    await ledger.close()
    shutil.copy(copy, path)

    with pytest.raises(LedgerCorrupt, match=r"ends at entry 5, but entry 6 had been"):
        await Ledger(path).open()


async def test_closed_books_are_copied_too(ledger: Ledger, path: Path, copy: Path) -> None:
    """Without a daemon, and without a trace in their folder."""
    await ledger.close()
    before = sorted(path.parent.iterdir())

    backup(path, copy)

    assert before == sorted(path.parent.iterdir())
    assert check(path) == check(copy)


async def test_an_earlier_copy_is_never_written_over(
    ledger: Ledger, path: Path, copy: Path
) -> None:
    """It may be the last good one."""
    copy.write_bytes(b"last good one")  # noqa: ASYNC240 - nothing else runs on this loop

    with pytest.raises(CannotWrite, match="is there already"):
        backup(path, copy)

    assert ledger.alive
    assert b"last good one" == copy.read_bytes()  # noqa: ASYNC240


async def test_books_that_are_not_whole_are_not_copied(
    ledger: Ledger, path: Path, copy: Path
) -> None:
    """Neither those that miss entries nor those that do not balance: no file looks like a copy."""
    await ledger.close()
    db = apsw.Connection(str(path))
    db.execute("UPDATE account SET charged_uatp = charged_uatp + 1")
    db.close()
    with pytest.raises(LedgerCorrupt, match="charged is"):
        backup(path, copy)

    other = path.with_name("other.db")
    await (await Ledger(other).open()).close()
    other.rename(path)
    with pytest.raises(LedgerCorrupt, match="had been acknowledged"):
        backup(path, copy)

    assert [] == [*copy.parent.iterdir()]


async def test_a_place_that_cannot_have_a_copy_is_named(
    ledger: Ledger, path: Path, copy: Path
) -> None:
    """And the books that are not there."""
    assert ledger.alive
    with pytest.raises(CannotWrite, match=f"nowhere/x.db cannot be written: {os.strerror(2)}"):
        backup(path, copy.parent / "nowhere" / "x.db")
    with pytest.raises(ConfigError, match="there is no ledger"):
        backup(path.with_name("none.db"), copy)
    assert [] == [*copy.parent.iterdir()]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    with small_tmpfs(tmp_path / "disk", "64k") as disk:
        yield disk


async def test_a_disk_without_room_for_the_copy_has_none(
    ledger: Ledger, path: Path, disk: Disk
) -> None:
    """Half of one could be taken for a whole one; the books and the daemon go on."""
    with pytest.raises(CannotWrite, match="its disk is full or failing"):
        backup(path, disk.path / "monday.db")

    assert [] == [*disk.path.iterdir()]
    assert 10 == (await ledger.settle("running", 10, "length")).charged_uatp
