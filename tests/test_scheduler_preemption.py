"""Interrupting and going on: who gives way, how often, and that nobody sees more than a pause."""

from __future__ import annotations

import math

import hypothesis.strategies as st
import pytest
from fake_engine import reference, spec
from hypothesis import given, settings
from scheduler_bench import Bench

from sage_fed.core import Priority, Sampling
from sage_fed.device import EndReason, SequenceSpec, TokenWeights
from sage_fed.steps import BLOCK_SIZE

LOW, HIGH = {"priority": Priority.LOW}, {"priority": Priority.HIGH}


def of(account: str, seq_id: int, **fields: object) -> SequenceSpec:
    """A sequence of an account."""
    return spec(seq_id, account=account, **fields)  # type: ignore[arg-type]


def busy(bench: Bench, *asked: SequenceSpec, steps: int = 5) -> None:
    """Queue sequences and run some steps."""
    bench.add(*asked)
    for _ in range(steps):
        bench.step()


def test_a_higher_priority_interrupts_a_lower_one() -> None:
    """The low one goes on where it was: the same tokens, each once, and its prompt paid once."""
    bench = Bench(max_batch=1)
    busy(bench, spec(0, prompt=40, new=30, **LOW))
    bench.run(spec(1, **HIGH))
    assert [0, 1, 0] == bench.starts
    assert reference(spec(0, prompt=40, new=30)) == bench.tokens[0]
    assert (40, 0, 30) == (
        bench.ended[0].prompt_tokens,
        bench.ended[0].cached_tokens,
        bench.ended[0].output_tokens,
    )
    assert 1 == bench.preempted
    assert pytest.approx(bench.busy_s) == sum(ended.device_s for ended in bench.ended.values())


def test_going_on_computes_only_what_the_cache_has_not() -> None:
    """Its own full blocks are found again; without the cache everything is fed again."""
    for kept, start in ((True, 32), (False, 0)):
        bench = Bench(max_batch=1, prefix_cache=kept)
        busy(bench, spec(0, prompt=40, new=30, **LOW))
        busy(bench, spec(1, new=1, **HIGH), steps=1)
        (chunk,) = bench.step().chunks
        assert (0, start, 45 - start) == (chunk.seq_id, chunk.start, len(chunk.token_ids))
        assert [5] == [draw.index for draw in chunk.draws]


def test_an_equal_priority_interrupts_nobody() -> None:
    """Nor does a higher one that is so much younger that it would wait behind the other."""
    for asked, late_s in ((spec(1), 0.0), (spec(1, **HIGH), 61.0)):
        bench = Bench(max_batch=1, ageing_s=30.0)
        busy(bench, spec(0, new=30, **(LOW if late_s else {})))
        bench.now += late_s
        bench.run(asked)
        assert ([0, 1], 0) == (bench.starts, bench.preempted)


def test_priority_is_no_claim_against_another_account() -> None:
    """Anyone may say that their job matters most."""
    bench = Bench(max_batch=1)
    busy(bench, of("a", 0, new=30, **LOW))
    bench.run(of("b", 1, **HIGH))
    assert ([0, 1], 0) == (bench.starts, bench.preempted)


def test_an_account_that_is_far_behind_interrupts() -> None:
    """After `preempt_after_s`, and once its job would not even make up for the difference.

    With one place nobody has more than a share of them, so only what was served counts.
    """
    bench = Bench(max_batch=1, step_s=1.0, preempt_after_s=5.0)
    busy(bench, of("a", 0, new=100), steps=1)
    bench.add(of("b", 2, prompt=10, new=10))
    for _ in range(28):
        bench.step()
        served = {name: a.served for name, a in bench.schedule.queue._accounts.items()}
        if 2 in bench.running:
            break
        assert served["a"] - served["b"] <= 22 or bench.now < 6.0
    assert {2} == bench.running
    bench.run()
    assert 1 == bench.preempted


def test_a_small_lead_is_no_claim() -> None:
    """Patience alone interrupts nobody: the head's whole price has to fit into the lead."""
    bench = Bench(max_batch=1, step_s=1.0, preempt_after_s=5.0)
    busy(bench, of("a", 0, prompt=1, new=100), steps=1)
    bench.add(of("b", 1, prompt=10, new=10))
    while 1 not in bench.running:
        lead = bench.schedule.queue.lead_uatp(
            bench.schedule.find(1),
            bench.schedule.find(0),  # type: ignore[arg-type]
        )
        bench.step()
    assert 20 < lead <= 22
    assert bench.now > 20.0


def test_nobody_is_interrupted_in_vain() -> None:
    """Where all who would give way do not make room enough, they go on."""
    bench = Bench(8)
    busy(bench, spec(0, prompt=30, new=30, **HIGH), spec(1, prompt=30, new=30, **LOW))
    bench.run(spec(2, prompt=100, new=20, **HIGH))
    assert ([0, 1, 2], 0) == (bench.starts, bench.preempted)


def test_only_as_many_as_needed_give_way_the_newest_first() -> None:
    """Of those with the lowest rank, until the head fits."""
    bench = Bench(12)
    busy(bench, *(spec(i, prompt=20, new=40, **LOW) for i in range(3)))
    busy(bench, spec(3, prompt=50, new=50, **HIGH), steps=1)
    assert ({0, 3}, 2) == (bench.running, bench.preempted)
    bench.run()


def test_interruptions_are_counted_and_end() -> None:
    """After the second one nothing interrupts it any more, whatever comes."""
    bench = Bench(max_batch=1, max_preemptions=2)
    busy(bench, spec(0, new=40, **LOW))
    for i in range(1, 6):
        busy(bench, spec(i, new=3, **HIGH))
    bench.run()
    assert [0, 1, 0, 2, 0, 3, 4, 5] == bench.starts
    assert 2 == bench.preempted


def test_shared_blocks_stay_with_those_who_run() -> None:
    """Interrupting one of two that share a prompt leaves the other's keys and values alone."""
    bench = Bench(14, max_batch=8)
    busy(bench, spec(0, prompt=64, system=64, new=40), steps=1)
    busy(bench, spec(1, prompt=64, system=64, new=40, sampling=Sampling(seed=4), **LOW))
    busy(bench, spec(2, prompt=40, new=40, **HIGH))
    assert ({0, 2}, 1) == (bench.running, bench.preempted)
    bench.run()


def test_a_cancel_while_interrupted_ends_at_once() -> None:
    """What it delivered counts; its blocks are long gone."""
    bench = Bench(max_batch=1)
    busy(bench, spec(0, new=30, **LOW), steps=3)
    busy(bench, spec(1, new=30, **HIGH))
    (ended,) = bench.scheduler.cancel(0, bench.now)
    assert (EndReason.CANCELLED, 5, 3) == (ended.reason, ended.prompt_tokens, ended.output_tokens)
    assert ended.first_token_s is not None


def test_overcommitted_outputs_run_together() -> None:
    """Short answers never need their worst case, so twice as many run and none is interrupted."""
    wide = {"prompt": 16, "new": 112}
    for overcommit, together in ((1.0, 2), (4.0, 5)):
        bench = Bench(16, kv_overcommit=overcommit)
        bench.add(*(spec(i, **wide) for i in range(5)))
        bench.step()
        assert together == len(bench.running)
        for i in range(5):
            bench.scheduler.cancel(i, bench.now)
        assert 0 == bench.preempted


def test_where_overcommitted_memory_runs_out_the_last_in_line_waits() -> None:
    """All come to their whole output in the end, the oldest without ever being interrupted."""
    bench = Bench(16, kv_overcommit=4.0, max_preemptions=2)
    bench.run(*(spec(i, prompt=16, new=112) for i in range(5)))
    assert 0 < bench.preempted <= 10
    assert 1 == bench.starts.count(0)
    assert all(EndReason.LENGTH is bench.ended[i].reason for i in range(5))
    assert pytest.approx(bench.busy_s) == sum(ended.device_s for ended in bench.ended.values())


def test_the_last_of_its_chances_has_its_worst_case() -> None:
    """Interrupted as often as allowed, it starts again only with every block it can need."""
    bench = Bench(16, kv_overcommit=4.0, max_preemptions=1)
    bench.add(*(spec(i, prompt=16, new=112) for i in range(5)))
    while bench.scheduler.has_work:
        bench.step()
        for seq in bench.schedule.running.values():
            if seq.preemptions:
                assert 128 // BLOCK_SIZE == len(seq.blocks)
    assert max(bench.starts.count(i) for i in range(5)) == 2


@given(
    jobs=st.lists(
        st.tuples(
            st.sampled_from("abc"),
            st.sampled_from(Priority),
            st.integers(1, 70),
            st.integers(1, 40),
            st.integers(0, 3),
            st.sampled_from([0, 40]),
        ),
        min_size=1,
        max_size=14,
    ),
    overcommit=st.sampled_from([1.0, 2.0, 8.0]),
    max_preemptions=st.integers(0, 3),
    prefix_cache=st.booleans(),
)
@settings(max_examples=3 * settings.default.max_examples // 2)
def test_an_interruption_is_only_a_pause(
    jobs: list[tuple[str, Priority, int, int, int, int]],
    overcommit: float,
    max_preemptions: int,
    prefix_cache: bool,
) -> None:
    """Whatever comes when: all end, with the tokens that they have alone, and bounded pauses."""
    bench = Bench(
        8, max_batch=3, max_waiting=20, step_s=1.0, ageing_s=5.0, overdue_s=30.0,
        preempt_after_s=2.0, kv_overcommit=overcommit, max_preemptions=max_preemptions,
        prefix_cache=prefix_cache,
    )  # fmt: skip
    weights = TokenWeights(5, 1, 20)
    for seq_id, (account, priority, prompt, new, gap, system) in enumerate(jobs):
        asked = of(
            account, seq_id, prompt=prompt, new=new, priority=priority, system=system,
            weights=weights, sampling=Sampling(seed=seq_id),
        )  # fmt: skip
        bench.add(asked)
        for _ in range(gap):
            if bench.scheduler.has_work:
                bench.step()
    bench.run()
    for seq_id in range(len(jobs)):
        ended = bench.ended[seq_id]
        assert EndReason.LENGTH is ended.reason
        assert len(bench.specs[seq_id].prompt) == ended.prompt_tokens
        # Above an even share more often, each time once it has got on by what a start costs.
        total = len(bench.specs[seq_id].prompt) + ended.output_tokens
        growth = 1 + weights.prefill / weights.decode
        assert bench.starts.count(seq_id) <= 1 + max_preemptions + math.log(total, growth)
    assert bench.preempted == len(bench.starts) - len(jobs)
    assert pytest.approx(bench.busy_s) == sum(ended.device_s for ended in bench.ended.values())
    assert {} == bench.schedule.queue._accounts
    assert 0 == bench.kv()[0]
