"""Strategic steps that pause between layers: tactical ones run in between, and nothing is lost."""

from __future__ import annotations

import asyncio
import itertools

import pytest
from executor_rig import Rig, Tokens, read, serving, submit
from fake_engine import out_of_memory_once, reference, spec

from sage_fed.core import TIER_ROLES, Tier, TierState
from sage_fed.device import Ended, EndReason, Executor
from sage_fed.steps import Step

T, S = Tier.TACTICAL, Tier.STRATEGIC
PARTS = 20


def rig_with_slow_strategic() -> Rig:
    """A strategic step takes as long as ten tactical ones, in twenty parts."""
    rig = Rig(num_parts=PARTS)
    rig.engines[S].step_s = 10 * rig.engines[T].step_s
    return rig


async def both(executor: Executor) -> list[tuple[list[int], Ended]]:
    """A long tactical answer beside a strategic one."""
    streams = [submit(executor, spec(0, T, new=200)), submit(executor, spec(1, S, new=12))]
    return await asyncio.gather(*map(read, streams))


async def test_tactical_steps_run_while_a_strategic_one_is_paused() -> None:
    """Between two tactical tokens passes a part of a strategic step, never the whole."""
    rig = rig_with_slow_strategic()
    seen: list[float] = []
    tactical = rig.engines[T]

    def look(_step: Step) -> None:
        seen.append(rig.clock.now)

    tactical.fail = look
    async with serving(rig) as executor:
        (tokens, _), (deep, _) = await both(executor)
    assert (reference(spec(0, T, new=200)), reference(spec(1, S, new=12))) == (tokens, deep)
    gaps = [after - before for before, after in itertools.pairwise(seen)]
    # What was not known at first is how long a tactical step takes.
    assert max(gaps[5:]) <= 2 * tactical.step_s + 1e-6
    assert sum(gap > 1.5 * tactical.step_s for gap in gaps) > 2 * 12, "the strategic one ran too"


async def test_a_paused_step_is_charged_its_own_time_only() -> None:
    """The device seconds of all sequences are the device's, and a step is reported once."""
    rig = rig_with_slow_strategic()
    async with serving(rig) as executor:
        (_, quick), (_, deep) = await both(executor)
        begun_s = rig.clock.now
    assert begun_s - 100.0 == pytest.approx(quick.device_s + deep.device_s)
    strategic = [r for r in rig.observer.reports if r.tier is S]
    assert 12 == sum(report.num_steps for report in strategic)
    assert deep.device_s == pytest.approx(sum(report.elapsed_s for report in strategic))


async def test_the_tiers_share_the_time_whatever_pauses() -> None:
    """The parts of a paused step are owed for once: each tier has half of the device."""
    rig = rig_with_slow_strategic()
    async with serving(rig) as executor:
        tactical = submit(executor, spec(0, T, new=480))
        strategic = submit(executor, spec(1, S, new=24))
        await read(strategic)
        executor.cancel(0)
        await read(tactical)
    reports = rig.observer.reports
    ends = [index for index, report in enumerate(reports) if report.tier is S]
    # From the end of the prompt's step to the end of the last: both have work all the time.
    shared = reports[ends[0] + 1 : ends[-1] + 1]
    taken_s = {tier: sum(r.elapsed_s for r in shared if r.tier is tier) for tier in TIER_ROLES}
    assert taken_s[T] == pytest.approx(taken_s[S], rel=0.1)


async def test_a_resumed_step_that_fails_takes_only_its_own_tier_with_it() -> None:
    """Also where tactical steps have run since it began."""
    rig = rig_with_slow_strategic()

    def fail(step: Step) -> None:
        if any(chunk.start > 8 for chunk in step.chunks):
            raise RuntimeError("the pass crashed")

    rig.engines[S].fail = fail
    async with serving(rig) as executor:
        (tokens, _), (partial, ended) = await both(executor)
        assert EndReason.FAILED is ended.reason
        assert TierState.FAILED is executor.status(S).state
    assert reference(spec(0, T, new=200)) == tokens
    assert reference(spec(1, S, new=12))[: len(partial)] == partial
    assert 0.0 < ended.device_s


async def test_a_resumed_step_that_runs_out_of_memory_is_run_again() -> None:
    """As one that never paused."""
    rig = rig_with_slow_strategic()
    rig.engines[S].fail = out_of_memory_once()
    async with serving(rig) as executor:
        _, (deep, ended) = await both(executor)
        assert rig.clock.now - 100.0 == pytest.approx(
            sum(report.elapsed_s for report in rig.observer.reports)
        )
    assert (reference(spec(1, S, new=12)), EndReason.LENGTH) == (deep, ended.reason)
    assert 1 == sum(report.out_of_memory for report in rig.observer.reports)


async def test_a_sequence_that_is_cancelled_in_a_paused_step_ends_with_it() -> None:
    """Its blocks are its own until the device has written the last of them."""
    rig = rig_with_slow_strategic()
    async with serving(rig) as executor:
        tactical = submit(executor, spec(0, T, new=300))
        strategic = submit(executor, spec(1, S, new=300))
        assert isinstance(await strategic.next(), Tokens)
        executor.cancel(1)
        _, ended = await read(strategic)
        assert EndReason.CANCELLED is ended.reason
        executor.cancel(0)
        await read(tactical)
        assert 0 == executor.load(S).kv_tokens_used


async def test_a_stop_finishes_a_paused_step() -> None:
    """No engine is closed under it, and the time it took has its bearer."""
    rig = rig_with_slow_strategic()
    async with serving(rig) as executor:
        streams = [submit(executor, spec(0, T, new=300)), submit(executor, spec(1, S, new=300))]
        assert isinstance(await streams[1].next(), Tokens)
        await executor.stop(0.0)
        endings = [(await read(stream))[1] for stream in streams]
    assert [EndReason.SHUTDOWN] * 2 == [ended.reason for ended in endings]
    assert rig.clock.now - 100.0 == pytest.approx(sum(ended.device_s for ended in endings))
