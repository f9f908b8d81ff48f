"""What a ledger remembers beside itself, and what happens where its files do not live up to it."""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import apsw
import pytest
from holds import asked
from killed_ledger import live_and_be_killed
from small_disks import Disk, small_tmpfs

from sage_fed.errors import LedgerCorrupt
from sage_fed.ledger import AccountTerms, Ledger, check
from sage_fed.ledger.ledger_files import MARK, hold_lock, read_acknowledged, snapshot
from sage_fed.ledger.schema import last_entry_id

TERMS = AccountTerms(capacity_uatp=10**9, initial_uatp=10**9)
CHECKPOINTED_BYTES = 1000 * 4096
"""A log shorter than this has not been put into the book yet: it is all that there is."""


def beside(path: Path, suffix: str) -> Path:
    return path.with_name(path.name + suffix)


@pytest.fixture(scope="module")
def crash(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a young ledger that was killed; nobody changes it."""
    folder = tmp_path_factory.mktemp("crash")
    live_and_be_killed(folder / "ledger.db", 0, 100)
    assert 0 < (folder / "ledger.db-wal").stat().st_size < CHECKPOINTED_BYTES
    return folder


@pytest.fixture
def path(crash: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    shutil.copytree(crash, tmp_path / "state")
    return tmp_path / "state" / "ledger.db"


def settled(path: Path) -> int:
    with snapshot(path) as (db, _):
        return int(db.execute("SELECT count(*) FROM job WHERE state = 'settled'").get)


def nothing(_path: Path) -> None:
    pass


def no_log(path: Path) -> None:
    beside(path, "-wal").unlink()


def no_log_nor_index(path: Path) -> None:
    no_log(path)
    beside(path, "-shm").unlink()


def empty_log(path: Path) -> None:
    os.truncate(beside(path, "-wal"), 0)


def half_a_log(path: Path) -> None:
    os.truncate(beside(path, "-wal"), beside(path, "-wal").stat().st_size // 2)


def torn_log(path: Path) -> None:
    log = bytearray(beside(path, "-wal").read_bytes())
    log[32 + 24 + 100] ^= 0xFF  # in the first frame's page, which its checksum covers
    beside(path, "-wal").write_bytes(log)


def another_log(path: Path) -> None:
    """Of the same books, from another life: SQLite reads it without a word."""
    other = path.parent.parent / "other" / "ledger.db"
    other.parent.mkdir()
    live_and_be_killed(other, 1, 4)
    shutil.copy(beside(other, "-wal"), beside(path, "-wal"))


@pytest.mark.parametrize(
    "harm", [no_log, no_log_nor_index, empty_log, half_a_log, torn_log, another_log]
)
async def test_a_log_that_is_lost_after_a_kill_is_missed(
    path: Path, crash: Path, harm: Callable[[Path], None]
) -> None:
    """The start is refused in words, again and again; nothing is spoilt for who finds the log."""
    harm(path)

    for _ in range(2):
        with pytest.raises(LedgerCorrupt, match="had been acknowledged") as refusal:
            await Ledger(path).open()
        assert "ledger.db-wal was removed, cut or replaced" in refusal.value.message
        assert "restore a backup" in refusal.value.message
        assert f"remove {path}.lock" in refusal.value.message
        report = await asyncio.to_thread(check, path)
        assert any("had been acknowledged" in line for line in report.violations)

    shutil.copy(beside(crash / "ledger.db", "-wal"), beside(path, "-wal"))
    again = await Ledger(path).open()
    await again.close()
    assert () == check(path).violations
    assert settled(crash / "ledger.db") == settled(path)


async def test_who_removes_the_lock_goes_on_with_what_is_left(path: Path) -> None:
    """The loss is accepted once, on purpose; what comes then is remembered as ever."""
    half_a_log(path)
    beside(path, ".lock").unlink()

    ledger = await Ledger(path).open()
    await ledger.ensure_account("bob", TERMS)
    await ledger.close()

    report = check(path)
    assert ((), 0) == (report.violations, report.open_holds)
    assert report.entries + report.folded_entries == read_acknowledged(path)


def read_only_look(path: Path) -> None:
    with snapshot(path) as (db, _):
        assert db.execute("SELECT count(*) FROM entry").get


def put_into_the_book(path: Path) -> None:
    """As SQLite's shell does when it is closed."""
    db = apsw.Connection(str(path))
    db.execute("SELECT count(*) FROM entry").get  # noqa: B018 - opens the log
    db.close()
    assert not beside(path, "-wal").exists()


def moved(path: Path) -> None:
    for file in path.parent.iterdir():
        shutil.copy(file, file.with_name(f"copy-{file.name}"))
        file.unlink()
    for file in path.parent.iterdir():
        file.rename(file.with_name(file.name.removeprefix("copy-")))


@pytest.mark.parametrize("touch", [nothing, read_only_look, put_into_the_book, moved])
async def test_a_killed_ledger_that_is_whole_opens(
    path: Path, crash: Path, touch: Callable[[Path], None]
) -> None:
    """Whatever became of its files: what counts is that every acknowledged entry is there."""
    touch(path)

    ledger = await Ledger(path).open()
    await ledger.close()

    assert () == check(path).violations
    assert settled(crash / "ledger.db") == settled(path)


async def worked(path: Path, first: int, last: int) -> Ledger:
    """The books, open, after so many jobs more."""
    ledger = await Ledger(path).open()
    await ledger.ensure_account("ann", TERMS)
    for number in range(first, last):
        await ledger.hold(*asked(f"job-{number}", "ann", 10, "card", "tactical"))
        await ledger.settle(f"job-{number}", 4, "length")
    return ledger


async def test_an_older_copy_of_the_book_is_not_gone_on_with(tmp_path: Path) -> None:
    """Also where the ledger was closed well: jobs would be paid back that were done."""
    path, copy = tmp_path / "ledger.db", tmp_path / "copy"
    await (await worked(path, 0, 3)).close()
    shutil.copy(path, copy)
    await (await worked(path, 3, 6)).close()
    shutil.copy(copy, path)

    with pytest.raises(LedgerCorrupt, match=r"ends at entry 10, but entry 19 had been"):
        await Ledger(path).open()


async def test_a_live_book_copied_without_its_log_is_not_whole(tmp_path: Path) -> None:
    """The usual mistake of a backup of files, found when it is needed."""
    path, copy = tmp_path / "ledger.db", tmp_path / "copy" / "ledger.db"
    copy.parent.mkdir()
    ledger = await worked(path, 0, 3)
    for suffix in ("", ".lock"):
        shutil.copy(beside(path, suffix), beside(copy, suffix))
    await ledger.close()

    with pytest.raises(LedgerCorrupt, match=r"ends at entry 0, but entry 10 had been"):
        await Ledger(copy).open()


async def test_an_older_book_under_a_newer_log_is_refused(tmp_path: Path) -> None:
    """SQLite lays the log's pages over any book: what comes out does not balance."""
    path, mixed = tmp_path / "ledger.db", tmp_path / "mixed" / "ledger.db"
    mixed.parent.mkdir()
    await (await worked(path, 0, 200)).close()
    shutil.copy(path, mixed)
    ledger = await worked(path, 200, 400)
    with apsw.Connection(str(path)) as db:
        db.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_TRUNCATE)
    db.close()
    await ledger.hold(*asked("last", "ann", 10, "card", "tactical"))
    for suffix in ("-wal", ".lock"):
        shutil.copy(beside(path, suffix), beside(mixed, suffix))
    await ledger.close()

    with pytest.raises(LedgerCorrupt):
        await Ledger(mixed).open()


async def test_nothing_is_missed_beside_a_running_writer(tmp_path: Path) -> None:
    """The audit reads what was acknowledged first, and the books then."""
    path = tmp_path / "ledger.db"
    ledger = await worked(path, 0, 1)
    working = asyncio.create_task(worked_on(ledger))
    reports = []
    async with asyncio.timeout(60):
        # However busy the machine is: until some of them saw more than others.
        while len(reports) < 20 or len({report.entries for report in reports}) == 1:
            reports.append(await asyncio.to_thread(check, path))
    working.cancel()
    await asyncio.gather(working, return_exceptions=True)
    await ledger.close()

    assert {()} == {report.violations for report in reports}


async def worked_on(ledger: Ledger) -> None:
    number = 100
    while True:
        number += 1
        await ledger.hold(*asked(f"job-{number}", "ann", 10, "card", "tactical"))


async def test_every_acknowledged_entry_is_remembered(tmp_path: Path) -> None:
    """At once, not at the end; and what was refused is not."""
    path = tmp_path / "ledger.db"
    ledger = await worked(path, 0, 2)
    with snapshot(path) as (db, _):
        assert (7, 7) == (last_entry_id(db), read_acknowledged(path))
    await ledger.hold(*asked("open", "ann", 10, "card", "tactical"))
    assert 8 == read_acknowledged(path)
    await ledger.budget("ann")
    assert 8 == read_acknowledged(path)
    await ledger.close()
    assert 8 == read_acknowledged(path)


async def test_a_lock_of_an_older_program_is_taken_over(path: Path) -> None:
    """It says that there was a ledger, and not how far it had got."""
    beside(path, ".lock").write_bytes(MARK)

    ledger = await Ledger(path).open()
    await ledger.close()

    report = check(path)
    assert report.entries + report.folded_entries == read_acknowledged(path)


async def test_a_lock_that_somebody_else_wrote_is_refused_in_words(path: Path) -> None:
    """It could not be told what is missing; the audit can, once it is out of the way."""
    beside(path, ".lock").write_text("mine\n")

    for look in (lambda: Ledger(path).open(), lambda: asyncio.to_thread(check, path)):
        with pytest.raises(LedgerCorrupt, match=r"ledger\.db\.lock is damaged"):
            await look()


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    with small_tmpfs(tmp_path / "disk", "64k") as disk:
        yield disk


def test_a_disk_that_takes_nothing_leaves_what_is_remembered(disk: Disk) -> None:
    """An earlier entry is remembered then, which is true too; the books are not kept from going on.

    But where nothing is remembered yet, there must be room for it.
    """
    disk.fill()

    with hold_lock(disk.path / "ledger.db") as held:
        held.acknowledge(5, 0)
        assert 0 == held.last
        with pytest.raises(OSError, match=os.strerror(28)):
            held.begin(5, 0)
