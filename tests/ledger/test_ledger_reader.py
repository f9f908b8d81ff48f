"""Reads beside the writer: never before it, fair per account, bounded, never out of date."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from holds import Asked, asked, entries_of
from ledger_fakes import HandClock

from sage_fed.errors import InvalidField, LedgerDown, NoSuchAccount, QueueFull
from sage_fed.ledger import AccountTerms, HoldReceipt, Ledger, LedgerOptions, RequestKey
from sage_fed.ledger import ledger as ledger_module
from sage_fed.ledger.books import Books
from sage_fed.ledger.entries import Now

TERMS = AccountTerms(capacity_uatp=10**9, initial_uatp=10**9)
READS = 4
DEADLINE_S = 30


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.db"


@pytest.fixture
def latencies_s() -> list[float]:
    return []


@pytest_asyncio.fixture
async def ledger(path: Path, latencies_s: list[float]) -> AsyncIterator[Ledger]:
    """Two accounts, each of which may have four reads waiting."""
    opened = await Ledger(
        path,
        clock=HandClock(),
        options=LedgerOptions(account_reads=READS),
        on_read=latencies_s.append,
    ).open()
    for account in ("ann", "bob"):
        await opened.ensure_account(account, TERMS)
    yield opened
    await opened.close()


def request(job_id: str, account: str = "bob") -> Asked:
    return asked(job_id, account, 10, "card", "tactical")


class LongRead:
    """A read that holds the reader's thread until it is let go."""

    def __init__(self, ledger: Ledger, account: str = "ann") -> None:
        self._let_go = threading.Event()
        self._entered = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._task = asyncio.create_task(ledger._reader.ask(account, self._read))

    def _read(self, _books: Books, _now: Now) -> None:
        self._loop.call_soon_threadsafe(self._entered.set)
        assert self._let_go.wait(DEADLINE_S), "nobody let it go"

    async def entered(self) -> None:
        """Wait until the reader is in it."""
        async with asyncio.timeout(DEADLINE_S):
            await self._entered.wait()

    async def end(self) -> None:
        """Let the reader go on."""
        self._let_go.set()
        await self._task


async def test_no_read_keeps_a_job_from_its_hold_or_its_settlement(ledger: Ledger) -> None:
    """The writer does not wait for the reader, however long a read takes."""
    reading = LongRead(ledger)
    await reading.entered()

    assert isinstance(await ledger.hold(*request("j1")), HoldReceipt)
    assert 4 == (await ledger.settle("j1", 4, "length")).charged_uatp

    await reading.end()


async def test_the_writer_is_asked_no_reads(ledger: Ledger) -> None:
    """Balances, pages, request ids and an operator's sum, all with a writer that is busy."""
    await ledger.hold(*request("j1"))
    let_go, entered = threading.Event(), threading.Event()

    def busy(_books: Books, _now: Now) -> None:
        entered.set()
        assert let_go.wait(DEADLINE_S)

    writing = ledger._send(busy)
    assert await asyncio.to_thread(entered.wait, DEADLINE_S)
    async with asyncio.timeout(DEADLINE_S):
        assert 10 == (await ledger.budget("bob")).held_uatp
        assert ["hold", "grant"] == [line.kind.value for line in await entries_of(ledger, "bob")]
        assert None is await ledger.lookup_request(RequestKey("bob", "r"))
        assert 10 == await ledger.held_total_uatp()
        assert not writing.done()
    let_go.set()
    await writing


async def test_accounts_take_turns(ledger: Ledger) -> None:
    """Who asks much waits for itself: another's one read is done before its second."""
    order: list[str] = []
    reading = LongRead(ledger, "eve")
    await reading.entered()

    async def read(account: str, name: str) -> None:
        await ledger.page(account, None, 1, lambda _: order.append(name))

    asked = [asyncio.create_task(read("ann", f"ann-{number}")) for number in range(READS)]
    await asyncio.sleep(0)
    asked.append(asyncio.create_task(read("bob", "bob-0")))
    await asyncio.sleep(0)
    await reading.end()
    await asyncio.gather(*asked)

    assert ["ann-0", "bob-0", "ann-1", "ann-2", "ann-3"] == order


async def test_who_has_read_for_long_rests(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    """Meanwhile another account's read is done, though it was asked later."""
    monkeypatch.setattr(ledger_module, "_SHORT_S", -1.0)
    order: list[str] = []
    reading = LongRead(ledger)
    await reading.entered()

    async def read(account: str, name: str) -> None:
        await ledger.page(account, None, 1, lambda _: order.append(name))

    asked = []
    for account in ("ann", "bob"):
        asked.append(asyncio.create_task(read(account, account)))
        await asyncio.sleep(0)
    await reading.end()
    await asyncio.gather(*asked)
    assert ["bob", "ann"] == order


async def test_one_read_too_many_of_an_account_is_refused(ledger: Ledger) -> None:
    """With a delay, at once, and nobody else's; what the daemon itself needs is not refused."""
    reading = LongRead(ledger)
    await reading.entered()
    waiting = [asyncio.create_task(ledger.budget("ann")) for _ in range(READS)]
    await asyncio.sleep(0)

    with pytest.raises(QueueFull, match="4 reads of this account's books wait") as refusal:
        await ledger.budget("ann")
    assert refusal.value.retry_after_s
    others = asyncio.create_task(ledger.budget("bob"))
    owed = asyncio.create_task(ledger.budget("ann", refusable=False))
    await asyncio.sleep(0)
    await reading.end()

    assert {10**9} == {(await budget).balance_uatp for budget in (*waiting, others, owed)}


async def test_a_read_whose_client_left_is_not_done(ledger: Ledger) -> None:
    """It gives its place back at once, and costs the thread nothing."""
    done: list[str] = []
    reading = LongRead(ledger)
    await reading.entered()
    asked = [
        asyncio.create_task(ledger.page("ann", None, 1, lambda _: done.append("read")))
        for _ in range(READS)
    ]
    await asyncio.sleep(0)
    for task in asked:
        task.cancel()
    await asyncio.gather(*asked, return_exceptions=True)
    last = asyncio.create_task(ledger.page("ann", None, 1, lambda _: done.append("last")))
    await asyncio.sleep(0)
    await reading.end()
    await last

    assert ["last"] == done


async def test_what_was_acknowledged_is_seen(ledger: Ledger) -> None:
    """A client that has its job's ending finds it in its balance and its entries."""
    spent = 0
    for number in range(50):
        await ledger.hold(*request(f"j{number}"))
        spent += (await ledger.settle(f"j{number}", number % 10, "length")).charged_uatp
        budget, newest = await asyncio.gather(
            ledger.budget("bob"), entries_of(ledger, "bob", None, 3)
        )
        assert (spent, 0) == (budget.discharged_uatp, budget.held_uatp)
        assert f"j{number}" in {entry.job_id for entry in newest}


async def test_an_error_of_a_read_is_its_answer(ledger: Ledger) -> None:
    """And the next one is answered."""
    with pytest.raises(NoSuchAccount):
        await ledger.budget("nobody")
    with pytest.raises(InvalidField, match="page_size"):
        await ledger.page("ann", None, 0, len)
    with pytest.raises(ZeroDivisionError):
        await ledger.page("ann", None, 1, lambda _: 1 // 0)

    assert 10**9 == (await ledger.budget("ann")).balance_uatp


async def test_a_read_without_an_answer_ends(ledger: Ledger) -> None:
    """A stuck disk holds no client up for ever."""
    reading = LongRead(ledger)
    await reading.entered()
    ledger._reader._answer_timeout_s = 0.0

    with pytest.raises(LedgerDown, match="does not answer"):
        await ledger.budget("bob")

    await reading.end()
    ledger._reader._answer_timeout_s = DEADLINE_S


async def test_reads_are_timed(ledger: Ledger, latencies_s: list[float]) -> None:
    """From the question to the answer, for the metrics."""
    await ledger.budget("ann")
    await entries_of(ledger, "ann")

    assert 2 == len(latencies_s)
    assert all(latency_s > 0 for latency_s in latencies_s)


async def test_closing_leaves_no_reader_behind(path: Path) -> None:
    """What waits is answered by the writer, what comes later is refused, and the thread is over."""
    ledger = await Ledger(path).open()
    await ledger.ensure_account("ann", TERMS)
    reading = LongRead(ledger)
    await reading.entered()
    waiting = asyncio.create_task(ledger.budget("ann"))
    await asyncio.sleep(0)
    closing = asyncio.create_task(ledger.close())
    assert 10**9 == (await waiting).balance_uatp
    await reading.end()
    await closing

    assert not ledger._reader._thread.is_alive()
    with pytest.raises(LedgerDown):
        await ledger.budget("ann")


async def test_an_answer_is_never_spelled_out(ledger: Ledger) -> None:
    """Nor while more of its account's reads wait: the text of a page takes the loop long."""
    spelled: list[str] = []

    class Answer:
        def __repr__(self) -> str:
            spelled.append("an answer")
            return "an answer"

    def read(_books: Books, _now: Now) -> Answer:
        return Answer()

    before = LongRead(ledger)
    await before.entered()
    first = asyncio.create_task(ledger._reader.ask("ann", read))
    await asyncio.sleep(0)
    behind = LongRead(ledger)
    await asyncio.sleep(0)
    last = asyncio.create_task(ledger._reader.ask("ann", read))
    await asyncio.sleep(0)
    await before.end()
    await first
    await behind.end()
    await last
    assert [] == spelled
