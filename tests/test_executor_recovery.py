"""The executor after a failure: tiers that come back, devices that hang, numbers that are none."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest
from executor_rig import read, submit
from fake_engine import WAIT_S, FakeEngine, reference, spec

from sage_fed.core import TIER_ROLES, Tier, TierState, TierStatus
from sage_fed.device import EndReason, Executor, Heartbeat, TierSetup
from sage_fed.device.tier_loading import MOST_S, SOUND_S, BackOff, Stall
from sage_fed.errors import DeviceLost, ModelLoadError, TierUnavailable
from sage_fed.steps import NO_TOKEN, SampledToken, Step, StepReport

T, S = Tier.TACTICAL, Tier.STRATEGIC
LOOK_S = 0.01


class Watcher:
    """Keeps every state of every tier, and lets a test wait for one."""

    def __init__(self) -> None:
        self.heard: list[TierStatus] = []
        self._changed = asyncio.Event()

    def step_done(self, report: StepReport) -> None:
        """Steps are not of interest here."""

    def tier_changed(self, status: TierStatus) -> None:
        """Keep it."""
        self.heard.append(status)
        self._changed.set()

    def states(self, tier: Tier) -> list[TierState]:
        """What one tier went through."""
        return [status.state for status in self.heard if status.tier is tier]

    async def wait(self, tier: Tier, state: TierState, times: int = 1) -> TierStatus:
        """Wait until a tier has been in a state so often, and return the latest such news."""
        while self.states(tier).count(state) < times:
            self._changed.clear()
            await self._changed.wait()
        return [s for s in self.heard if (s.tier, s.state) == (tier, state)][times - 1]


@asynccontextmanager
async def serving(
    tactical: Iterator[FakeEngine | Exception], strategic: FakeEngine, **options: float
) -> AsyncIterator[tuple[Executor, Watcher]]:
    """An executor whose tactical tier is loaded with one engine after the other."""

    def load(_progress: Callable[[float], None]) -> FakeEngine:
        engine = next(tactical)
        if isinstance(engine, Exception):
            raise engine
        return engine

    watcher = Watcher()
    executor = Executor(
        {T: TierSetup(load), S: TierSetup(lambda _: strategic)},
        observers=[watcher],
        reload_s=0.0,
        **options,  # type: ignore[arg-type]
    )
    await executor.start()
    watch = asyncio.create_task(executor.watch(LOOK_S))
    for tier in TIER_ROLES:
        assert TierState.READY is (await executor.loaded(tier)).state
    try:
        async with asyncio.timeout(WAIT_S):
            yield executor, watcher
    finally:
        watch.cancel()
        await executor.stop(0.0)
    assert 0 == executor.num_live


def breaks(_step: Step) -> None:
    raise RuntimeError("injected")


async def test_a_tier_whose_engine_broke_is_loaded_again() -> None:
    """Its sequences end once, the other tier does not notice, and it serves with a new engine."""
    broken, fresh = FakeEngine(fail=breaks), FakeEngine()
    async with serving(iter([broken, fresh]), FakeEngine()) as (executor, watcher):
        strategic = submit(executor, spec(1, S, new=200))
        doomed = [submit(executor, spec(i)) for i in (2, 3, 4)]
        assert [EndReason.FAILED] * 3 == [(await read(stream))[1].reason for stream in doomed]
        failed = await watcher.wait(T, TierState.FAILED)
        served = await watcher.wait(T, TierState.READY, times=2)
        tokens, _ = await read(submit(executor, spec(5)))
        neighbour, _ = await read(strategic)
        assert [(0, 0)] * 2 == [
            (load.running, load.kv_tokens_used) for load in (executor.load(t) for t in TIER_ROLES)
        ]
    assert reference(spec(5)) == tokens
    assert reference(spec(1, S, new=200)) == neighbour
    assert 0.0 == failed.retry_s
    assert (1, None) == (served.restarts, served.retry_s)
    assert broken.closed
    loading = watcher.states(T).index(TierState.LOADING)
    assert loading < len(watcher.states(T)) - 1


async def test_a_load_that_fails_is_tried_again() -> None:
    """Also where the reason is a lasting one: an operator may put the files back."""
    engines: list[FakeEngine | Exception] = [
        FakeEngine(fail=breaks), ModelLoadError("the file is gone"), OSError("no"), FakeEngine(),
    ]  # fmt: skip
    async with serving(iter(engines), FakeEngine()) as (executor, watcher):
        await read(submit(executor, spec(1)))
        again = await watcher.wait(T, TierState.FAILED, times=2)
        await watcher.wait(T, TierState.READY, times=2)
        tokens, _ = await read(submit(executor, spec(2)))
    assert reference(spec(2)) == tokens
    assert "the file is gone" == again.message
    assert again.retry_s is not None


async def test_a_stop_ends_the_recovery() -> None:
    """A tier that would be loaded again later is not, and says that it failed."""
    engine = FakeEngine(fail=breaks)
    executor = Executor(
        {T: TierSetup(lambda _: engine), S: TierSetup(lambda _: FakeEngine())}, reload_s=3600.0
    )
    await executor.start()
    for tier in TIER_ROLES:
        await executor.loaded(tier)
    await read(submit(executor, spec(1)))
    with pytest.raises(TierUnavailable) as refused:
        submit(executor, spec(2))
    assert 60.0 == refused.value.retry_after_s
    await executor.stop(0.0)
    assert TierState.FAILED is executor.status(T).state
    executor._reload(T)
    assert TierState.FAILED is executor.status(T).state


async def test_a_device_that_hangs_is_told_and_comes_back() -> None:
    """Nobody waits for it: streams of both tiers end, new ones are refused, until it answers."""
    engine = FakeEngine(gate=threading.Semaphore(0))
    async with serving(iter([engine]), FakeEngine(), step_timeout_s=1.0) as (executor, watcher):
        streams = [submit(executor, spec(i, new=50)) for i in range(3)]
        streams.append(submit(executor, spec(3, S, new=50)))
        assert {EndReason.FAILED} == {(await read(stream))[1].reason for stream in streams}
        for tier in TIER_ROLES:
            assert TierState.FAILED is executor.status(tier).state
            assert executor.status(tier).retry_s
            with pytest.raises(TierUnavailable) as refused:
                submit(executor, spec(9, tier))
            assert refused.value.retry_after_s
        engine.let_pass(10_000)
        await watcher.wait(T, TierState.READY, times=2)
        for tier in TIER_ROLES:
            tokens, _ = await read(submit(executor, spec(10, tier)))
            assert reference(spec(10, tier)) == tokens
        assert [(0, 0, 0)] * 2 == [
            (load.running, load.waiting, load.kv_tokens_used)
            for load in (executor.load(t) for t in TIER_ROLES)
        ]
        assert 0 == executor.status(T).restarts


async def test_a_device_that_stays_away_is_given_up() -> None:
    """After as long again both tiers are down for good: only a new process can help."""
    engine = FakeEngine(gate=threading.Semaphore(0))
    async with serving(iter([engine]), FakeEngine(), step_timeout_s=0.1) as (executor, watcher):
        stream = submit(executor, spec(1, new=50))
        assert EndReason.FAILED is (await read(stream))[1].reason
        final = await watcher.wait(S, TierState.FAILED, times=2)
        engine.let_pass(10_000)
        assert final.retry_s is None
        assert {TierState.FAILED} == {executor.status(tier).state for tier in TIER_ROLES}
        with pytest.raises(TierUnavailable):
            submit(executor, spec(2, S))


async def test_a_lost_device_takes_both_tiers() -> None:
    """What the device refuses to this process it refuses to every engine of it."""

    def lost(_step: Step) -> None:
        raise DeviceLost("device-side assert")

    async with serving(iter([FakeEngine(fail=lost)]), FakeEngine()) as (executor, watcher):
        streams = [submit(executor, spec(i, tier)) for i, tier in ((1, T), (2, S))]
        assert EndReason.FAILED is (await read(streams[0]))[1].reason
        await read(streams[1])
        status = await watcher.wait(S, TierState.FAILED)
        assert status.retry_s is None
        assert "device-side" not in status.message


class Spoiled(FakeEngine):
    """Gives the sequences in `spoiled` no numbers."""

    spoiled: range = range(0)

    def answer(self, step: Step, share: float = 1.0) -> tuple[SampledToken, ...]:
        """Draw, and then lose it."""
        drawn = super().answer(step, share)
        return tuple(
            SampledToken(d.seq_id, NO_TOKEN) if d.seq_id in self.spoiled else d for d in drawn
        )


@pytest.mark.parametrize("pipelined", [False, True])
async def test_a_sequence_without_numbers_ends_alone(*, pipelined: bool) -> None:
    """It gets no garbage token, its neighbours get theirs, and nobody finds its blocks again."""
    engine = Spoiled(pipelined=pipelined)
    engine.spoiled = range(1, 2)
    async with serving(iter([engine]), FakeEngine()) as (executor, _):
        well = submit(executor, spec(0, new=40))
        bad = submit(executor, spec(1, prompt=40, new=40, account="a"))
        tokens, ended = await read(bad)
        assert (EndReason.NOT_FINITE, []) == (ended.reason, tokens)
        assert reference(spec(0, new=40)) == (await read(well))[0]
        again = replace(spec(1, prompt=40, new=4, account="a"), seq_id=7)
        tokens, ended = await read(submit(executor, again))
        assert (EndReason.LENGTH, 0) == (ended.reason, ended.cached_tokens)
        assert reference(again) == tokens
        assert TierState.READY is executor.status(T).state


async def test_a_model_that_gives_nobody_numbers_is_loaded_again() -> None:
    """Three sequences in a row without one token: its weights are not trusted any more."""
    damaged = Spoiled()
    damaged.spoiled = range(1, 1000)
    async with serving(iter([damaged, FakeEngine()]), FakeEngine()) as (executor, watcher):
        reasons = [(await read(submit(executor, spec(i))))[1].reason for i in (1, 2, 3)]
        assert [EndReason.NOT_FINITE] * 3 == reasons
        await watcher.wait(T, TierState.READY, times=2)
        tokens, _ = await read(submit(executor, spec(4)))
    assert reference(spec(4)) == tokens
    assert damaged.closed


def test_the_back_off_doubles_to_a_bound_and_forgets() -> None:
    """One failure after the other waits longer; a tier that served for long begins anew."""
    back_off = BackOff()
    assert [1, 2, 4, 8, 16, 32, MOST_S, MOST_S] == [back_off.failed(0.0) for _ in range(8)]
    back_off.ready(10.0)
    assert MOST_S == back_off.failed(10.0 + SOUND_S - 1)
    back_off.ready(1000.0)
    assert 1.0 == back_off.failed(1000.0 + SOUND_S)


def test_a_stall_is_counted_by_looks() -> None:
    """Busy and silent counts; idle, progress, and time when nobody looked do not."""
    stall = Stall(0.5)
    silent = Heartbeat(3, 100.0, busy=True)
    assert [0.0, 0.5, 1.0] == [stall.look(silent) for _ in range(3)]
    assert 0.0 == stall.look(Heartbeat(4, 101.0, busy=True))
    idle = Heartbeat(4, 102.0, busy=False)
    assert [0.0, 0.0] == [stall.look(idle) for _ in range(2)]
