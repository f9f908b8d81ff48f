"""Who is next, by what was done for whom: real threads, held where the order is looked at."""

from __future__ import annotations

import asyncio
import functools
import threading
import time
from collections.abc import AsyncIterator, Callable

import pytest
import pytest_asyncio

from sage_fed.errors import InvalidField, RateLimited
from sage_fed.workers import SMALL_SIZE, Workers

WAIT_S = 20.0
LARGE = 200_000


class Rig:
    """Workers, and what they have done in order."""

    def __init__(self, workers: Workers) -> None:
        self.workers = workers
        self.order: list[str] = []
        self.tasks: list[asyncio.Task[str]] = []

    async def hold(self, size: int) -> Callable[[], None]:
        """Keep one thread busy until the returned function is called."""
        began, go_on = asyncio.Event(), threading.Event()
        loop = asyncio.get_running_loop()

        def work() -> str:
            loop.call_soon_threadsafe(began.set)
            assert go_on.wait(WAIT_S)
            return ""

        self.tasks.append(asyncio.create_task(self.workers.run("holder", size, work)))
        await asyncio.wait_for(began.wait(), WAIT_S)
        return go_on.set

    def ask(self, account: str, size: int) -> asyncio.Task[str]:
        """Have something done that only notes its account."""

        def work() -> str:
            self.order.append(account)
            return account

        self.tasks.append(asyncio.create_task(self.workers.run(account, size, work)))
        return self.tasks[-1]

    async def done(self) -> None:
        """Wait for everything."""
        await asyncio.wait_for(asyncio.gather(*self.tasks), WAIT_S)


@pytest_asyncio.fixture
async def rig() -> AsyncIterator[Rig]:
    with Workers(max_calls=4, max_size=2 * LARGE) as workers:
        yield Rig(workers)


async def test_long_work_never_holds_up_the_short_work_of_others(rig: Rig) -> None:
    """One thread is kept for what is short, whatever the other one has before it."""
    release = await rig.hold(LARGE)
    long = [rig.ask("loud", LARGE) for _ in range(50)]
    assert "quiet" == await asyncio.wait_for(rig.ask("quiet", SMALL_SIZE), WAIT_S)
    assert not any(task.done() for task in long)
    release()
    await rig.done()


async def test_turns_are_taken_by_size_and_not_by_call(rig: Rig) -> None:
    """Ten times shorter calls get ten turns for one, however many the other account has waiting."""
    releases = [await rig.hold(LARGE), await rig.hold(1)]
    for _ in range(20):
        rig.ask("loud", 10_000)
    for _ in range(20):
        rig.ask("quiet", 1000)
    await asyncio.sleep(0)
    for release in releases:
        release()
    await rig.done()
    third = [i for i, account in enumerate(rig.order) if account == "loud"][2]
    assert rig.order[:third].count("quiet") >= 14
    assert 40 == len(rig.order)


async def test_who_comes_one_by_one_has_no_turn_more(rig: Rig) -> None:
    """An account that has nothing waiting is not new again: what it was served still counts."""
    releases = [await rig.hold(LARGE), await rig.hold(1)]

    async def one_by_one() -> None:
        for _ in range(5):
            await rig.ask("loud", 10_000)

    for _ in range(20):
        rig.ask("quiet", 1000)
    serial = asyncio.create_task(one_by_one())
    await asyncio.sleep(0)
    for release in releases:
        release()
    await asyncio.wait_for(serial, WAIT_S)
    await rig.done()
    third = [i for i, account in enumerate(rig.order) if account == "loud"][2]
    assert rig.order[:third].count("quiet") >= 14


async def test_an_account_may_have_so_much_waiting(rig: Rig) -> None:
    """By calls and by characters; it is told when to come again, and others are not refused."""
    releases = [await rig.hold(LARGE), await rig.hold(1)]
    rig.workers.require_room("loud", 10 * LARGE)  # alone, the largest prompt has to be possible
    rig.ask("loud", LARGE)
    await asyncio.sleep(0)
    rig.workers.require_room("loud", LARGE)
    with pytest.raises(RateLimited) as raised:
        rig.workers.require_room("loud", LARGE + 1)
    assert ("loud", "max_waiting_chars", 2 * LARGE) == (
        raised.value.account, raised.value.limit, raised.value.allowed,
    )  # fmt: skip
    assert raised.value.retry_after_s
    for _ in range(3):
        rig.ask("loud", 1)
    await asyncio.sleep(0)
    with pytest.raises(RateLimited) as raised:
        rig.workers.require_room("loud", 1)
    assert ("max_waiting_calls", 4) == (raised.value.limit, raised.value.allowed)
    rig.workers.require_room("quiet", LARGE)
    for release in releases:
        release()
    await rig.done()
    rig.workers.require_room("loud", LARGE)


async def test_what_nobody_waits_for_any_more_is_not_done(rig: Rig) -> None:
    """A call that ends while it waits costs nothing, and makes room."""
    releases = [await rig.hold(LARGE), await rig.hold(1)]
    gone = [rig.ask("loud", LARGE) for _ in range(4)]
    await asyncio.sleep(0)
    for task in gone:
        task.cancel()
    await asyncio.gather(*gone, return_exceptions=True)
    rig.workers.require_room("loud", LARGE)
    rig.tasks = [task for task in rig.tasks if task not in gone]
    rig.ask("loud", 1)
    for release in releases:
        release()
    await rig.done()
    assert ["loud"] == rig.order


async def test_what_the_work_raises_is_raised(rig: Rig) -> None:
    """The error of a thread is the caller's, also where nobody hears it; the thread goes on."""

    def fail() -> None:
        raise InvalidField("job.chat", "no")

    with pytest.raises(InvalidField):
        await rig.workers.run("loud", 1, fail)
    unheard = asyncio.create_task(rig.workers.run("loud", 1, fail))
    await asyncio.sleep(0)
    unheard.cancel()
    await asyncio.gather(unheard, return_exceptions=True)
    assert "quiet" == await rig.ask("quiet", 1)


async def test_an_account_rests_from_its_work_while_others_have_jobs() -> None:
    """Three times as long as it took; who has done nothing yet does not wait for that."""
    has_rivals, took_s = functools.partial(_others, {"loud", "quiet"}), 0.1
    order: list[str] = []
    with Workers(max_calls=4, max_size=LARGE, has_rivals=has_rivals) as workers:
        await workers.run("loud", 1, lambda: time.sleep(took_s))
        ended_s = time.monotonic()
        both = [workers.run(name, 1, lambda n=name: order.append(n)) for name in ("loud", "quiet")]  # type: ignore[misc]
        await asyncio.wait_for(asyncio.gather(*both), WAIT_S)
    assert ["quiet", "loud"] == order
    assert time.monotonic() - ended_s > 2 * took_s


async def test_an_account_rests_no_longer_than_others_have_jobs() -> None:
    """A minute of work is no three minutes of waiting for a daemon that has nothing to do."""
    rivals = {"quiet"}
    has_rivals = functools.partial(_others, rivals)
    with Workers(max_calls=4, max_size=LARGE, has_rivals=has_rivals) as workers:
        began_s = time.monotonic()
        await workers.run("loud", 1, lambda: time.sleep(0.02))
        # As if it had been a minute.
        workers._accounts["loud"].rested_s += 180.0
        waits = asyncio.create_task(workers.run("loud", 1, lambda: "done"))
        await asyncio.sleep(0.1)
        assert not waits.done()
        rivals.clear()
        assert "done" == await asyncio.wait_for(waits, WAIT_S)
        assert time.monotonic() - began_s < WAIT_S


def _others(rivals: set[str], account: str) -> bool:
    return bool(rivals - {account})
