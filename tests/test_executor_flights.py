"""Steps in flight: the host's work of one step beside the device's work of another."""

from __future__ import annotations

import asyncio

import pytest
from executor_rig import Rig, Tokens, read, serving, submit
from fake_engine import FakeEngine, FakeInFlightStep, out_of_memory_once, reference, spec

from sage_fed.core import Tier, TierState
from sage_fed.device import EndReason
from sage_fed.device.device_thread import InFlightSteps
from sage_fed.steps import Step

T, S = Tier.TACTICAL, Tier.STRATEGIC


async def test_a_tactical_step_waits_on_the_device_behind_a_strategic_one() -> None:
    """It is launched before the strategic step has landed; both streams are right."""
    rig = Rig(pipelined=True)
    behind: list[int] = []

    def look(_step: Step) -> None:
        behind.append(len(rig.engines[T].flights))

    rig.engines[S].fail = look
    async with serving(rig) as executor:
        streams = [submit(executor, spec(0, T, new=40)), submit(executor, spec(1, S, new=10))]
        results = await asyncio.gather(*map(read, streams))
    assert [reference(spec(0, T, new=40)), reference(spec(1, S, new=10))] == [r[0] for r in results]
    assert 1 in behind
    assert max(behind) == 1


@pytest.mark.parametrize("broken", [T, S])
async def test_a_flight_that_fails_takes_only_its_own_tier_with_it(broken: Tier) -> None:
    """What the other tier has in flight lands and is delivered."""
    rig = Rig(pipelined=True)
    other = S if broken is T else T

    def fail(step: Step) -> None:
        if any(chunk.start > 8 for chunk in step.chunks):
            raise RuntimeError("the flight crashed")

    rig.engines[broken].fail = fail
    async with serving(rig) as executor:
        streams = [submit(executor, spec(0, broken, new=30)), submit(executor, spec(1, other))]
        (tokens, ended), (intact, _) = await asyncio.gather(*map(read, streams))
        assert EndReason.FAILED is ended.reason
        assert reference(spec(0, broken, new=30))[: len(tokens)] == tokens
        assert reference(spec(1, other)) == intact
        assert TierState.FAILED is executor.status(broken).state
        assert reference(spec(2, other)) == (await read(submit(executor, spec(2, other))))[0]


async def test_a_flight_that_runs_out_of_memory_is_flown_again() -> None:
    """Memory may be short when a step lands, too: the sequence tries again."""
    rig = Rig(pipelined=True)
    rig.engines[T].fail = out_of_memory_once()
    async with serving(rig) as executor:
        tokens, ended = await read(submit(executor, spec(0)))
    assert (reference(spec(0)), EndReason.LENGTH) == (tokens, ended.reason)
    assert 1 == sum(report.out_of_memory for report in rig.observer.reports)


async def test_a_stop_lands_what_is_in_flight() -> None:
    """No engine is closed under a step, and what the step drew is delivered."""
    rig = Rig(pipelined=True)
    async with serving(rig) as executor:
        stream = submit(executor, spec(0, new=200))
        assert isinstance(await stream.next(), Tokens)
        await executor.stop(0.0)
    assert rig.engines[T].closed
    assert [] == rig.engines[T].flights


def test_the_device_s_own_time_counts_where_it_is_known() -> None:
    """Without it, a flight is charged from the landing before it; with it, what the device says."""
    engine = FakeEngine(pipelined=True)
    flights = InFlightSteps(engine.clock)
    step = Step(T, ())
    flights.launch(engine, step)
    flights.launch(engine, step)
    engine.clock.now += 1.0  # the host's own
    assert flights.full
    assert pytest.approx(1.01) == flights.wait()[1]
    assert pytest.approx(0.01) == flights.wait()[1]
    flights.launch(engine, step)
    flight = engine.flights[0]
    assert isinstance(flight, FakeInFlightStep)
    flight.device_s = 0.5
    assert ((), 0.5) == flights.wait()
