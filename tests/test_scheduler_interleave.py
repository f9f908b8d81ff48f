"""Two tiers on one device: who steps next, and how long a strategic chunk may be."""

from __future__ import annotations

import statistics

import pytest
from fake_engine import FakeEngine, spec
from hypothesis import given
from hypothesis import strategies as st

from sage_fed.core import TIER_ROLES, Tier
from sage_fed.device import Scheduler, TierLimits
from sage_fed.device.scheduler import DeviceClaim, shared_chunk_tokens
from sage_fed.device.tier_scheduler import StepRates
from sage_fed.steps import Step

T, S = Tier.TACTICAL, Tier.STRATEGIC
LIMITS = TierLimits(2000, 20_000, prefill_chunk_tokens=512)


class Device:
    """Both tiers on a device that takes `base_s[tier] + tokens * token_s[tier]` for a step."""

    def __init__(self, share: float = 0.5) -> None:
        self.scheduler = Scheduler(fast_share=share)
        for tier in TIER_ROLES:
            self.scheduler.open_tier(tier, LIMITS, frozenset())
        self.engine = FakeEngine(num_blocks=2000)
        self.base_s = {T: 0.010, S: 0.066}
        self.token_s = {T: 0.0, S: 0.001}
        self.ids = 0

    def add(self, tier: Tier, *, prompt: int = 1, new: int = 9000) -> None:
        """Queue a sequence."""
        self.scheduler.add(spec(self.ids, tier, prompt=prompt, new=new), 0.0)
        self.ids += 1

    def step(self) -> tuple[Step, float]:
        """Run the next step; return it and what it took."""
        step = self.scheduler.next_step(0.0)
        assert step is not None
        elapsed_s = self.base_s[step.tier] + self.token_s[step.tier] * step.num_tokens
        self.scheduler.complete(step, self.engine.run(step), now=0.0, elapsed_s=elapsed_s)
        return step, elapsed_s

    def times(self, steps: int) -> dict[Tier, float]:
        """Run steps; return the device time of each tier."""
        total = dict.fromkeys(TIER_ROLES, 0.0)
        for _ in range(steps):
            step, elapsed_s = self.step()
            total[step.tier] += elapsed_s
        return total


@pytest.mark.parametrize("share", [0.3, 0.5, 0.8])
def test_device_time_is_shared_as_configured(share: float) -> None:
    """With work on both, tactical gets its share of seconds, not of steps."""
    device = Device(share)
    device.add(T)
    device.add(S)
    times = device.times(600)
    assert pytest.approx(share, abs=0.04) == times[T] / sum(times.values())


def test_the_ratio_of_steps_follows_the_measured_times() -> None:
    """A strategic step of 6.7 tactical ones is followed by seven, one of 1.5 by three in two."""
    device = Device()
    device.add(T)
    device.add(S)
    device.times(20)
    assert "StttttttS" in _order(device, 40)
    device.base_s[S] = 0.014
    device.times(20)
    assert "SttStSttS" in _order(device, 20)


def test_tactical_work_goes_first() -> None:
    """Tactical work that arrives while strategic runs has the very next step, and its due."""
    device = Device()
    device.add(S)
    device.times(10)
    device.add(T)
    assert "tttttttS" in _order(device, 20)[:8]


def test_an_idle_tier_has_no_claim_on_the_past() -> None:
    """Strategic work that arrives late gets one step, not all that it missed."""
    device = Device()
    device.add(T)
    device.times(500)
    device.add(S)
    assert "SS" not in _order(device, 60)


def test_a_part_is_what_a_tactical_step_pays_for() -> None:
    """At a half share it is as long as one, at three quarters a third of one."""
    rates = StepRates()
    assert DeviceClaim(0.5).part_s(rates) > 0.0
    rates.record(num_tokens=1, prefills=False, elapsed_s=0.012)
    assert pytest.approx(0.012) == DeviceClaim(0.5).part_s(rates)
    assert pytest.approx(0.004) == DeviceClaim(0.75).part_s(rates)


def test_only_a_strategic_step_pauses_and_only_for_a_tactical_tier() -> None:
    """What cannot be divided, or has nobody to make way for, runs as a whole."""
    for num_parts, pauses in ((1, False), (28, True)):
        scheduler = Scheduler()
        scheduler.open_tier(S, LIMITS, frozenset(), num_parts=num_parts)
        scheduler.add(spec(0, S), 0.0)
        step = scheduler.next_step(0.0)
        assert step is not None
        assert scheduler.pause_after_s(step) is None
        scheduler.open_tier(T, LIMITS, frozenset(), num_parts=num_parts)
        assert pauses == (scheduler.pause_after_s(step) is not None)
        scheduler.add(spec(1, T), 0.0)
        quick = scheduler.next_step(0.0)
        assert quick is not None
        assert (T, None) == (quick.tier, scheduler.pause_after_s(quick))


def test_a_chunk_of_a_step_in_parts_is_as_long_as_its_parts_allow() -> None:
    """One part of it costs a tactical step; whole, it would cost four."""
    tactical, strategic = StepRates(), StepRates()
    tactical.record(num_tokens=1, prefills=False, elapsed_s=0.010)
    strategic.record(num_tokens=100, prefills=True, elapsed_s=0.100)
    strategic.record(num_tokens=1, prefills=False, elapsed_s=0.001)
    assert pytest.approx(40, abs=1) == shared_chunk_tokens(tactical, strategic, 1)
    assert pytest.approx(240, abs=1) == shared_chunk_tokens(tactical, strategic, 24)


def test_a_strategic_prefill_is_cut_while_tactical_works() -> None:
    """Its chunks cost a few tactical steps, or two of its own shortest, whichever is more."""
    device = Device()
    device.add(T)
    device.times(10)
    device.add(S, prompt=6000)
    seen = [device.step() for _ in range(400)]
    chunks = [(step.num_tokens, elapsed_s) for step, elapsed_s in seen if step.tier is S]
    assert 64 == chunks[0][0]
    settled = chunks[10:20]
    assert all(n < 512 for n, _ in settled)
    assert max(elapsed_s for _, elapsed_s in settled) <= 2.5 * min(e for _, e in chunks)
    assert min(n for n, _ in settled) >= 64


def test_a_strategic_prefill_stays_cut_where_tactical_worked_a_moment_ago() -> None:
    """The next tactical request will come while a strategic step runs, and waits for all of it."""
    device = Device()
    device.add(T, new=50)
    device.add(S)
    device.times(120)
    assert not device.scheduler._tiers[T].has_work
    device.add(S, prompt=2000)
    soon, _ = device.step()
    assert soon.num_tokens < 100
    later = device.scheduler.next_step(10.0)
    assert later is not None
    assert 512 + 1 == later.num_tokens


def test_a_chunk_grows_until_its_tokens_cost_time() -> None:
    """Where reading the weights is all the cost, a chunk grows to the whole budget."""
    device = Device()
    device.token_s[S] = 0.0
    device.add(T)
    device.add(S, prompt=8000)
    steps = [device.step()[0] for _ in range(200)]
    assert 512 == max(step.num_tokens for step in steps if step.tier is S)


def test_a_strategic_prefill_alone_takes_the_whole_budget() -> None:
    """With no tactical work there is nobody to be late for."""
    device = Device()
    device.add(S, prompt=1500)
    assert [512, 512, 476] == [device.step()[0].num_tokens for _ in range(3)]


def test_rates_are_unknown_until_measured() -> None:
    """None, not zero: a router must not take a new tier for an infinitely slow one."""
    rates = StepRates()
    assert (None, None, None) == (
        rates.decode_step_s,
        rates.prefill_tokens_per_s,
        rates.shortest_step_s,
    )


def test_a_decode_rate_is_a_median() -> None:
    """One stalled step does not move it."""
    rates = StepRates()
    for elapsed_s in (0.01, 0.01, 5.0):
        rates.record(num_tokens=1, prefills=False, elapsed_s=elapsed_s)
    assert 0.01 == rates.decode_step_s


@given(st.lists(st.floats(1e-9, 10.0), min_size=1, max_size=200))
def test_figures_are_those_of_the_last_steps(times_s: list[float]) -> None:
    """Kept up to date step by step, they are what the last 64 steps say when looked at anew."""
    rates = StepRates()
    for elapsed_s in times_s:
        rates.record(num_tokens=1, prefills=False, elapsed_s=elapsed_s)
    recent = times_s[-64:]
    assert (statistics.median(recent), min(recent)) == (rates.decode_step_s, rates.shortest_step_s)


def test_long_prompts_say_more_about_prefill() -> None:
    """Many tiny prompts, each a whole forward pass, do not hide the speed of a long one."""
    rates = StepRates()
    for _ in range(20):
        rates.record(num_tokens=5, prefills=True, elapsed_s=0.05)
    rates.record(num_tokens=500, prefills=True, elapsed_s=0.5)
    assert pytest.approx(1000, rel=0.05) == rates.prefill_tokens_per_s


def _order(device: Device, steps: int) -> str:
    return "".join("t" if device.step()[0].tier is T else "S" for _ in range(steps))


def test_what_follows_a_step_in_flight_is_built_only_where_it_is_certain() -> None:
    """Behind a strategic step a tactical one can wait; a tier's own next step never does."""
    device = Device()
    device.add(T)
    device.add(S)
    first = device.scheduler.next_step(0.0)
    assert first is not None
    assert T is first.tier
    assert device.scheduler.next_step(0.0) is None, "after one tactical step strategic may be due"
    drawn = device.engine.run(first)
    device.scheduler.complete(first, drawn, now=0.0, elapsed_s=0.01)
    deep = device.scheduler.next_step(0.0)
    assert deep is not None
    assert S is deep.tier
    behind = device.scheduler.next_step(0.0)
    assert behind is not None
    assert T is behind.tier
    assert device.scheduler.next_step(0.0) is None
    for step in (deep, behind):
        drawn = device.engine.run(step)
        device.scheduler.complete(step, drawn, now=0.0, elapsed_s=0.01)
    assert device.scheduler.next_step(0.0) is not None
