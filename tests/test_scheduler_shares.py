"""What one account may cost another on a tier: places at once, and steps of its own in time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import hypothesis.strategies as st
import pytest
from fake_engine import reference, spec
from hypothesis import given
from scheduler_bench import Bench

from sage_fed.core import Priority
from sage_fed.device import SequenceSpec
from sage_fed.device.request_queue import KEPT_S, PlaceShares
from sage_fed.device.tier_scheduler import StepRates


def of(account: str, seq_id: int, **fields: object) -> SequenceSpec:
    """A sequence of an account, that goes on to its last token."""
    return spec(seq_id, account=account, ignore_eos=True, **fields)  # type: ignore[arg-type]


def run(bench: Bench, step_s: Callable[[int], float], seconds: float) -> Counter[str]:
    """Run for a while; returns the tokens of each account. Steps take `step_s(tokens)`."""
    until_s, tokens = bench.now + seconds, Counter[str]()
    while bench.now < until_s:
        step = bench.launch()
        bench.step_s = step_s(step.num_tokens)
        for drawn in bench.land(step).tokens:
            tokens[bench.specs[drawn.seq_id].account] += 1
    return tokens


def test_what_an_account_has_above_its_share_gives_way_at_once() -> None:
    """Without any patience, and only up to the share."""
    bench = Bench(max_batch=4, preempt_after_s=1e9)
    bench.add(*(of("a", i, new=50) for i in range(9)))
    bench.step()
    bench.add(*(of("b", 20 + i, new=50) for i in range(3)))
    for _ in range(4):
        bench.step()
    assert {"a": 2, "b": 2} == Counter(bench.specs[i].account for i in bench.running)
    assert 2 == bench.preempted
    bench.run()
    assert all(reference(bench.specs[i]) == bench.tokens[i] for i in bench.specs)


def test_memory_above_a_share_gives_way_at_once() -> None:
    """Places are no help where one account's long sequences have all the blocks."""
    bench = Bench(20, max_batch=8, preempt_after_s=1e9)
    bench.add(*(of("a", i, prompt=16, new=64) for i in range(4)))
    bench.step()
    bench.add(of("b", 9, prompt=16, new=64))
    bench.step()
    bench.step()
    assert 9 in bench.running
    assert 1 == bench.preempted


def test_short_jobs_in_a_row_interrupt_once() -> None:
    """The place that one of them has left is kept for the next for a moment, and no longer."""
    bench = Bench(400, max_batch=4, preempt_after_s=1e9)
    bench.add(*(of("a", i, new=300) for i in range(9)))
    bench.step()
    for i in range(8):
        bench.add(of("b", 20 + i, prompt=1, new=6))
        while 20 + i not in bench.ended:
            bench.step()
        bench.step()  # its client has not asked again yet
    assert 1 == bench.preempted
    assert 3 == len(bench.running)
    bench.now += KEPT_S + 0.1
    bench.step()
    assert 4 == len(bench.running)


def test_places_are_not_kept_for_who_was_served_more() -> None:
    """Coming back soon is no claim against those who are owed."""
    places = PlaceShares(4)
    places.started("b", 2, 0.0)
    places.started("a", 2, 0.0)
    held = {"a": 2}
    assert 2 == places.kept_from("a", held, {"a": 10, "b": 10}, 1.0)
    assert 0 == places.kept_from("a", held, {"a": 10, "b": 11}, 1.0)
    assert 0 == places.kept_from("a", {"a": 1}, {"a": 10, "b": 10}, 1.0), "below its own share"
    assert 0 == places.kept_from("a", held, {"a": 10, "b": 10}, KEPT_S + 0.1)


def test_nobody_makes_its_places_its_own_by_interrupting_itself() -> None:
    """What has been interrupted as often as it may gives way all the same, once it has got on."""
    bench = Bench(400, max_batch=4, preempt_after_s=1e9)
    bench.add(*(of("a", i, prompt=1, new=300, priority=Priority.LOW) for i in range(4)))
    bench.step()
    for turn in range(2):
        asked = [10 * (turn + 1) + i for i in range(4)]
        bench.add(*(of("a", i, prompt=1, new=4, priority=Priority.HIGH) for i in asked))
        while not all(i in bench.ended for i in asked):
            bench.step()
        bench.step()
    assert 8 == bench.preempted
    bench.add(of("b", 99, prompt=1, new=1))
    for _ in range(20):
        bench.step()
    assert 99 in bench.ended
    bench.run()
    assert all(reference(bench.specs[i]) == bench.tokens[i] for i in bench.specs)


def test_what_is_above_a_share_ends_however_often_it_gives_way() -> None:
    """It is interrupted again only after it has got on by what its start has cost."""
    bench = Bench(400, max_batch=2, preempt_after_s=1e9)
    bench.add(*(of("a", i, prompt=10, new=60) for i in range(2)))
    newest = 10
    for _ in range(2000):
        if {0, 1} <= bench.ended.keys():
            break
        if all(i in bench.ended for i in range(10, newest)):
            bench.now += KEPT_S + 1.0  # its place is not kept for it any more
            bench.add(of("b", newest, prompt=1, new=1))
            newest += 1
        bench.step()
    assert {0, 1} <= bench.ended.keys()
    assert bench.preempted < 2 * 2 + 8, "as many times as its length doubles"


def test_places_are_kept_for_a_few_times_as_long_as_they_were_used() -> None:
    """Who is there for a moment now and then does not leave places empty all the time."""
    places = PlaceShares(4)
    places.started("b", 2, 0.0)
    places.left("b", 0.01, 0.01)
    places.left("b", 0.01, 0.01)
    assert 2 == places.kept_from("a", {"a": 2}, {}, 0.05)
    assert 0 == places.kept_from("a", {"a": 2}, {}, 0.2)


def test_many_rows_of_one_account_make_anothers_steps_twice_as_long_at_most() -> None:
    """And its own share of the device stays near a half, too."""
    bench = Bench(400, max_batch=36)

    def step_s(num_tokens: int) -> float:
        return 0.001 * num_tokens

    bench.add(*(of("small", i, new=400) for i in range(4)))
    alone = run(bench, step_s, 0.2)["small"] / 0.2
    bench.add(*(of("large", 10 + i, new=100) for i in range(32)))
    run(bench, step_s, 0.5)  # prompts
    tokens = run(bench, step_s, 1.2)
    assert alone * 0.45 <= tokens["small"] / 1.2
    assert 0.4 <= tokens["large"] * 0.001 / 1.2


def test_rows_that_cost_nothing_are_in_every_step() -> None:
    """A device that is bound by reading the weights gains nothing by leaving somebody out."""
    bench = Bench(400, max_batch=36)
    bench.add(*(of("small", i, new=100) for i in range(4)))
    run(bench, lambda _: 0.01, 0.1)
    bench.add(*(of("large", 10 + i, new=100) for i in range(32)))
    run(bench, lambda _: 0.011, 0.1)
    for _ in range(20):
        assert 36 == bench.step().num_tokens


@given(
    sizes=st.lists(st.integers(1, 12), min_size=2, max_size=5),
    fixed=st.floats(0.0, 2.0),
)
def test_nobody_starves(sizes: list[int], fixed: float) -> None:
    """Every account gets steps, at least half as often as in turns of its own."""
    bench = Bench(1500, max_batch=64)

    def step_s(num_tokens: int) -> float:
        return 0.001 * (fixed + num_tokens)

    # Each alone first, so that what its rows take is known.
    first = 0
    for account, size in enumerate(sizes):
        bench.add(*(of(f"{account}", first + i, prompt=1, new=2) for i in range(size)))
        first += size
        while len(bench.ended) < first:
            run(bench, step_s, 0.0001)
    for account, size in enumerate(sizes):
        bench.add(*(of(f"{account}", first + i, prompt=1, new=250) for i in range(size)))
        first += size
    seconds = 40 * sum(step_s(size) for size in sizes)
    tokens = run(bench, step_s, seconds)
    for account, size in enumerate(sizes):
        in_turns = seconds / max(len(sizes), 2) / step_s(size)
        assert in_turns * 0.5 * size <= tokens[f"{account}"] or tokens[f"{account}"] == 250 * size


def test_what_a_step_of_so_many_rows_takes() -> None:
    """Measured, between two measured ones, or rather too much than too little."""
    rates = StepRates()
    assert rates.decode_s(4) is None
    for rows, elapsed_s in ((2, 0.2), (6, 0.4)):
        rates.record(num_tokens=rows, prefills=False, elapsed_s=elapsed_s)
    rates.record(num_tokens=50, prefills=True, elapsed_s=9.0)
    assert [0.2, 0.2, 0.3, 0.4, 0.8] == [
        pytest.approx(rates.decode_s(rows)) for rows in (1, 2, 4, 6, 12)
    ]
