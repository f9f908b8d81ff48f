"""Old entries are folded into days: nothing is lost, nothing that is needed goes, nothing waits."""

from __future__ import annotations

import asyncio
import logging
import random
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import apsw
import pytest
import waiting
from holds import asked, entries_of
from killed_ledger import FOLDING_CHILD, live_and_be_killed
from ledger_fakes import Desk, HandClock

from sage_fed.core import BudgetChange, Day
from sage_fed.errors import LedgerCorrupt, LedgerDown
from sage_fed.ledger import (
    AccountTerms,
    Ledger,
    LedgerOptions,
    Replay,
    RequestKey,
    Retention,
    backup,
    check,
    schema,
)
from sage_fed.ledger.books import DAY_NS, MAX_INT, STEP_ENTRIES
from sage_fed.ledger.check import ENDS, audit, num_folded
from sage_fed.ledger.entries import NS_PER_S, Now
from sage_fed.ledger.ledger_files import read_acknowledged, snapshot

V1 = Path(__file__).parents[1] / "data" / "ledger-v1" / "ledger.db"
DAY_S = 86_400.0
DEADLINE_S = 30


@pytest.fixture
def desk() -> Iterator[Desk]:
    """Books that keep entries for ten days and request ids for two, with two accounts."""
    desk = Desk(Retention(keep_s=2 * DAY_S, entries_s=10 * DAY_S))
    desk.clock.wall_ns = 20_000 * DAY_NS
    desk.account("ann", balance=1000)
    desk.account("bob", balance=500)
    yield desk
    desk.db.close()


def fold(desk: Desk) -> int:
    """Tidy to the end, each step a transaction and an audit; how many entries went."""
    entries, passed_id, more = 0, 0, True
    while more:
        with desk.db:
            step = desk.books.tidy(desk.clock.now(), passed_id)
        assert () == audit(desk.db)
        entries, passed_id, more = entries + step.entries, step.passed_id, step.more
    return entries


def job(desk: Desk, job_id: str, charged: int = 4, account: str = "ann", rid: str = "") -> None:
    desk.hold(job_id, 10, account, client_request_id=rid)
    desk.settle(job_id, charged, b"answer" if rid else None)


def test_what_is_old_becomes_a_row_a_day_and_balances_stay(desk: Desk) -> None:
    """Grants and charges add up to what they moved; what is young stays as it was."""
    job(desk, "a1")
    job(desk, "a2", 10)
    job(desk, "b1", 1, "bob")
    desk.clock.advance(DAY_S)
    desk.set_budget(BudgetChange(balance_uatp=900))
    job(desk, "a3", 5)
    desk.clock.advance(9.5 * DAY_S)
    job(desk, "young")
    before = desk.budget("ann"), desk.budget("bob")
    young = desk.books.page("ann", None, 3).entries

    assert 10 == fold(desk)

    assert before == (desk.budget("ann"), desk.budget("bob"))
    assert [Day(20_000, 6, 1000, 14, 2, 0, 0)] == list(desk.books.days.read("ann", MAX_INT, 10))
    assert [Day(20_000, 4, 500, 1, 1, 0, 0)] == list(desk.books.days.read("bob", MAX_INT, 10))
    assert young == desk.books.page("ann", None, 3).entries
    assert [("revoke", 86, ""), ("hold", 10, "a3")] == desk.entries("ann")[:2]
    assert [] == desk.entries("bob")
    desk.clock.advance(11 * DAY_S)
    assert 7 == fold(desk)
    assert [20_010, 20_001, 20_000] == [day.day for day in desk.books.days.read("ann", MAX_INT, 10)]


def test_an_open_hold_stays_and_ends_at_its_price(desk: Desk) -> None:
    """However old it is; what came behind it goes meanwhile, and it goes when it has ended."""
    desk.hold("long", 100, ttl_s=30 * DAY_S)
    job(desk, "short")
    desk.clock.advance(20 * DAY_S)

    assert 5 == fold(desk)
    assert [("hold", 100, "long")] == desk.entries()
    assert 60 == desk.settle("long", 60).charged_uatp
    assert 0 == fold(desk)
    desk.clock.advance(10.5 * DAY_S)
    assert 3 == fold(desk)
    assert (1000 - 64, 0, 64) == (
        desk.balance(),
        desk.budget().held_uatp,
        desk.budget().discharged_uatp,
    )


def test_a_request_id_that_is_kept_keeps_its_job(desk: Desk) -> None:
    """Also where entries are to be kept for a shorter time than answers are."""
    desk.books.retention = Retention(keep_s=2 * DAY_S, entries_s=0.0)
    job(desk, "asked", rid="r")
    desk.clock.advance(2 * DAY_S)

    assert 0 == fold(desk)
    assert Replay("asked", b"answer") == desk.hold("again", 10, client_request_id="r")
    desk.clock.advance_ns(1)
    assert 5 == fold(desk)
    assert None is desk.find("r", b"")


def test_a_request_id_in_its_window_stops_what_is_behind_it(desk: Desk) -> None:
    """The clock went back after it was answered: it waits, and nothing overtakes it."""
    desk.clock.wall_ns += int(5 * DAY_NS)
    job(desk, "asked", rid="r")
    desk.clock.wall_ns -= int(5 * DAY_NS)
    job(desk, "behind")
    desk.clock.advance(11 * DAY_S)

    assert 2 == fold(desk)  # the two grants
    assert 6 == len(desk.entries())
    desk.clock.advance(5 * DAY_S)
    assert 6 == fold(desk)


@pytest.mark.parametrize("years", [-50, 5])
def test_a_clock_that_was_wrong_loses_no_money(desk: Desk, years: int) -> None:
    """A clock that is behind folds nothing; one that was ahead holds the folding up."""
    job(desk, "before")
    desk.clock.wall_ns += years * 365 * DAY_NS
    job(desk, "wrong")
    desk.clock.wall_ns -= years * 365 * DAY_NS
    desk.clock.advance(11 * DAY_S)
    job(desk, "after")

    folded = fold(desk)

    assert (8 if years < 0 else 5) == folded
    assert (1000 - 12, 12) == (desk.balance(), desk.budget().discharged_uatp)


def test_a_step_is_small_whatever_there_is(desk: Desk) -> None:
    """Of entries, of request ids and of results; each goes on where the last one ended."""
    for number in range(STEP_ENTRIES):
        job(desk, f"job-{number}", 1, rid=f"r{number}")
    desk.clock.advance(11 * DAY_S)
    now = desk.clock.now()
    changes, passed_id = [], 0
    for _ in range(5):
        before = desk.db.total_changes()
        step = desk.books.tidy(now, passed_id)
        changes.append((step.entries, step.more))
        passed_id = step.passed_id
        assert desk.db.total_changes() - before <= 6 * STEP_ENTRIES
    assert (0, True) == changes[0]
    assert max(entries for entries, _ in changes) <= STEP_ENTRIES + 2
    assert (2 + 3 * STEP_ENTRIES, False) == (sum(entries for entries, _ in changes), changes[-1][1])


def steps_of_the_writer(num_jobs: int) -> dict[str, int]:
    """SQLite's own instructions for each operation, in books with so many settled jobs."""
    desk = Desk(Retention(keep_s=1.0, entries_s=10 * DAY_S, all_results_bytes=100))
    desk.account("ann", balance=10**6, capacity=10**7, refill=3)
    desk.account("bob", balance=10**6)
    for number in range(num_jobs):
        job(desk, f"job-{number}", rid=f"r{number}")
    desk.hold("open", 10)
    counts, steps = {}, [0]

    def count() -> bool:
        steps[0] += 1
        return False

    def measure(name: str, operation: Callable[[Now], object]) -> None:
        steps[0] = 0
        with desk.db:
            operation(desk.clock.now())
        counts[name] = steps[0]

    books, request = desk.books, asked("new", "ann", 5, "card", "tactical")
    named = asked("asked", "ann", 5, "card", "tactical", client_request_id="new")
    again = asked("again", "bob", 5, "card", "tactical", client_request_id="again")
    desk.db.set_progress_handler(count, 1)
    measure("hold", lambda now: books.hold(*request, now))
    measure("hold with an id", lambda now: books.hold(*named, now))
    measure("settle", lambda now: books.settle("new", 2, "length", None, now))
    measure("settle with an id", lambda now: books.settle("asked", 2, "length", b"a", now))
    measure("void", lambda now: books.void(books.hold(*again, now).job_id, "left", now))
    measure("expire", books.expire_due)
    measure("tidy results", lambda now: books.tidy(now, 0))
    desk.clock.advance(2.0)
    measure("forget ids", lambda now: books.tidy(now, 0))
    desk.clock.advance(11 * DAY_S)
    measure("fold", lambda now: books.days.fold(now, 0.0, 0))
    measure("keep marks", books.accounts.keep_marks)
    measure("set budget", lambda now: books.accounts.set_budget("ann", BudgetChange(5), now))
    measure("start", lambda now: (audit(desk.db, ENDS), num_folded(desk.db), books.recover(now)))
    desk.db.set_progress_handler(None)
    desk.db.close()
    return counts


def test_nothing_on_the_writer_takes_longer_for_more_jobs() -> None:
    """Ten times as many are as many instructions, but for the depth of a tree; a start, too."""
    few, many_jobs = steps_of_the_writer(300), steps_of_the_writer(3000)
    longer = {
        name: (few[name], many_jobs[name]) for name in few if few[name] * 1.5 < many_jobs[name]
    }
    assert {} == longer
    assert min(few.values()) > 10


def test_results_make_room_in_small_steps() -> None:
    """The oldest first, and never more than is too much and a step."""
    desk = Desk(Retention(all_results_bytes=3 * 2**20))
    desk.account(balance=10_000)
    for number in range(10):
        desk.clock.advance(1.0)
        desk.hold(f"j{number}", 10, client_request_id=f"r{number}")
        desk.settle(f"j{number}", 1, bytes(2**20))
    kept = []
    while desk.books.requests.prune(desk.clock.now()):
        kept.append(desk.books.requests.kept_bytes() // 2**20)
        assert () == audit(desk.db)
    assert [9, 8, 7, 6, 5, 4, 3] == kept


async def test_what_costs_nothing_leaves_a_count(tmp_path: Path) -> None:
    """What cost nothing leaves no row: neither a job, nor an entry, nor an id."""
    path = tmp_path / "ledger.db"
    ledger = await Ledger(path).open()
    await ledger.ensure_account("ann", AccountTerms(1000, initial_uatp=1000))
    await ledger.hold(*asked("paid", "ann", 10, "card", "tactical"))
    await ledger.settle("paid", 4, "length")
    for number in range(300):
        await ledger.hold(
            *asked(f"j{number}", "ann", 10, "card", "tactical", client_request_id=f"r{number}")
        )
        await ledger.void(f"j{number}", "nothing was done")
    page = await ledger.page("ann", None, 1000, lambda page: page)
    await ledger.close()

    report = check(path)
    assert (1, 4, 600, ()) == (
        report.jobs,
        report.entries,
        report.folded_entries,
        report.violations,
    )
    assert ([4, 3, 2, 1], 300) == (
        [entry.entry_id for entry in page.entries],
        sum(day.voided_jobs for day in page.days),
    )
    assert 604 == read_acknowledged(path)


async def test_the_upkeep_folds_beside_the_traffic(tmp_path: Path) -> None:
    """Jobs go on while it does, and whoever counts is told."""
    clock, folded = HandClock(), asyncio.Event()
    counts: list[int] = []

    def on_fold(entries: int) -> None:
        counts.append(entries)
        if sum(counts) >= 901:
            folded.set()

    ledger = await Ledger(
        tmp_path / "ledger.db",
        clock=clock,
        options=LedgerOptions(upkeep_s=0.0, retention=Retention(keep_s=0.0, entries_s=10.0)),
        on_fold=on_fold,
    ).open()
    await ledger.ensure_account("ann", AccountTerms(10**6, initial_uatp=10**6))
    for number in range(300):
        await ledger.hold(*asked(f"j{number}", "ann", 10, "card", "tactical"))
        await ledger.settle(f"j{number}", 4, "length")
    clock.advance(20)
    upkeep = asyncio.create_task(ledger.run_upkeep(frozenset))
    async with asyncio.timeout(DEADLINE_S):
        while not folded.is_set():
            await ledger.hold(*asked("meanwhile", "ann", 10, "card", "tactical"))
            await ledger.void("meanwhile", "test")
    upkeep.cancel()
    await asyncio.wait([upkeep])
    budget = await ledger.budget("ann")
    await ledger.close()

    assert max(counts) <= STEP_ENTRIES + 2
    assert (10**6 - 1200, 1200) == (budget.balance_uatp, budget.discharged_uatp)
    assert () == check(tmp_path / "ledger.db").violations


async def test_the_books_balance_after_kill_9_while_entries_are_folded(tmp_path: Path) -> None:
    """Every acknowledged charge is in the sums, ids go on, and backups of folded books restore."""
    path = tmp_path / "ledger.db"
    chance = random.Random(16)
    charged = open_holds = folded = 0
    for life in range(6):
        said = live_and_be_killed(path, life, chance.randint(30, 300), FOLDING_CHILD)
        assert ["open", str(open_holds)] == said[0]
        charged += sum(int(words[2]) for words in said if words[0] == "settled")
        folded += sum(int(words[1]) for words in said if words[0] == "folded")
        report = check(path)
        assert () == report.violations
        open_holds = report.open_holds
        acknowledged = read_acknowledged(path)
        assert acknowledged is not None
        assert acknowledged <= report.entries + report.folded_entries
    assert folded > 100

    report = backup(path, tmp_path / "copy.db")
    assert report.folded_entries > 100
    ledger = await Ledger(path).open()
    assert charged <= (await ledger.budget("ann")).discharged_uatp
    await ledger.close()
    assert () == check(path).violations


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """Books that the version before wrote."""
    for file in V1.parent.glob("ledger.db*"):
        shutil.copy(file, tmp_path)
    return tmp_path / V1.name


async def test_books_of_the_version_before_are_migrated_and_right(old: Path) -> None:
    """Balances, open holds, kept answers and entries are what they were, numbered per account."""
    ledger = await Ledger(old, clock=HandClock()).open()
    assert (1, 25) == (ledger.recovery.voided_jobs, ledger.recovery.voided_uatp)
    budgets = [await ledger.budget(name) for name in ("ann", "bob", "carl")]
    keys = [RequestKey("bob", f"r{number}", (b"",)) for number in (1, 3)]
    replays = [await ledger.lookup_request(key) for key in keys]
    entries = {name: await entries_of(ledger, name) for name in ("ann", "bob", "carl")}
    await ledger.close()

    assert [(0, 36), (0, 26), (0, 0)] == [(b.held_uatp, b.discharged_uatp) for b in budgets]
    assert [1974, 20] == [b.balance_uatp for b in budgets[1:]]
    assert [Replay("job-1", b"answer 1"), None] == replays
    for lines in entries.values():
        assert list(range(len(lines), 0, -1)) == [entry.entry_id for entry in lines]
    assert ["grant", "revoke"] == [entry.kind.value for entry in reversed(entries["carl"])]
    assert "void" in {entry.kind.value for entry in entries["ann"]}
    report = check(old)
    assert (3, 9, 0, ()) == (report.accounts, report.jobs, report.open_holds, report.violations)
    assert report.entries == read_acknowledged(old)


async def test_a_migration_is_a_line_in_the_log(
    old: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """From which version to which, and how long; an opening that does none says nothing."""
    caplog.set_level(logging.INFO, "sage_fed.ledger")
    for _ in range(2):
        ledger = await Ledger(old, clock=HandClock()).open()
        await ledger.close()
    lines = [record.getMessage() for record in caplog.records if "migrated" in record.message]
    assert 1 == len(lines)
    assert re.search(rf"{old} was migrated from version 1 to version 3 in \d+\.\d s$", lines[0])


async def test_migrated_books_are_folded_like_others(old: Path) -> None:
    """Old ones at once: what is voided there, too."""
    clock = HandClock()
    clock.advance(400 * DAY_S)
    ledger = await Ledger(old, clock=clock).open()
    before = await ledger.budget("bob")
    folded = await ledger.tidy()
    after = await ledger.budget("bob")
    days = await ledger.page("bob", None, 10, lambda page: page.days)
    await ledger.close()

    assert folded > 25
    assert before == after
    assert (26, 2, 1) == (
        sum(day.spent_uatp for day in days),
        sum(day.settled_jobs for day in days),
        sum(day.expired_jobs for day in days),
    )
    assert () == check(old).violations


async def test_books_of_the_version_before_that_do_not_balance_stay_as_they_are(old: Path) -> None:
    """Nothing of the migration is kept, so that whoever mends them can use the older program."""
    by_hand = apsw.Connection(str(old))
    by_hand.execute("UPDATE account SET charged_uatp = charged_uatp + 1 WHERE account = 'bob'")
    by_hand.close()
    content = old.read_bytes()  # noqa: ASYNC240 - nothing else runs on this loop

    with pytest.raises(LedgerCorrupt, match="account bob: charged is 1975 uATP"):
        await Ledger(old).open()

    with apsw.Connection(str(old)) as db:
        assert 1 == db.pragma("user_version")
    assert content == old.read_bytes()  # noqa: ASYNC240


async def test_a_migration_that_was_killed_is_done_again(old: Path) -> None:
    """It is one transaction: the version before is there, whole, until it is committed."""
    db = apsw.Connection(str(old))
    db.execute("BEGIN IMMEDIATE")
    db.execute(schema.VERSION_2)
    db.execute("ROLLBACK")
    db.close()

    ledger = await Ledger(old).open()
    await ledger.close()

    assert () == check(old).violations


async def many(path: Path) -> None:
    """Books in whose file some jobs are, and in whose log some more; killed."""
    ledger = await Ledger(path).open()
    await ledger.ensure_account("ann", AccountTerms(1000, initial_uatp=1000))
    for number in range(20):
        await ledger.hold(*asked(f"j{number}", "ann", 10, "card", "tactical"))
        await ledger.settle(f"j{number}", 4, "length")
    await ledger.close()


LARGE = LedgerOptions(audit_entries=0)
"""For books that are too many for the start itself, whatever is in them."""


async def test_a_start_of_many_entries_has_them_audited_beside_the_first_jobs(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It opens at once, and says when all was proved."""
    path = tmp_path / "ledger.db"
    await many(path)
    caplog.set_level("INFO", "sage_fed.ledger.check")

    ledger = await Ledger(path, options=LARGE).open()
    assert 920 == (await ledger.budget("ann")).balance_uatp
    await asyncio.to_thread(waiting.until, lambda: bool(caplog.messages))
    await ledger.close()

    assert caplog.messages[0].startswith("the books balance, all entries audited in ")


async def test_what_that_audit_finds_ends_the_ledger(tmp_path: Path) -> None:
    """As it would have kept it from opening; in the same words, and nothing is held after it."""
    path = tmp_path / "ledger.db"
    await many(path)
    by_hand = apsw.Connection(str(path))
    by_hand.execute("UPDATE account SET charged_uatp = charged_uatp + 1")
    by_hand.close()
    dead: asyncio.Future[BaseException] = asyncio.get_running_loop().create_future()

    ledger = await Ledger(path, options=LARGE, on_death=dead.set_result).open()
    async with asyncio.timeout(DEADLINE_S):
        death = await dead

    assert isinstance(death, LedgerCorrupt)
    assert "account ann: charged is 921 uATP, its entries say 920" in death.message
    with pytest.raises(LedgerDown):
        await ledger.hold(*asked("late", "ann", 10, "card", "tactical"))
    await ledger.close()
    with pytest.raises(LedgerCorrupt, match="charged is 921"):
        await Ledger(path).open()


@pytest.mark.parametrize(
    ("statement", "words"),
    [
        ("UPDATE account SET last_number = 3", "the last of all is 61, the accounts have had 3"),
        ("UPDATE account SET held_uatp = 7", "7 uATP are held, its open jobs hold 0"),
    ],
)
async def test_a_start_of_many_entries_refuses_what_it_can_see(
    tmp_path: Path, statement: str, words: str
) -> None:
    """Lost entries and holds show in the accounts alone."""
    path = tmp_path / "ledger.db"
    await many(path)
    by_hand = apsw.Connection(str(path))
    by_hand.execute(statement)
    by_hand.close()

    with pytest.raises(LedgerCorrupt, match=words):
        await Ledger(path, options=LARGE).open()


async def test_an_older_book_under_a_newer_log_is_refused_without_reading_the_entries(
    tmp_path: Path,
) -> None:
    """The lock knows how much of the books was in the file when the log was begun anew."""
    path, mixed = tmp_path / "ledger.db", tmp_path / "mixed" / "ledger.db"
    mixed.parent.mkdir()
    await many(path)
    shutil.copy(path, mixed)
    ledger = await Ledger(path).open()
    for number in range(20, 40):
        await ledger.hold(*asked(f"j{number}", "ann", 10, "card", "tactical"))
        await ledger.settle(f"j{number}", 4, "length")
    db = apsw.Connection(str(path))
    assert 40 == db.execute("SELECT count(*) FROM job").get  # opens the log
    db.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_TRUNCATE)
    db.close()
    await ledger.hold(*asked("last", "ann", 10, "card", "tactical"))
    for suffix in ("-wal", ".lock"):
        shutil.copy(path.with_name(path.name + suffix), mixed.with_name(mixed.name + suffix))
    await ledger.close()

    with pytest.raises(LedgerCorrupt, match=r"ends at entry 61 without its log.*after entry 121"):
        await Ledger(mixed, options=LARGE).open()

    with snapshot(path) as (db, _):
        assert 122 == db.execute("SELECT last_entry_id FROM book").get


def test_ages_are_those_of_the_wall(desk: Desk) -> None:
    """Entries say it, and nobody else: the retention is in seconds."""
    job(desk, "a")
    desk.clock.advance(10 * DAY_S)
    assert 0 == fold(desk)
    desk.clock.wall_ns += 1
    assert 5 == fold(desk)
    assert 10 * DAY_S * NS_PER_S == 10 * DAY_NS
