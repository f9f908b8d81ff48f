"""Two steps of a tier in flight: what the second one is fed, and what it may not touch."""

from __future__ import annotations

import pytest
from fake_engine import FakeEngine, reference, spec
from scheduler_bench import Bench, T

from sage_fed.core import TIER_ROLES, Priority, Sampling, Tier
from sage_fed.device import EndReason, Scheduler, TierLimits
from sage_fed.steps import PENDING, Step

S = Tier.STRATEGIC


def pipelined(num_blocks: int = 64, *, eos: int | None = None, **fields: float) -> Bench:
    """A tier whose engine lets a second step wait behind the first."""
    bench = Bench(num_blocks, **fields)
    bench.scheduler = Scheduler()
    ends = frozenset() if eos is None else frozenset({eos})
    bench.scheduler.open_tier(T, bench.limits, ends, pipelined=True)
    bench.engine = FakeEngine(num_blocks=num_blocks, pipelined=True)
    return bench


def fly(bench: Bench) -> list[Step]:
    """Run all there is, with a second step in flight wherever one can be; returns the steps."""
    seen, flying = list[Step](), list[Step]()
    while bench.scheduler.has_work:
        while len(flying) < 2 and (step := bench.scheduler.next_step(bench.now)):
            flying.append(step)
            seen.append(step)
        bench.land(flying.pop(0))
    return seen


def test_the_second_step_is_fed_what_the_first_draws() -> None:
    """At the position behind it, with the next index; and the tokens are those of no overlap."""
    bench = pipelined()
    bench.add(spec(0, prompt=5, new=6))
    first, second = bench.launch(), bench.launch()
    assert (5, (PENDING,)) == (second.chunks[0].start, second.chunks[0].token_ids)
    assert [1] == [draw.index for draw in second.chunks[0].draws]
    assert bench.scheduler.next_step(0.0) is None, "two are enough"
    bench.land(first)
    third = bench.launch()
    assert (6, (PENDING,)) == (third.chunks[0].start, third.chunks[0].token_ids)
    bench.land(second)
    bench.land(third)
    assert reference(spec(0, prompt=5, new=6))[:3] == bench.tokens[0]


def test_a_known_length_wastes_nothing() -> None:
    """The step of the last token is not followed by another."""
    bench = pipelined()
    bench.add(spec(0, new=4))
    assert 4 == len(fly(bench))
    assert reference(spec(0, new=4)) == bench.tokens[0]


def test_a_prompt_is_fed_on_before_its_last_piece_has_landed() -> None:
    """Its pieces depend on nothing that the device has yet to say."""
    bench = pipelined(prefill_chunk_tokens=10)
    bench.add(spec(0, prompt=25, new=3))
    steps = fly(bench)
    assert [0, 10, 20, 25, 26] == [step.chunks[0].start for step in steps]
    assert reference(spec(0, prompt=25, new=3)) == bench.tokens[0]


def test_an_end_of_text_wastes_a_row_and_keeps_its_blocks_until_it_has_landed() -> None:
    """The ending comes with the later step, whose time it bears, too."""
    plain = reference(spec(3, new=9))
    bench = pipelined(eos=plain[1])
    bench.add(spec(3, new=9, ignore_eos=False))
    first, second = bench.launch(), bench.launch()
    bench.land(first)
    third = bench.launch()
    bench.land(second)
    assert {} == bench.ended
    assert bench.kv()[0]
    assert bench.scheduler.next_step(bench.now) is None, "nobody is left to feed"
    bench.land(third)
    ended = bench.ended[3]
    assert (EndReason.EOS, 1) == (ended.reason, ended.output_tokens)
    assert plain[:1] == bench.tokens[3]
    assert 0 == bench.kv()[0]
    assert pytest.approx(bench.busy_s) == ended.device_s


def test_a_wasted_row_is_not_found_again() -> None:
    """What was fed behind an end of text is in nobody's prefix, wherever its block ends."""
    prompt = 14
    plain = reference(spec(3, prompt=prompt, new=9))
    bench = pipelined(eos=plain[1])
    bench.add(spec(3, prompt=prompt, new=9, ignore_eos=False))
    fly(bench)
    assert 15 == prompt + len(bench.tokens[3])
    assert (0, 0) == bench.kv()


def test_a_cancel_ends_with_the_last_step_in_flight() -> None:
    """Once; what the earlier step drew before the cancel is delivered, what comes later is not."""
    bench = pipelined()
    bench.add(spec(0, new=9))
    first, second = bench.launch(), bench.launch()
    bench.land(first)
    third = bench.launch()
    assert () == bench.scheduler.cancel(0, bench.now)
    assert () == bench.land(second).ended
    assert [(0, EndReason.CANCELLED)] == [(e.seq_id, e.reason) for e in bench.land(third).ended]
    assert reference(spec(0, new=9))[:1] == bench.tokens[0]


def test_a_penalty_waits_for_its_token() -> None:
    """It has to know what was drawn; who shares its batch waits, too, and nobody is left out."""
    bench = pipelined()
    bench.add(spec(0, new=5), spec(1, new=5, sampling=Sampling(repetition_penalty=1.2)))
    bench.launch()
    assert bench.scheduler.next_step(0.0) is None


def test_nobody_is_interrupted_under_a_step() -> None:
    """The one that has to give way lands first."""
    bench = pipelined(max_batch=1)
    bench.add(spec(0, new=9, priority=Priority.LOW))
    first = bench.launch()
    bench.add(spec(1, priority=Priority.HIGH))
    assert bench.scheduler.next_step(0.0) is None
    bench.land(first)
    assert [1] == [chunk.seq_id for chunk in bench.launch().chunks]


def test_a_step_that_does_not_get_on_the_device_is_built_again() -> None:
    """The one in flight is not touched by it, and the others feed the same once more."""
    bench = pipelined()
    bench.add(spec(0, new=9))
    first = bench.launch()
    bench.add(spec(1, new=9))
    second = bench.launch()
    outcome = bench.scheduler.out_of_memory(second, now=0.0, elapsed_s=0.0)
    assert [(1, EndReason.OUT_OF_MEMORY)] == [(e.seq_id, e.reason) for e in outcome.ended]
    again = bench.launch()
    assert second.chunks[0] == again.chunks[0]
    bench.land(first)
    bench.land(again)
    fly(bench)
    assert reference(spec(0, new=9)) == bench.tokens[0]


def test_a_strategic_step_follows_its_own_only_where_nothing_tactical_is_near() -> None:
    """A tactical request would have to wait for both."""
    scheduler = Scheduler()
    for tier in TIER_ROLES:
        scheduler.open_tier(tier, TierLimits(64, 512), frozenset(), pipelined=True)
    engine = FakeEngine(pipelined=True)
    scheduler.add(spec(0, S, new=9), 0.0)
    first, second = scheduler.next_step(0.0), scheduler.next_step(0.0)
    assert first is not None
    assert second is not None
    assert [S, S] == [first.tier, second.tier]
    for step in (first, second):
        scheduler.complete(step, engine.answer(step), now=1.0, elapsed_s=0.1)
    scheduler.add(spec(1, T, new=1), 1.0)
    tactical = scheduler.next_step(1.0)
    assert tactical is not None
    assert T is tactical.tier
    scheduler.complete(tactical, FakeEngine().answer(tactical), now=1.0, elapsed_s=0.01)
    assert scheduler.next_step(1.0) is not None
    assert scheduler.next_step(1.0) is None
    assert scheduler.next_step(12.0) is not None
