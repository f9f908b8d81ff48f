"""Another program has the ledger locked, or its disk hangs: refused, never the writer's end."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import apsw
import pytest
from holds import Asked, asked

from sage_fed.errors import LedgerBlocked, LedgerDown, LedgerUnusable
from sage_fed.ledger import (
    AccountTerms,
    HoldReceipt,
    Ledger,
    LedgerOptions,
    check,
    ledger_files,
)

WAIT_S = 20.0


class Heard:
    """What the ledger said."""

    def __init__(self) -> None:
        self.writable: list[bool] = []
        self.deaths: list[BaseException] = []
        self.changed = asyncio.Event()

    def disk(self, writable: bool) -> None:
        """Keep it."""
        self.writable.append(writable)
        self.changed.set()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.db"


@pytest.fixture
async def heard() -> Heard:
    return Heard()


def request(name: str) -> Asked:
    return asked(name, "ann", 100, "card", "tactical", ttl_s=600.0)


async def opened(path: Path, heard: Heard, busy_s: float) -> Ledger:
    ledger = await Ledger(
        path,
        options=LedgerOptions(busy_s=busy_s),
        on_disk=heard.disk,
        on_death=heard.deaths.append,
    ).open()
    await ledger.ensure_account("ann", AccountTerms(10_000, 0, initial_uatp=10_000))
    return ledger


@pytest.fixture
async def patient(path: Path, heard: Heard) -> AsyncIterator[Ledger]:
    """A ledger that waits for others longer than a test may take."""
    ledger = await opened(path, heard, busy_s=WAIT_S)
    yield ledger
    await ledger.close()


@pytest.fixture
async def hasty(path: Path, heard: Heard) -> AsyncIterator[Ledger]:
    """A ledger that waits for nobody."""
    ledger = await opened(path, heard, busy_s=0.0)
    yield ledger
    await ledger.close()


@contextlib.contextmanager
def locked(path: Path) -> Iterator[apsw.Connection]:
    """What a shell of SQLite does to the file between BEGIN IMMEDIATE and its end."""
    with contextlib.closing(apsw.Connection(str(path))) as db:
        db.execute("BEGIN IMMEDIATE")
        yield db
        if db.in_transaction:
            db.execute("ROLLBACK")


async def test_a_moments_lock_is_waited_for(patient: Ledger, path: Path, heard: Heard) -> None:
    """One operation alone and many together; also where the other program has written."""
    for number in (1, 50):
        with locked(path) as other:
            names = [f"{number}-{i}" for i in range(number)]
            holds = [asyncio.create_task(patient.hold(*request(name))) for name in names]
            # The writer stands at the lock, or will find it: either way nothing was refused.
            done, _ = await asyncio.wait(holds, timeout=0.2)
            assert set() == done
            other.execute("UPDATE job SET outcome = outcome")
            other.execute("COMMIT")
            async with asyncio.timeout(WAIT_S):
                assert all(isinstance(r, HoldReceipt) for r in await asyncio.gather(*holds))
    assert ([], []) == (heard.writable, heard.deaths)


async def test_a_lock_that_stays_refuses_what_can_be_refused(
    hasty: Ledger, path: Path, heard: Heard
) -> None:
    """Reading goes on, the end of a hold waits for the lock, and nobody restarts anything."""
    await hasty.hold(*request("before"))
    with locked(path):
        refused = await asyncio.gather(
            *(hasty.hold(*request(f"refused-{i}")) for i in range(20)), return_exceptions=True
        )
        settling = asyncio.create_task(hasty.settle("before", 60, "length"))
        await asyncio.sleep(0)
        assert 100 == (await hasty.budget("ann")).held_uatp
        assert not settling.done()
    async with asyncio.timeout(WAIT_S):
        settlement = await settling
        while heard.writable[-1:] != [True]:
            heard.changed.clear()
            await heard.changed.wait()

    assert {LedgerBlocked} == {type(outcome) for outcome in refused}
    assert all(o.retry_after_s and "/" not in o.message for o in refused)  # type: ignore[union-attr]
    assert (60, False) == (settlement.charged_uatp, settlement.repeated)
    assert isinstance(await hasty.hold(*request("after")), HoldReceipt)
    assert ([False, True], []) == (heard.writable, heard.deaths)
    assert () == check(path).violations


async def test_the_log_says_who_is_in_the_way(
    hasty: Ledger, path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """An operator looks for a full disk otherwise."""
    with locked(path), pytest.raises(LedgerBlocked):
        await hasty.hold(*request("refused"))

    assert "another program has locked the ledger" in caplog.text


class Hang:
    """An operation that keeps the writer, as a sync that does not return does."""

    def __init__(self, ledger: Ledger) -> None:
        self._over = threading.Event()
        self._answer = ledger._send(lambda *_: self._over.wait(WAIT_S))

    async def end(self) -> None:
        """Let it return."""
        self._over.set()
        assert await self._answer


def impatient(heard: Heard, **options: float) -> dict[str, object]:
    """What opens a ledger that says at once that its disk hangs."""
    limits = LedgerOptions(commit_timeout_s=0.0, **options)  # type: ignore[arg-type] # they are floats
    return {"options": limits, "on_disk": heard.disk, "on_death": heard.deaths.append}


async def test_a_disk_that_hangs_refuses_and_nothing_piles_up(path: Path, heard: Heard) -> None:
    """What is refused leaves nothing behind; the upkeep lives through it; then all goes on."""
    options = impatient(heard, upkeep_s=0.01, answer_timeout_s=0.1)
    ledger = await Ledger(path, **options).open()  # type: ignore[arg-type] # as above
    await ledger.ensure_account("ann", AccountTerms(10_000, 0, initial_uatp=10_000))
    await ledger.hold(*request("before"))
    hang = Hang(ledger)
    chores = [
        asyncio.create_task(ledger.watch()),
        asyncio.create_task(ledger.run_upkeep(frozenset)),
    ]
    async with asyncio.timeout(WAIT_S):
        await heard.changed.wait()
        assert "its disk does not answer" == ledger.trouble
        refused = await asyncio.gather(
            *(ledger.hold(*request(f"refused-{i}")) for i in range(2000)), return_exceptions=True
        )
        with pytest.raises(LedgerDown, match="does not answer"):
            await ledger.settle("before", 60, "length")
        # Its own wait has ended in the same words by now, more than once.
        await asyncio.sleep(0.3)
        assert {LedgerBlocked} == {type(outcome) for outcome in refused}
        assert not any(chore.done() for chore in chores)
        assert len(ledger._waiting) < 20
        await hang.end()
        while heard.writable[-1:] != [True]:
            heard.changed.clear()
            await heard.changed.wait()
        # Owed: it was written although nobody waited for it any more, before what was asked later.
        await ledger.tidy()
        assert 60 == (await ledger.budget("ann")).discharged_uatp
    for chore in chores:
        chore.cancel()
    await ledger.close()
    assert [] == heard.deaths
    assert () == check(path).violations


async def test_a_close_on_a_disk_that_hangs_ends_in_words(path: Path) -> None:
    """The daemon's last line says what the next start does."""
    ledger = await Ledger(path, options=LedgerOptions(answer_timeout_s=0.05)).open()
    hang = Hang(ledger)
    with pytest.raises(LedgerUnusable, match="its disk does not answer"):
        await ledger.close()
    await hang.end()
    await ledger.close()


async def test_an_opening_waits_for_a_lock(path: Path, heard: Heard) -> None:
    """The holds that a crash left have to be voided, which is written."""
    crashed = await opened(path, heard, busy_s=0.0)
    await crashed.hold(*request("orphan"))
    crashed._writer.close()
    await crashed._over.wait()
    with locked(path) as other:
        opening = asyncio.create_task(Ledger(path).open())
        done, _ = await asyncio.wait([opening], timeout=0.2)
        assert set() == done
        other.execute("ROLLBACK")
        async with asyncio.timeout(WAIT_S):
            ledger = await opening
    assert 1 == ledger.recovery.voided_jobs
    await ledger.close()


async def test_an_opening_that_takes_long_is_said(
    path: Path, heard: Heard, caplog: pytest.LogCaptureFixture
) -> None:
    """Who waits for the daemon sees for what."""
    crashed = await opened(path, heard, busy_s=0.0)
    await crashed.hold(*request("orphan"))
    crashed._writer.close()
    await crashed._over.wait()
    with locked(path) as other:
        opening = asyncio.create_task(
            Ledger(path, options=LedgerOptions(commit_timeout_s=0.01)).open()
        )
        done, _ = await asyncio.wait([opening], timeout=0.2)
        assert set() == done
        assert "is not open after 0.0 s" in caplog.text
        other.execute("ROLLBACK")
        async with asyncio.timeout(WAIT_S):
            ledger = await opening
    await ledger.close()


async def test_an_opening_under_a_lock_that_stays_fails_in_words(
    path: Path, heard: Heard, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is nobody's setting that is wrong: a service manager tries again."""
    crashed = await opened(path, heard, busy_s=0.0)
    await crashed.hold(*request("orphan"))
    crashed._writer.close()
    await crashed._over.wait()
    monkeypatch.setattr(ledger_files, "BUSY_MS", 0)
    with locked(path), pytest.raises(LedgerUnusable, match="another program has locked"):
        await Ledger(path).open()
