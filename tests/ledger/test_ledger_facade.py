"""The asyncio facade over the real thread and a real file."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import TypeVar

import apsw
import pytest
from holds import Asked, asked, entries_of
from ledger_fakes import HandClock

from sage_fed.core import Budget
from sage_fed.errors import (
    CannotAfford,
    ConfigError,
    InvalidField,
    LedgerCorrupt,
    LedgerDown,
    NoSuchAccount,
    QueueFull,
)
from sage_fed.ledger import (
    AccountTerms,
    HoldReceipt,
    HoldRequest,
    Ledger,
    LedgerOptions,
    Recovery,
    Replay,
    RequestKey,
    check,
)
from sage_fed.ledger.books import Books
from sage_fed.ledger.entries import Now, Place

T = TypeVar("T")
TERMS = AccountTerms(capacity_uatp=1000, initial_uatp=1000)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.db"


@pytest.fixture
async def ledger(path: Path) -> AsyncIterator[Ledger]:
    opened = await Ledger(path, clock=HandClock()).open()
    await opened.ensure_account("ann", TERMS)
    yield opened
    await opened.close()


def request(job_id: str, amount: int = 10, account: str = "ann", rid: str = "") -> Asked:
    return asked(job_id, account, amount, "card-1", "tactical", client_request_id=rid)


class Gate:
    """An operation that keeps the writer busy until it is opened."""

    def __init__(self, ledger: Ledger) -> None:
        self._open = threading.Event()
        self._entered = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._pass = ledger._send(self._wait)

    def _wait(self, _books: Books, _now: Now) -> None:
        self._loop.call_soon_threadsafe(self._entered.set)
        assert self._open.wait(30), "nobody opened the gate"

    async def entered(self) -> None:
        """Wait until the writer stands in it."""
        async with asyncio.timeout(30):
            await self._entered.wait()

    async def open(self) -> None:
        """Let the writer go on."""
        self._open.set()
        await self._pass


async def started(task: asyncio.Task[T]) -> asyncio.Task[T]:
    await asyncio.sleep(0)
    return task


async def test_a_job_is_held_settled_and_replayed(ledger: Ledger):
    """The whole life of a price through the facade."""
    assert HoldReceipt("j1", 10, 990) == await ledger.hold(*request("j1", rid="r"))
    assert 10 == await ledger.held_total_uatp()
    settlement = await ledger.settle("j1", 4, "length", b"answer")

    assert (4, 996) == (settlement.charged_uatp, settlement.balance_uatp)
    assert Replay("j1", b"answer") == await ledger.lookup_request(request("any", rid="r")[0])
    assert Replay("j1", b"answer") == await ledger.hold(*request("j2", rid="r"))
    assert None is await ledger.lookup_request(request("any", rid="other")[0])
    assert ["release", "settle", "hold", "grant"] == [
        entry.kind.value for entry in await entries_of(ledger, "ann")
    ]
    assert 0 == await ledger.tidy()
    assert () == await ledger.expire_due()


async def test_concurrent_clients_never_overspend(ledger: Ledger, path: Path):
    """Of many holds at once exactly as many pass as the balance covers."""

    async def client(number: int) -> bool:
        job_id = f"j{number}"
        try:
            await ledger.hold(*request(job_id, 30))
        except CannotAfford:
            return False
        await ledger.settle(job_id, 30, "length")
        return True

    passed = await asyncio.gather(*(client(number) for number in range(200)))

    budget = await ledger.budget("ann")
    assert 33 == sum(passed)
    assert (10, 0, 990) == (budget.balance_uatp, budget.held_uatp, budget.discharged_uatp)
    assert () == check(path).violations


async def test_a_refused_operation_does_not_undo_its_neighbours(path: Path):
    """What waits together is committed together, each with its own answer."""
    groups: list[int] = []
    ledger = await Ledger(path, on_commit=lambda size, _: groups.append(size)).open()
    await ledger.ensure_account("ann", TERMS)
    gate = Gate(ledger)
    await gate.entered()
    waiting = asyncio.gather(
        ledger.hold(*request("a", 600)),
        ledger.hold(*request("b", 600)),
        ledger.hold(*request("c", 400)),
        ledger.hold(*request("d", account="nobody")),
        ledger.settle("a", 100, "length"),
        ledger.void("c", "refused"),
        return_exceptions=True,
    )
    await asyncio.sleep(0)
    await gate.open()
    a, b, c, d, settled, voided = await waiting
    await ledger.close()

    assert [1, 1, 6, 1] == groups
    assert (HoldReceipt("a", 600, 400), HoldReceipt("c", 400, 0)) == (a, c)
    assert (CannotAfford, NoSuchAccount) == (type(b), type(d))
    assert (500, 900) == (settled.balance_uatp, voided.balance_uatp)
    assert () == check(path).violations


async def test_a_refused_operation_leaves_nothing_half_done(ledger: Ledger, path: Path):
    """Even one that fails after it has written."""

    def half(books: Books, now: Now) -> None:
        books.hold(*request("half"), now)
        raise InvalidField("test", "refused at the end")

    with pytest.raises(InvalidField):
        await ledger._ask(half)

    assert 0 == await ledger.held_total_uatp()
    assert (0, ()) == (check(path).jobs, check(path).violations)


async def test_deciding_and_holding_see_one_balance(ledger: Ledger):
    """Of two jobs that each would take all, the second decides on what the first left."""

    def everything(job_id: str) -> Callable[[Budget], HoldRequest]:
        return lambda budget: HoldRequest(job_id, budget.balance_uatp, "card", "tactical")

    assert [HoldReceipt("a", 1000, 0), HoldReceipt("b", 0, 0)] == await asyncio.gather(
        ledger.hold(RequestKey("ann"), everything("a")),
        ledger.hold(RequestKey("ann"), everything("b")),
    )


async def test_a_repeated_request_is_answered_without_deciding(ledger: Ledger):
    """The first decision stands."""
    await ledger.hold(*request("j1", rid="r"))
    await ledger.settle("j1", 4, "length", b"answer")
    shown: list[Budget] = []
    key, worst_case = request("j2", rid="r")

    def decide(budget: Budget) -> HoldRequest:
        shown.append(budget)
        return worst_case(budget)

    assert Replay("j1", b"answer") == await ledger.hold(key, decide)
    assert [] == shown


async def test_a_bug_in_deciding_reaches_its_caller_only(ledger: Ledger):
    """The books were not touched, so the ledger goes on."""

    def decide(_budget: Budget) -> HoldRequest:
        raise KeyError("a bug")

    with pytest.raises(KeyError):
        await ledger.hold(RequestKey("ann"), decide)

    assert ledger.alive
    assert HoldReceipt("j1", 10, 990) == await ledger.hold(*request("j1"))


async def test_a_cancelled_hold_is_voided(ledger: Ledger, path: Path):
    """A client that goes away while its hold is being written reserves nothing."""
    gate = Gate(ledger)
    await gate.entered()
    task = await started(asyncio.create_task(ledger.hold(*request("gone"))))
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await gate.open()
    await ledger.expire_due()  # behind it in the inbox

    assert 0 == await ledger.held_total_uatp()
    assert ["grant"] == [entry.kind.value for entry in await entries_of(ledger, "ann", None, 2)]
    assert 0 == check(path).jobs


async def test_a_cancelled_second_hold_leaves_the_first_alone(ledger: Ledger):
    """Only the hold that the cancelled call itself made is given back."""
    await ledger.hold(*request("j1"))
    gate = Gate(ledger)
    await gate.entered()
    task = await started(asyncio.create_task(ledger.hold(*request("j1"))))
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await gate.open()

    assert 10 == await ledger.held_total_uatp()


async def test_a_cancelled_settlement_still_happens(ledger: Ledger):
    """Work that was done is charged, whoever has stopped waiting."""
    await ledger.hold(*request("j1"))
    gate = Gate(ledger)
    await gate.entered()
    task = await started(asyncio.create_task(ledger.settle("j1", 7, "length")))
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await gate.open()
    await ledger.expire_due()  # behind it in the inbox

    assert 7 == (await ledger.budget("ann")).discharged_uatp


async def test_a_full_inbox_refuses_holds_but_never_ends(path: Path):
    """Settling must not fail because others are asking."""
    ledger = await Ledger(path, options=LedgerOptions(inbox_limit=2)).open()
    await ledger.ensure_account("ann", TERMS)
    await ledger.hold(*request("j1"))
    gate = Gate(ledger)
    await gate.entered()
    second = await started(asyncio.create_task(ledger.hold(*request("j2"))))

    with pytest.raises(QueueFull):
        await ledger.hold(*request("j3"))
    settling = await started(asyncio.create_task(ledger.settle("j1", 1, "length")))
    await gate.open()

    assert 1 == (await settling).charged_uatp
    assert HoldReceipt("j2", 10, 980) == await second
    await ledger.close()


async def test_a_writer_that_does_not_answer_is_down_and_the_late_hold_voided(path: Path):
    """A stuck disk ends the wait with an error, and its late success reserves nothing."""
    ledger = await Ledger(path).open()
    await ledger.ensure_account("ann", TERMS)
    gate = Gate(ledger)
    await gate.entered()
    patient, ledger._options = ledger._options, LedgerOptions(answer_timeout_s=0.0)

    with pytest.raises(LedgerDown, match="does not answer"):
        await ledger.hold(*request("late"))
    ledger._options = patient
    await gate.open()
    await ledger.expire_due()  # behind it in the inbox

    assert 0 == await ledger.held_total_uatp()
    assert ["grant"] == [entry.kind.value for entry in await entries_of(ledger, "ann", None, 2)]
    assert 0 == check(path).jobs
    await ledger.close()


def break_commit(books: Books, _now: Now) -> None:
    books.db.execute("PRAGMA defer_foreign_keys = ON")
    books.db.execute("INSERT INTO request VALUES ('nobody', 'r', x'', 'no job', NULL, NULL)")


def overdraw(books: Books, _now: Now) -> None:
    books.db.execute("UPDATE account SET charged_uatp = -1")


@pytest.mark.parametrize("fault", [break_commit, overdraw])
async def test_a_failed_group_fails_everyone_in_it_and_the_ledger_is_dead(
    path: Path, fault: Callable[[Books, Now], None]
):
    """Nothing of the group is written, nothing more is taken, and the owner is told once."""
    deaths: list[BaseException] = []
    ledger = await Ledger(path, on_death=deaths.append).open()
    await ledger.ensure_account("ann", TERMS)
    gate = Gate(ledger)
    await gate.entered()
    waiting = asyncio.gather(
        ledger.hold(*request("before")),
        ledger._ask(fault),
        ledger.hold(*request("after")),
        return_exceptions=True,
    )
    await asyncio.sleep(0)
    await gate.open()
    outcomes = await waiting

    assert [LedgerDown] * 3 == [type(outcome) for outcome in outcomes]
    assert [apsw.ConstraintError] == [type(death) for death in deaths]
    assert not ledger.alive
    with pytest.raises(LedgerDown):
        await ledger.hold(*request("later"))
    await ledger.close()

    reopened = await Ledger(path).open()
    assert Recovery(0, 0) == reopened.recovery
    assert 1000 == (await reopened.budget("ann")).balance_uatp
    await reopened.close()


def hold_and_regret(books: Books, now: Now) -> None:
    books.hold(*request("regretted"), now)
    raise InvalidField("job", "is refused after it was held")


@pytest.mark.parametrize("neighbours", [0, 2])
async def test_a_refused_operation_leaves_nothing_behind(ledger: Ledger, neighbours: int):
    """Alone in its transaction or among others, which stay."""
    gate = Gate(ledger)
    await gate.entered()
    waiting = asyncio.gather(
        ledger._ask(hold_and_regret),
        *(ledger.hold(*request(f"j{i}")) for i in range(neighbours)),
        return_exceptions=True,
    )
    await asyncio.sleep(0)
    await gate.open()
    outcomes = await waiting

    assert [InvalidField] + [HoldReceipt] * neighbours == [type(outcome) for outcome in outcomes]
    assert 10 * neighbours == await ledger.held_total_uatp()
    assert HoldReceipt("regretted", 10, 990 - 10 * neighbours) == await ledger.hold(
        *request("regretted")
    )


async def test_closing_answers_what_is_queued_and_refuses_the_rest(path: Path):
    """No waiter is left behind, and closing twice is closing."""
    ledger = await Ledger(path).open()
    await ledger.ensure_account("ann", TERMS)
    held = await started(asyncio.create_task(ledger.hold(*request("j1"))))

    await ledger.close()
    await ledger.close()

    assert HoldReceipt("j1", 10, 990) == await held
    with pytest.raises(LedgerDown):
        await ledger.budget("ann")
    assert ["ledger.db", "ledger.db.lock"] == sorted(file.name for file in path.parent.iterdir())


async def test_closing_writes_the_refill(path: Path):
    """So that a reboot after a clean stop loses nothing that a client has seen."""
    clock = HandClock()
    ledger = await Ledger(path, clock=clock).open()
    await ledger.ensure_account("ann", AccountTerms(capacity_uatp=100, refill_uatp_per_s=10))
    clock.advance(5)
    await ledger.close()
    clock.reboot(uptime_s=0)
    reopened = await Ledger(path, clock=clock).open()

    assert 50 == (await reopened.budget("ann")).balance_uatp
    await reopened.close()


async def test_upkeep_expires_holds(path: Path, caplog: pytest.LogCaptureFixture):
    """The safety net runs by itself, catches what no job holds, and says so."""
    clock = HandClock()
    expired = asyncio.Event()
    ledger = await Ledger(
        path,
        clock=clock,
        options=LedgerOptions(upkeep_s=0.0),
        on_commit=lambda _size, _latency: caplog.messages and expired.set(),
    ).open()
    await ledger.ensure_account("ann", TERMS)
    await ledger.hold(*request("j1"))
    await ledger.hold(*request("runs"))
    clock.advance(3600)
    upkeep = asyncio.create_task(ledger.run_upkeep(lambda: frozenset({"runs"})))
    async with asyncio.timeout(30):
        await expired.wait()
    upkeep.cancel()
    await asyncio.wait([upkeep])

    assert ["expired 1 holds that no job ended"] == caplog.messages
    assert 10 == await ledger.held_total_uatp()
    await ledger.close()


async def test_opening_voids_orphans_and_counts_them(path: Path):
    """What a dead process had held is available again."""
    first = await Ledger(path).open()
    await first.ensure_account("ann", TERMS)
    await first.hold(*request("j1", 10))
    await first.hold(*request("j2", 20))
    await first.close()

    second = await Ledger(path).open()

    assert Recovery(2, 30) == second.recovery
    assert (1000, 0) == (
        (await second.budget("ann")).balance_uatp,
        await second.held_total_uatp(),
    )
    await second.close()


async def test_two_daemons_cannot_have_one_ledger(ledger: Ledger, path: Path):
    """The second is told so, and the first goes on."""
    with pytest.raises(ConfigError, match="open in another process"):
        await Ledger(path).open()

    assert HoldReceipt("j1", 10, 990) == await ledger.hold(*request("j1"))


async def test_what_is_not_a_current_ledger_is_refused(path: Path):
    """Another program's database, a newer version, garbage, and a missing folder."""
    other = apsw.Connection(str(path))
    other.execute("CREATE TABLE theirs (x)")
    other.close()
    with pytest.raises(ConfigError, match="is not a ledger"):
        await Ledger(path).open()
    path.unlink()  # noqa: ASYNC240 - nothing else runs on this loop

    ledger = await Ledger(path).open()
    await ledger.close()
    newer = apsw.Connection(str(path))
    newer.pragma("user_version", 99)
    newer.close()
    with pytest.raises(ConfigError, match="version 99"):
        await Ledger(path).open()

    path.write_bytes(b"not a database, but long enough to look at" * 100)  # noqa: ASYNC240
    with pytest.raises(LedgerCorrupt):
        await Ledger(path).open()
    with pytest.raises(ConfigError, match="No such file"):
        await Ledger(path.parent / "missing" / "ledger.db").open()


async def test_books_that_do_not_balance_are_not_opened(path: Path):
    """A balance changed by hand keeps the daemon from starting, and the text names it."""
    ledger = await Ledger(path).open()
    await ledger.ensure_account("ann", TERMS)
    await ledger.close()
    by_hand = apsw.Connection(str(path))
    by_hand.execute("UPDATE account SET charged_uatp = 1001")
    by_hand.close()

    with pytest.raises(LedgerCorrupt, match=r"account ann: charged is 1001 uATP, .* say 1000"):
        await Ledger(path).open()


@pytest.mark.parametrize(
    ("place", "limit"), [(None, 0), (None, 1001), (Place(-1), 1), (Place(2**63), 1)]
)
async def test_pages_out_of_range_are_refused(ledger: Ledger, place: Place | None, limit: int):
    """Limits are checked before the thread is asked."""
    with pytest.raises(InvalidField, match="page"):
        await ledger.page("ann", place, limit, lambda page: page)
