"""Who starts next: accounts by what they were served, and a bounded wait for everyone."""

from __future__ import annotations

from collections import Counter
from itertools import count, cycle

import hypothesis.strategies as st
from fake_engine import spec
from hypothesis import given, settings
from scheduler_bench import Bench

from sage_fed.core import Priority
from sage_fed.device import SequenceSpec, TokenWeights


def of(account: str, seq_id: int, **fields: object) -> SequenceSpec:
    """A sequence of an account."""
    return spec(seq_id, account=account, **fields)  # type: ignore[arg-type]


def served(bench: Bench, account: str) -> int:
    """An account's counter."""
    return bench.schedule.queue._accounts[account].served


def test_a_flood_does_not_keep_another_account_waiting() -> None:
    """One job behind another account's twenty starts second."""
    bench = Bench(max_batch=1)
    bench.add(*(of("flood", i) for i in range(20)), of("small", 99))
    bench.run()
    assert [0, 99, 1] == bench.starts[:3]


def test_accounts_are_served_the_same_not_started_as_often() -> None:
    """Three short jobs weigh what one of three times the tokens does."""
    bench = Bench(max_batch=1)
    bench.add(*(of("long", i, prompt=30, new=30) for i in range(3)))
    bench.add(*(of("short", 10 + i, prompt=10, new=10) for i in range(9)))
    bench.run()
    assert [0, 10, 11, 12, 1, 13, 14, 15, 2, 16, 17, 18] == bench.starts


def test_what_was_cached_weighs_less() -> None:
    """An account whose prompts are found again is served more of them."""
    weights = TokenWeights(prefill=10, cached=0, decode=1)
    bench = Bench(max_batch=1)
    bench.add(*(of("same", i, prompt=33, system=33, new=1, weights=weights) for i in range(4)))
    bench.add(*(of("new", 10 + i, prompt=33, new=1, weights=weights) for i in range(4)))
    bench.run()
    assert [0, 10, 1, 11, 2, 3, 12, 13] == bench.starts


def test_priority_orders_only_ones_own_jobs() -> None:
    """A high priority passes its own account's jobs and nobody else's."""
    bench = Bench(max_batch=1, max_preemptions=0)
    bench.add(of("a", 0), of("a", 1), of("a", 2, priority=Priority.HIGH))
    bench.add(of("b", 3, priority=Priority.LOW), of("b", 4, priority=Priority.LOW))
    bench.run()
    assert [2, 3, 0, 4, 1] == bench.starts


def test_a_newcomer_has_saved_nothing_up() -> None:
    """Who comes late shares from now on, and does not make up for its absence."""
    bench = Bench(max_batch=1)
    bench.add(*(of("old", i) for i in range(9)))
    while 5 not in bench.starts:
        bench.step()
    bench.add(*(of("new", 20 + i) for i in range(3)))
    bench.run()
    assert [5, 20, 6, 21, 7, 22, 8] == bench.starts[5:]


def test_a_debt_survives_a_short_absence() -> None:
    """Leaving for a moment does not wipe out what one was served before the others."""
    bench = Bench(max_batch=2)
    bench.add(of("modest", 0, new=40), of("greedy", 1, prompt=100, new=4))
    while 1 not in bench.ended:
        bench.step()
    bench.add(of("greedy", 2, new=2), *(of("modest", 10 + i, new=2) for i in range(3)))
    bench.run()
    assert bench.starts.index(12) < bench.starts.index(2)


def test_who_waits_too_long_goes_first() -> None:
    """Newcomers with a lower counter pass an account in debt, until it is overdue."""
    bench = Bench(max_batch=1, step_s=1.0, overdue_s=20.0, preempt_after_s=1e9)
    bench.add(of("debtor", 0, prompt=400, new=1), of("new-1", 1, new=2), of("debtor", 2, new=2))
    for newest in range(2, 12):
        bench.add(of(f"new-{newest}", 100 + newest, new=2))
        bench.step()
        bench.step()
    assert 20.0 == bench.now
    assert 2 not in bench.starts
    for newest in range(12, 16):
        bench.add(of(f"new-{newest}", 100 + newest, new=2))
        bench.step()
        bench.step()
    assert 2 in bench.starts
    assert 300 < served(bench, "debtor") - served(bench, "new-15")


def test_who_was_cut_short_is_not_counted_for_the_rest() -> None:
    """A prompt counts from its start, and less again if it was not computed."""
    bench = Bench(max_batch=2, prefill_chunk_tokens=8)
    bench.add(of("a", 0, prompt=100), of("b", 1, new=400))
    bench.step()
    assert 100 == served(bench, "a")
    bench.scheduler.cancel(0, bench.now)
    assert 8 == served(bench, "a")
    bench.scheduler.cancel(1, bench.now)
    assert {} == bench.schedule.queue._accounts


MAX_WAITING = 6

ASKED = st.tuples(
    st.integers(0, 3), st.sampled_from(Priority), st.integers(1, 60), st.integers(1, 20)
)


@given(
    others=st.lists(ASKED, min_size=1, max_size=12),
    before=st.integers(0, 40),
    prompt=st.integers(1, 90),
    preempt_after_s=st.sampled_from([1.0, 1e9]),
    overcommit=st.sampled_from([1.0, 3.0]),
)
@settings(max_examples=3 * settings.default.max_examples // 2)
def test_nobody_waits_for_ever(
    others: list[tuple[int, Priority, int, int]],
    before: int,
    prompt: int,
    preempt_after_s: float,
    overcommit: float,
) -> None:
    """Once overdue, a job is passed by at most one of each account that waits already.

    The others fill the waiting list again at every step, with whatever they like.
    """
    bench = Bench(
        8, step_s=1.0, max_batch=3, max_waiting=MAX_WAITING, overdue_s=10.0, ageing_s=5.0,
        preempt_after_s=preempt_after_s, kv_overcommit=overcommit,
    )  # fmt: skip
    victim, ids, endless = 0, count(1), cycle(others)

    def flood() -> None:
        while len(bench.schedule.queue) < MAX_WAITING:  # as admission sees to
            account, priority, length, new = next(endless)
            bench.add(of(f"o{account}", next(ids), prompt=length, new=new, priority=priority))

    for _ in range(before):
        flood()
        bench.step()
    while len(bench.schedule.queue) >= MAX_WAITING:  # a place is all that it has to find for itself
        bench.step()
    bench.add(of("victim", victim, prompt=prompt, new=9, priority=Priority.LOW))
    due_s = bench.now + 10.0
    waiting: set[str] = set()
    passed: list[str] = []
    while victim not in bench.starts:
        assert bench.now < due_s + 8 * 80, "what runs ends, so it starts"
        flood()
        if bench.now == due_s:
            waiting = {seq.spec.account for seq in bench.schedule.queue} - {"victim"}
        first = len(bench.starts)
        bench.step()
        started = bench.starts[first:]
        if bench.now > due_s:
            earlier = started[: started.index(victim)] if victim in started else started
            passed += [bench.specs[seq_id].account for seq_id in earlier]
    assert len(passed) == len(set(passed))
    assert set(passed) <= waiting


@given(
    jobs=st.lists(
        st.tuples(st.sampled_from(Priority), st.floats(0.0, 40.0), st.integers(1, 6)),
        min_size=2,
        max_size=20,
    )
)
def test_within_an_account_late_jobs_do_not_pass(
    jobs: list[tuple[Priority, float, int]],
) -> None:
    """A job is passed only by those that were submitted at most two ageing periods after it."""
    bench = Bench(max_batch=1, ageing_s=5.0, max_preemptions=0)
    submitted = sorted(jobs, key=lambda job: job[1])
    for seq_id, (priority, at, new) in enumerate(submitted):
        bench.scheduler.add(spec(seq_id, priority=priority, new=new), at)
        bench.specs[seq_id] = spec(seq_id, priority=priority, new=new)
        bench.tokens[seq_id] = []
    bench.run()
    for place, passed in enumerate(bench.starts):
        for earlier in bench.starts[:place]:
            assert submitted[earlier][1] <= submitted[passed][1] + 2 * 5.0


@given(
    sizes=st.tuples(*[st.tuples(st.integers(1, 50), st.integers(1, 30))] * 3),
    weights=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    max_batch=st.integers(1, 4),
)
@settings(max_examples=settings.default.max_examples // 2)
def test_accounts_that_always_ask_are_served_the_same(
    sizes: tuple[tuple[int, int], ...], weights: tuple[int, int], max_batch: int
) -> None:
    """However long their jobs are, the counters stay within what a full batch can be served."""
    bench = Bench(200, max_batch=max_batch, preempt_after_s=1e9, prefix_cache=False)
    ids = count()
    token_weights = TokenWeights(weights[0], 0, weights[1])
    worst = max(prompt * weights[0] + new * weights[1] for prompt, new in sizes)
    for _ in range(80):
        waiting = Counter(seq.spec.account for seq in bench.schedule.queue)
        for i, (prompt, new) in enumerate(sizes):
            for _ in range(max_batch + 1 - waiting[f"a{i}"]):
                bench.add(of(f"a{i}", next(ids), prompt=prompt, new=new, weights=token_weights))
        bench.step()
        counters = [served(bench, f"a{i}") for i in range(3)]
        assert max(counters) - min(counters) <= (max_batch + 1) * worst
