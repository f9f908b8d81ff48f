"""The books on a real disk that fills up: what is refused, what waits, what comes back."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import pytest_asyncio
from holds import Asked, asked, entries_of
from small_disks import Disk, small_tmpfs

from sage_fed.errors import LedgerBlocked, LedgerDown, LedgerUnusable
from sage_fed.ledger import AccountTerms, HoldReceipt, Ledger, check

ATP = 1_000_000
WAIT_S = 20.0


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    """Room for books, and for little more."""
    with small_tmpfs(tmp_path / "disk", "1m") as disk:
        yield disk


class Heard:
    """What the ledger said of its disk, and whether it died."""

    def __init__(self) -> None:
        self.writable: list[bool] = []
        self.deaths: list[BaseException] = []
        self.changed = asyncio.Event()

    def disk(self, writable: bool) -> None:
        """Keep it."""
        self.writable.append(writable)
        self.changed.set()


@pytest_asyncio.fixture
async def heard() -> Heard:
    return Heard()


@pytest_asyncio.fixture
async def ledger(disk: Disk, heard: Heard) -> AsyncIterator[Ledger]:
    made = await Ledger(
        disk.path / "ledger.db", on_disk=heard.disk, on_death=heard.deaths.append
    ).open()
    await made.ensure_account("ann", AccountTerms(1000 * ATP, 0, initial_uatp=1000 * ATP))
    yield made
    await made.close()


def request(name: str) -> Asked:
    return asked(name, "ann", 100, "card", "tactical", ttl_s=600.0)


async def fill_up(ledger: Ledger, disk: Disk) -> int:
    """Fill the disk, and the room that the log has left; returns how many holds went in."""
    disk.fill()
    taken = refused = 0
    for number in range(10_000):
        try:
            await ledger.hold(*request(f"filling-{number}"))
            taken, refused = taken + 1, 0
        except LedgerBlocked:
            # A refused write may leave the log a little longer, where a smaller one then fits.
            refused += 1
            disk.fill()
        if refused == 10:
            return taken
    raise AssertionError("the disk does not fill up")


async def test_a_full_disk_refuses_holds_and_nobody_dies(
    ledger: Ledger, disk: Disk, heard: Heard
) -> None:
    """What was acknowledged stays, what was refused is not there, and reading goes on."""
    await ledger.hold(*request("before"))
    number = await fill_up(ledger, disk)
    refused = await asyncio.gather(
        *(ledger.hold(*request(f"refused-{i}")) for i in range(300)), return_exceptions=True
    )
    budget = await ledger.budget("ann")
    entries = await entries_of(ledger, "ann", None, 10)

    assert {LedgerBlocked} == {type(outcome) for outcome in refused}
    assert all(o.retry_after_s and "/" not in o.message for o in refused)  # type: ignore[union-attr]
    assert (1 + number) * 100 == budget.held_uatp == await ledger.held_total_uatp()
    assert min(10, 2 + number) == len(entries)
    assert ([False], [], True) == (heard.writable, heard.deaths, ledger.alive)
    report = check(disk.path / "ledger.db")
    assert ((), 1 + number) == (report.violations, report.open_holds)


async def test_it_goes_on_by_itself_when_there_is_room_again(
    ledger: Ledger, disk: Disk, heard: Heard
) -> None:
    """Ends of holds were owed and are written once; new holds are taken; no restart."""
    for number in range(20):
        await ledger.hold(*request(f"job-{number}"))
    filling = await fill_up(ledger, disk)
    settling = [asyncio.create_task(ledger.settle(f"job-{i}", 60, "length")) for i in range(10)]
    voiding = [asyncio.create_task(ledger.void(f"job-{i}", "failed")) for i in range(10, 20)]
    with pytest.raises(LedgerBlocked):
        await ledger.hold(*request("still-full"))
    disk.free()
    async with asyncio.timeout(WAIT_S):
        settled = await asyncio.gather(*settling)
        released = await asyncio.gather(*voiding)
        while heard.writable[-1:] != [True]:
            heard.changed.clear()
            await heard.changed.wait()

    assert [60] * 10 == [settlement.charged_uatp for settlement in settled]
    assert not any(done.repeated for done in (*settled, *released))
    assert isinstance(await ledger.hold(*request("after")), HoldReceipt)
    budget = await ledger.budget("ann")
    assert (600, (filling + 1) * 100) == (budget.discharged_uatp, budget.held_uatp)
    assert () == check(disk.path / "ledger.db").violations
    assert [] == heard.deaths


async def test_a_client_that_gave_up_on_a_full_disk_reserves_nothing(
    ledger: Ledger, disk: Disk
) -> None:
    """The taking back of a cancelled hold is owed, too."""
    filling = await fill_up(ledger, disk)
    tasks = [asyncio.create_task(ledger.hold(*request(f"gone-{i}"))) for i in range(20)]
    await asyncio.sleep(0)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    disk.free()
    async with asyncio.timeout(WAIT_S):
        while True:
            try:
                await ledger.hold(*request("after"))
                break
            except LedgerBlocked:
                await asyncio.sleep(0.05)

    assert (filling + 1) * 100 == await ledger.held_total_uatp()


async def test_what_is_owed_at_the_end_is_left_to_the_next_start(disk: Disk, heard: Heard) -> None:
    """A close on a full disk hangs nobody; the open hold is voided when the books are opened."""
    path = disk.path / "ledger.db"
    ledger = await Ledger(path, on_disk=heard.disk, on_death=heard.deaths.append).open()
    await ledger.ensure_account("ann", AccountTerms(1000 * ATP, 0, initial_uatp=1000 * ATP))
    await ledger.hold(*request("job"))
    filling = await fill_up(ledger, disk)
    settling = asyncio.create_task(ledger.settle("job", 60, "length"))
    await asyncio.sleep(0)
    async with asyncio.timeout(WAIT_S):
        await ledger.close()
        with pytest.raises(LedgerDown):
            await settling
    disk.free()
    again = await Ledger(path).open()
    assert filling + 1 == again.recovery.voided_jobs
    assert 1000 * ATP == (await again.budget("ann")).balance_uatp
    await again.close()
    assert ((), 0) == (check(path).violations, check(path).open_holds)


async def test_a_read_only_disk_is_refused_in_words(disk: Disk) -> None:
    """At the start; nothing is changed, and the books open when it may be written again."""
    path = disk.path / "ledger.db"
    ledger = await Ledger(path).open()
    await ledger.ensure_account("ann", AccountTerms(1000 * ATP, 0, initial_uatp=1000 * ATP))
    await ledger.close()
    before = path.read_bytes()
    disk.remount("ro")
    with pytest.raises(LedgerUnusable, match=os.strerror(30)):
        await Ledger(path).open()
    assert () == check(path).violations
    disk.remount("rw")
    assert before == path.read_bytes()
    again = await Ledger(path).open()
    assert 1000 * ATP == (await again.budget("ann")).balance_uatp
    await again.close()
