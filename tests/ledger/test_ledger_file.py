"""The ledger's file under its feet: lost, cut, replaced, full, or never usable."""

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import apsw
import pytest
from holds import Asked, asked
from small_disks import small_tmpfs

from sage_fed.core import Budget
from sage_fed.errors import (
    ConfigError,
    LedgerBlocked,
    LedgerCorrupt,
    LedgerDown,
    LedgerUnusable,
    SageFedError,
)
from sage_fed.ledger import AccountTerms, HoldRequest, Ledger, check
from sage_fed.ledger.books import Books
from sage_fed.ledger.entries import Now

TERMS = AccountTerms(capacity_uatp=1000, initial_uatp=1000)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.db"


@pytest.fixture
async def made(path: Path) -> Path:
    """Closed books of one account that has spent."""
    ledger = await Ledger(path).open()
    await ledger.ensure_account("ann", TERMS)
    await ledger.hold(*request("j1"))
    await ledger.settle("j1", 4, "length")
    await ledger.close()
    return path


@pytest.fixture
async def deaths() -> list[BaseException]:
    return []


@pytest.fixture
async def running(made: Path, deaths: list[BaseException]) -> AsyncIterator[Ledger]:
    """The same books, open."""
    ledger = await Ledger(made, on_death=deaths.append).open()
    yield ledger
    await ledger.close()


def request(job_id: str, amount: int = 10) -> Asked:
    return asked(job_id, "ann", amount, "card-1", "tactical")


def beside(path: Path, suffix: str) -> Path:
    return path.with_name(path.name + suffix)


def unlink(path: Path) -> None:
    path.unlink()


def replace(path: Path) -> None:
    copy = path.with_name("copy")
    copy.write_bytes(path.read_bytes())
    copy.replace(path)


def cut(path: Path) -> None:
    os.truncate(path, 0)


def blank(path: Path) -> None:
    path.unlink()
    with contextlib.closing(apsw.Connection(str(path))) as db:
        db.execute("VACUUM")
        db.pragma("journal_mode", "wal")


@pytest.mark.parametrize(
    ("suffix", "harm", "words"),
    [
        ("", unlink, "ledger.db was removed"),
        ("", replace, "ledger.db was replaced"),
        ("", cut, "ledger.db was cut short"),
        ("-wal", unlink, "ledger.db-wal was removed"),
        ("-wal", replace, "ledger.db-wal was replaced"),
        ("-shm", unlink, "ledger.db-shm was removed"),
        (".lock", unlink, "ledger.db.lock was removed"),
        (".lock", replace, "ledger.db.lock was replaced"),
    ],
)
async def test_nothing_is_acknowledged_in_a_file_that_is_lost(
    running: Ledger,
    path: Path,
    deaths: list[BaseException],
    caplog: pytest.LogCaptureFixture,
    suffix: str,
    harm: Callable[[Path], None],
    words: str,
) -> None:
    """The next operation fails, the owner is told in words, and the client gets no path."""
    harm(beside(path, suffix))

    with pytest.raises(LedgerDown) as down:
        await running.hold(*request("lost"))

    (death,) = deaths
    assert isinstance(death, LedgerUnusable)
    assert words in death.message
    assert str(path) not in down.value.message
    assert death is down.value.__cause__
    (record,) = caplog.records
    assert (None, True) == (record.exc_info, words in record.getMessage())


@pytest.mark.parametrize("harm", [unlink, replace, cut])
async def test_a_file_lost_in_the_middle_of_an_operation_acknowledges_nothing(
    running: Ledger, path: Path, harm: Callable[[Path], None]
) -> None:
    """Also one that was there when the group began."""
    key, worst_case = request("lost")

    def decide(budget: Budget) -> HoldRequest:
        harm(path)
        return worst_case(budget)

    with pytest.raises(LedgerDown):
        await running.hold(key, decide)


async def test_an_idle_ledger_notices_too(
    running: Ledger, path: Path, deaths: list[BaseException]
) -> None:
    """The upkeep is an operation like any other."""
    path.unlink()  # noqa: ASYNC240 - nothing else runs on this loop

    with pytest.raises(LedgerDown):
        await running.expire_due()

    assert [LedgerUnusable] == [type(death) for death in deaths]


async def test_a_copy_put_back_is_not_touched_by_the_one_that_lost_its_file(
    running: Ledger, path: Path
) -> None:
    """Closing removes no file that somebody else has put there, and the books open again."""
    before = await running.budget("ann")
    for suffix in ("", "-wal", "-shm"):
        replace(beside(path, suffix))
    with pytest.raises(LedgerDown):
        await running.budget("ann")
    await running.close()

    assert beside(path, "-wal").exists()
    again = await Ledger(path).open()
    assert before == await again.budget("ann")
    await again.close()
    assert () == check(path).violations


async def test_the_daemon_that_lost_its_lock_writes_nothing_more(
    running: Ledger, path: Path
) -> None:
    """A second one gets in, and has the books to itself from then on."""
    beside(path, ".lock").unlink()
    second = await Ledger(path).open()
    with pytest.raises(LedgerDown):
        await running.hold(*request("first"))
    await second.hold(*request("second"))
    await running.close()
    await second.close()

    report = await asyncio.to_thread(check, path)
    assert (2, 1, ()) == (report.jobs, report.open_holds, report.violations)


@pytest.mark.parametrize(
    ("harm", "words"),
    [(unlink, "there was one"), (cut, "is empty or damaged"), (blank, "is empty or damaged")],
)
async def test_lost_books_are_not_begun_anew(
    made: Path, harm: Callable[[Path], None], words: str
) -> None:
    """A fresh grant has to be asked for; both the start and the check say what to do."""
    harm(made)

    for look in (lambda: Ledger(made).open(), lambda: asyncio.to_thread(check, made)):
        with pytest.raises(LedgerCorrupt, match=words) as refusal:
            await look()
        assert "restore it from a copy" in refusal.value.message
        assert "migrate" not in refusal.value.message

    for file in made.parent.iterdir():
        file.unlink()
    ledger = await Ledger(made).open()
    await ledger.close()


async def test_a_log_without_its_book_is_not_replayed_into_a_new_one(made: Path) -> None:
    """Its book was lost, also where the lock file went with it."""
    beside(made, "-wal").touch()
    beside(made, ".lock").unlink()
    unlink(made)

    with pytest.raises(LedgerCorrupt, match="there was one"):
        await Ledger(made).open()


async def test_an_empty_file_is_refused_at_the_very_first_start(path: Path) -> None:
    """Nothing of ours leaves one behind, so something else has emptied it."""
    path.touch()  # noqa: ASYNC240 - nothing else runs on this loop

    with pytest.raises(LedgerCorrupt, match="is empty"):
        await Ledger(path).open()


async def test_a_first_start_that_was_interrupted_is_begun_again(path: Path) -> None:
    """A half-made book is no book: the lock alone does not say that there was one."""
    beside(path, ".lock").touch()
    beside(path, ".new").write_bytes(b"half")

    ledger = await Ledger(path).open()
    await ledger.close()

    assert ["ledger.db", "ledger.db.lock"] == sorted(file.name for file in path.parent.iterdir())
    assert 0o600 == path.stat().st_mode & 0o777  # noqa: ASYNC240


async def test_what_the_lock_remembers_first_is_on_disk(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A power failure must not take along that there was a ledger: the mark is synced."""
    synced: dict[int, bytes] = {}
    fsync = os.fsync

    def note(descriptor: int) -> None:
        fsync(descriptor)
        if os.fstat(descriptor).st_size < 4096:
            synced[os.fstat(descriptor).st_ino] = os.pread(descriptor, 4096, 0)

    monkeypatch.setattr(os, "fsync", note)
    ledger = await Ledger(path).open()
    lock = beside(path, ".lock")
    assert lock.read_bytes() == synced.get(lock.stat().st_ino)
    await ledger.close()


async def test_a_full_disk_is_said_in_words(
    running: Ledger, path: Path, deaths: list[BaseException], caplog: pytest.LogCaptureFixture
) -> None:
    """SQLite's own word for it, from a limit on the pages of the file; nobody dies of it."""

    def fill(books: Books, _now: Now) -> None:
        books.db.pragma("max_page_count", 1)
        books.db.execute("CREATE TABLE more (x)")

    with pytest.raises(LedgerBlocked, match="takes no entries"):
        await running._ask(fill)

    assert [] == deaths
    assert any(f"no space left on {path.parent}" in line for line in caplog.messages)


def pipe(path: Path) -> None:
    os.mkfifo(path)


def folder(path: Path) -> None:
    path.mkdir()


@pytest.mark.parametrize(
    ("harm", "kind", "words"),
    [
        (pipe, ConfigError, "is not a file"),
        (folder, ConfigError, "is not a file"),
    ],
)
async def test_what_cannot_be_a_ledger_is_refused_in_words(
    path: Path, harm: Callable[[Path], None], kind: type[SageFedError], words: str
) -> None:
    """Whatever SQLite or the kernel says to it."""
    harm(path)

    with pytest.raises(kind, match=words):
        await Ledger(path).open()


async def test_a_disk_without_room_for_new_books_is_said_in_words(tmp_path: Path) -> None:
    """And leaves nothing that looks like books."""
    with small_tmpfs(tmp_path / "disk", "64k") as disk:
        disk.fill()
        with pytest.raises(LedgerUnusable, match="no space left on"):
            await Ledger(disk.path / "ledger.db").open()
        assert not (disk.path / "ledger.db").exists()


async def test_a_file_whose_mode_cannot_be_changed_is_refused_in_words(
    made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An immutable file, for example; only somebody else's mode has to be changed at all."""

    def refuse(_path: Path, _mode: int) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(Path, "chmod", refuse)
    ledger = await Ledger(made).open()
    await ledger.close()
    os.chmod(made, 0o644)  # noqa: PTH101 - the other one refuses

    with pytest.raises(LedgerUnusable, match=r"ledger\.db cannot be used: Operation not permitted"):
        await Ledger(made).open()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write what nobody may write")
async def test_a_file_that_may_not_be_written_is_refused_in_words(made: Path) -> None:
    """At the start, not at the first job."""
    os.chmod(made, 0o400)  # noqa: PTH101 - nothing else runs on this loop

    with pytest.raises(LedgerUnusable, match="may not be written"):
        await Ledger(made).open()
