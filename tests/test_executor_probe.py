"""Probes: timed steps that serve nobody, give way to everybody and leave nothing behind."""

from __future__ import annotations

import asyncio

import pytest
from executor_rig import Rig, read, serving, submit
from fake_engine import WAIT_S, FakeEngine, entered, spec

from sage_fed.core import TIER_ROLES, Sampling, Tier, TierState
from sage_fed.device import Executor
from sage_fed.errors import DeviceBusy, DeviceOutOfMemory, TierUnavailable
from sage_fed.steps import Chunk, Draw, Step

T, S = Tier.TACTICAL, Tier.STRATEGIC


def decode(tier: Tier, batch: int = 1, context: int = 31) -> Step:
    """One token of each of `batch` sequences, on two blocks each."""
    draw = Draw(Sampling(), 0)
    chunks = (Chunk(-1 - i, context, (1,), (2 * i, 2 * i + 1), (draw,)) for i in range(batch))
    return Step(tier, tuple(chunks))


def prepare(rig: Rig) -> None:
    """A decode step reads KV that nobody has written: give the fake's cache values."""
    for engine in rig.engines.values():
        engine.cache = dict.fromkeys(range(engine.num_blocks * 16), 0)


def used(executor: Executor) -> list[int]:
    return [executor.load(tier).kv_tokens_used for tier in TIER_ROLES]


async def all_free(executor: Executor) -> bool:
    """Probes end in order: when a later one has, nothing of the ones before is left."""
    await executor.probe([decode(T)], WAIT_S)
    return [0, 0] == used(executor)


async def test_a_probe_returns_the_device_seconds_of_each_step() -> None:
    """In order, over both tiers; it is no traffic, and its blocks are free when it returns."""
    rig = Rig()
    prepare(rig)
    rig.engines[S].step_s = 0.5
    async with serving(rig) as executor:
        elapsed = await executor.probe([decode(T), decode(S, 3), decode(T, 2)], WAIT_S)
        assert pytest.approx([0.01, 0.5, 0.01]) == list(elapsed)
        assert [0, 0] == used(executor)
    assert [] == rig.observer.reports
    assert [2, 3] == [
        len({b for chunk in engine.steps[-1].chunks for b in chunk.blocks}) // 2
        for engine in rig.engines.values()
    ]


async def test_live_work_goes_first_and_the_probe_starts_again() -> None:
    """A job that comes in the middle of a probe is served whole before the probe goes on."""
    rig = Rig()
    prepare(rig)
    engine = rig.gate(T)
    async with serving(rig) as executor:
        probe = asyncio.create_task(executor.probe([decode(T)] * 3, WAIT_S))
        await entered(engine)
        engine.let_pass()
        await entered(engine)
        # Longer than what the pool would hold beside the probe's blocks.
        stream = submit(executor, spec(0, prompt=400, new=12))
        engine.let_pass(100)
        tokens, _ = await read(stream)
        assert 12 == len(tokens)
        assert 3 == len(await probe)
        assert [0, 0] == used(executor)
    ids = [step.chunks[0].seq_id for step in engine.steps]
    first_live, last_live = ids.index(0), len(ids) - 1 - ids[::-1].index(0)
    assert {0} == set(ids[first_live : last_live + 1]), "the job was never interrupted"
    assert [-1] * 3 == ids[last_live + 1 :], "and the probe was run anew, from its first step"


async def test_a_cancelled_probe_leaves_no_block_behind() -> None:
    """Whoever goes away in the middle of it leaves the pool as it was."""
    rig = Rig()
    prepare(rig)
    engine = rig.gate(T)
    async with serving(rig) as executor:
        probe = asyncio.create_task(executor.probe([decode(T), decode(S)] * 50, WAIT_S))
        await entered(engine)
        probe.cancel()
        with pytest.raises(asyncio.CancelledError):
            await probe
        engine.let_pass(100)
        assert await all_free(executor)
    assert len(engine.steps) < 50


async def test_a_probe_that_finds_no_idle_moment_says_so() -> None:
    """It waits as long as it was told, not for ever; live work does not notice."""
    rig = Rig()
    prepare(rig)
    engine = rig.gate(T)
    async with serving(rig) as executor:
        stream = submit(executor, spec(0))
        await entered(engine)
        with pytest.raises(DeviceBusy):
            await executor.probe([decode(T)], 0.01)
        engine.let_pass(100)
        assert 4 == (await read(stream))[1].output_tokens
        assert await all_free(executor)


async def test_a_probe_that_does_not_fit_the_device_ends_and_the_tier_serves_on() -> None:
    """Out of memory is the probe's own affair."""
    rig = Rig()
    prepare(rig)

    def fail(step: Step) -> None:
        if len(step.chunks) > 4:
            raise DeviceOutOfMemory("no room")

    rig.engines[T].fail = fail
    async with serving(rig) as executor:
        with pytest.raises(DeviceOutOfMemory):
            await executor.probe([decode(T, 2), decode(T, 8)], WAIT_S)
        assert [0, 0] == used(executor)
        assert 1 == len(await executor.probe([decode(T, 2)], WAIT_S))


async def test_an_engine_that_breaks_under_a_probe_fails_its_tier_only() -> None:
    """As under live work; every probe that needs the tier ends, the other tier serves on."""
    rig = Rig()
    prepare(rig)

    def fail(_step: Step) -> None:
        raise RuntimeError("broken")

    rig.engines[S].fail = fail
    async with serving(rig) as executor:
        probes = [executor.probe([decode(T), decode(S)], WAIT_S) for _ in range(2)]
        for outcome in await asyncio.gather(*probes, return_exceptions=True):
            assert isinstance(outcome, TierUnavailable)
        assert TierState.FAILED is executor.status(S).state
        with pytest.raises(TierUnavailable):
            await executor.probe([decode(S)], WAIT_S)
        assert await all_free(executor)


async def test_a_stop_ends_probes_with_an_error() -> None:
    """A probe in the middle of a step does not delay the stop, and is told why it ended."""
    rig = Rig()
    prepare(rig)
    engine: FakeEngine = rig.gate(T)
    async with serving(rig) as executor:
        probe = asyncio.create_task(executor.probe([decode(T)] * 9, WAIT_S))
        await entered(engine)
        stop = asyncio.create_task(executor.stop(0.0))
        with pytest.raises(TierUnavailable):
            await probe
        engine.let_pass(100)
        await stop
        with pytest.raises(TierUnavailable):
            await executor.probe([decode(T)], WAIT_S)
