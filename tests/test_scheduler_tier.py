"""One tier's order of starting, batches and endings."""

from __future__ import annotations

import pytest
from fake_engine import FakeEngine, reference, spec

from sage_fed.core import Priority, Sampling, Tier
from sage_fed.device import BlockPool, Ended, EndReason, Scheduler, TierLimits, blocks_for
from sage_fed.errors import InvalidField, TierUnavailable
from sage_fed.steps import Step

T = Tier.TACTICAL


class Bench:
    """A scheduler with the tactical tier open, stepped by hand."""

    def __init__(self, limits: TierLimits, eos: frozenset[int] = frozenset()) -> None:
        self.scheduler = Scheduler()
        self.engine = FakeEngine(num_blocks=limits.num_blocks)
        self.scheduler.open_tier(T, limits, eos)
        self.now = 0.0
        self.started: list[int] = []
        self.ended: dict[int, Ended] = {}
        self.tokens: dict[int, list[int]] = {}

    def add(self, seq_id: int, *, at: float | None = None, **fields: object) -> None:
        """Queue a sequence."""
        asked = spec(seq_id, **fields)  # type: ignore[arg-type]
        self.scheduler.add(asked, self.now if at is None else at)
        self.tokens[seq_id] = []

    def launch(self) -> Step:
        """Begin the next step."""
        step = self.scheduler.next_step(self.now)
        assert step is not None
        self.started += [c.seq_id for c in step.chunks if c.start == 0]
        return step

    def step(self) -> Step:
        """Run the next step."""
        step = self.launch()
        drawn = self.engine.run(step)
        self.now += 0.01
        outcome = self.scheduler.complete(step, drawn, now=self.now, elapsed_s=0.01)
        for d in outcome.tokens:
            self.tokens[d.seq_id].append(d.token_id)
        self.ended |= {e.seq_id: e for e in outcome.ended}
        return step

    def drain(self) -> None:
        """Run until nothing is left."""
        while self.scheduler.has_work:
            self.step()


def limits(**fields: float) -> TierLimits:
    values = {"num_blocks": 64, "max_context_tokens": 512, **fields}
    return TierLimits(**values)  # type: ignore[arg-type]


def test_a_pool_hands_out_each_block_once() -> None:
    """What is taken is not free, and comes back exactly once."""
    pool = BlockPool(4)
    first, second = pool.take(3), pool.take(1)
    assert {0, 1, 2, 3} == {*first, *second}
    assert 0 == pool.num_available
    pool.give_back(first)
    assert (3, 1) == (pool.num_available, pool.num_owned)
    with pytest.raises(AssertionError):
        pool.give_back(first)
    with pytest.raises(AssertionError):
        pool.take(4)


@pytest.mark.parametrize(("tokens", "blocks"), [(1, 1), (16, 1), (17, 2), (32, 2)])
def test_a_sequence_owns_whole_blocks(tokens: int, blocks: int) -> None:
    """A block that is begun is owned."""
    assert blocks == blocks_for(tokens)


def test_higher_priority_starts_first_and_equals_in_order() -> None:
    """Priority orders those that wait; within it, first come first served."""
    bench = Bench(limits(max_batch=1))
    priorities = [Priority.LOW, Priority.NORMAL, Priority.HIGH, Priority.NORMAL, Priority.HIGH]
    for seq_id, priority in enumerate(priorities):
        bench.add(seq_id, priority=priority)
    bench.drain()
    assert [2, 4, 1, 3, 0] == bench.started


def test_low_priority_ages() -> None:
    """Two ageing periods make up for two levels: a low sequence is not passed for ever."""
    bench = Bench(limits(max_batch=1, ageing_s=30.0))
    bench.add(0, at=0.0, priority=Priority.LOW)
    bench.add(1, at=59.0, priority=Priority.HIGH)
    bench.add(2, at=61.0, priority=Priority.HIGH)
    bench.drain()
    assert [1, 0, 2] == bench.started


def test_small_sequences_do_not_pass_a_big_one() -> None:
    """The first in rank waits for its blocks and nobody behind it takes them."""
    bench = Bench(limits(num_blocks=4, max_context_tokens=64))
    bench.add(0, prompt=20, new=12)
    bench.step()
    bench.add(1, prompt=40, new=10)
    bench.add(2, prompt=5, new=4)
    bench.drain()
    assert [0, 1, 2] == bench.started


def test_prompts_and_decodes_share_a_step() -> None:
    """A step takes every decoding sequence's token and several prompts, within the budget."""
    bench = Bench(limits(prefill_chunk_tokens=12))
    bench.add(0, prompt=5)
    assert [5] == [len(c.token_ids) for c in bench.step().chunks]
    bench.add(1, prompt=4)
    bench.add(2, prompt=10)
    step = bench.step()
    assert [(0, 1), (1, 4), (2, 8)] == [(c.seq_id, len(c.token_ids)) for c in step.chunks]
    assert [True, True, False] == [bool(c.draws) for c in step.chunks]
    step = bench.step()
    assert [(0, 1), (1, 1), (2, 2)] == [(c.seq_id, len(c.token_ids)) for c in step.chunks]


def test_a_sequence_starts_only_with_its_worst_case_free() -> None:
    """The blocks of prompt and output are owned from the first step on."""
    bench = Bench(limits(num_blocks=4, max_context_tokens=64))
    bench.add(0, prompt=10, new=30)
    bench.add(1, prompt=10, new=20)
    bench.step()
    load = bench.scheduler.load(T)
    assert load is not None
    assert (1, 1, 48, 64) == (
        load.running,
        load.waiting,
        load.kv_tokens_used,
        load.kv_tokens_total,
    )
    bench.drain()
    assert reference(spec(1, prompt=10, new=20)) == bench.tokens[1]


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"prompt": 0}, "prompt"),
        ({"prompt": 96}, "prompt"),
        ({"prompt": 90, "new": 7}, "sampling.max_new_tokens"),
        ({"new": 0}, "sampling.max_new_tokens"),
    ],
)
def test_what_can_never_fit_is_refused(fields: dict[str, int], field: str) -> None:
    """The refusal names the field to make smaller."""
    bench = Bench(limits(num_blocks=6, max_context_tokens=512))
    with pytest.raises(InvalidField) as refused:
        bench.add(0, **fields)
    assert field == refused.value.field


def test_what_just_fits_runs() -> None:
    """Prompt and output may fill the context to its last token."""
    bench = Bench(limits(num_blocks=6, max_context_tokens=96))
    bench.add(0, prompt=90, new=6)
    bench.drain()
    assert EndReason.LENGTH is bench.ended[0].reason


def test_a_full_queue_says_when_to_come_back() -> None:
    """At the worst case of the nearest ending; admission refuses by that."""
    bench = Bench(limits(max_batch=1, max_waiting=2))
    bench.add(0, new=100)
    bench.step()
    bench.step()
    bench.add(1)
    bench.add(2)
    load = bench.scheduler.load(T)
    assert load is not None
    assert (2, 2) == (load.waiting, load.waiting_limit)
    assert pytest.approx(98 * 0.01) == load.retry_after_s


def test_a_closed_tier_admits_nothing() -> None:
    """Closing ends every sequence once and refuses more."""
    bench = Bench(limits())
    bench.add(0)
    bench.step()
    bench.add(1)
    ended = bench.scheduler.close_tier(T, EndReason.FAILED, 9.0)
    assert {0: EndReason.FAILED, 1: EndReason.FAILED} == {e.seq_id: e.reason for e in ended}
    assert not bench.scheduler.has_work
    with pytest.raises(TierUnavailable):
        bench.add(2)
    assert () == bench.scheduler.close_tier(T, EndReason.FAILED, 9.0)


def test_an_end_of_text_is_neither_delivered_nor_counted() -> None:
    """The sequence ends with EOS and the tokens before it; ignored, it is a token like others."""
    plain = reference(spec(3, new=4))
    for ignore, reason, count in [(False, EndReason.EOS, 2), (True, EndReason.LENGTH, 4)]:
        bench = Bench(limits(), eos=frozenset({plain[2]}))
        bench.add(3, new=4, ignore_eos=ignore)
        bench.drain()
        assert plain[:count] == bench.tokens[3]
        assert (reason, count) == (bench.ended[3].reason, bench.ended[3].output_tokens)


def test_a_stop_token_ends_as_an_end_of_text_does() -> None:
    """Neither delivered nor counted, also where the model's own ends are ignored; it is named."""
    plain = reference(spec(3, new=4))
    stops = frozenset({plain[2], 10**6})
    for eos, reason, token_id in [
        (frozenset[int](), EndReason.STOP_TOKEN, plain[2]),
        (stops, EndReason.EOS, None),
    ]:
        bench = Bench(limits(), eos=eos)
        bench.add(3, new=4, ignore_eos=False, stop_token_ids=stops)
        bench.add(4, new=4)
        bench.drain()
        assert plain[:2] == bench.tokens[3]
        ended = bench.ended[3]
        assert (reason, token_id, 2) == (ended.reason, ended.stop_token_id, ended.output_tokens)
        assert 4 == bench.ended[4].output_tokens
    bench = Bench(limits(), eos=stops)
    bench.add(3, new=4, ignore_eos=True, stop_token_ids=stops)
    bench.drain()
    assert (EndReason.STOP_TOKEN, 2) == (bench.ended[3].reason, bench.ended[3].output_tokens)


def test_an_ending_tells_when() -> None:
    """Instants follow the sequence's life, and device time adds up to the steps' time."""
    bench = Bench(limits(max_batch=1))
    bench.now = 5.0
    bench.add(0, at=4.0, new=3)
    bench.drain()
    ended = bench.ended[0]
    assert (4.0, 5.0, 3, 5) == (
        ended.submitted_s,
        ended.started_s,
        ended.output_tokens,
        ended.prompt_tokens,
    )
    assert [5.01, 5.03, 5.03] == [
        pytest.approx(t) for t in (ended.first_token_s, ended.last_token_s, ended.ended_s)
    ]
    assert pytest.approx(0.03) == ended.device_s


def test_device_time_is_shared_by_tokens() -> None:
    """In one step of 5 and 15 tokens the second pays three times the first's part."""
    bench = Bench(limits())
    bench.add(0, prompt=5, new=1)
    bench.add(1, prompt=15, new=1)
    bench.step()
    assert pytest.approx(0.0025) == bench.ended[0].device_s
    assert pytest.approx(0.0075) == bench.ended[1].device_s


def test_a_waiting_sequence_is_cancelled_at_once() -> None:
    """Nothing was done for it, so nothing is waited for."""
    bench = Bench(limits(max_batch=1))
    bench.add(0)
    bench.add(1)
    bench.launch()
    (ended,) = bench.scheduler.cancel(1, 3.0)
    assert (EndReason.CANCELLED, None, 0) == (ended.reason, ended.started_s, ended.output_tokens)


def test_a_sequence_on_the_device_is_cancelled_at_the_step_boundary() -> None:
    """Its blocks stay owned while the step may write to them; its late token is dropped."""
    bench = Bench(limits())
    bench.add(0)
    bench.step()
    step = bench.launch()
    assert () == bench.scheduler.cancel(0, bench.now)
    assert () == bench.scheduler.cancel(0, bench.now)
    drawn = bench.engine.run(step)
    outcome = bench.scheduler.complete(step, drawn, now=1.0, elapsed_s=0.01)
    assert () == outcome.tokens
    assert [(0, EndReason.CANCELLED, 1)] == [
        (e.seq_id, e.reason, e.output_tokens) for e in outcome.ended
    ]
    load = bench.scheduler.load(T)
    assert load is not None
    assert 0 == load.kv_tokens_used


def test_out_of_memory_ends_the_newest_prefill_and_spares_the_rest() -> None:
    """Those that decode try again without it and deliver what they would have."""
    bench = Bench(limits())
    bench.add(0)
    bench.step()
    bench.add(1)
    bench.add(2)
    step = bench.launch()
    bench.engine.run(step)
    outcome = bench.scheduler.out_of_memory(step, now=1.0, elapsed_s=0.01)
    assert [(2, EndReason.OUT_OF_MEMORY)] == [(e.seq_id, e.reason) for e in outcome.ended]
    bench.drain()
    assert reference(spec(0)) == bench.tokens[0]
    assert reference(spec(1)) == bench.tokens[1]


def test_a_lone_sequence_gets_one_more_try_at_memory() -> None:
    """It ends at the second failure in a row, not at two with a success between."""
    bench = Bench(limits())
    bench.add(0, new=9)
    for _ in range(2):
        step = bench.launch()
        assert () == bench.scheduler.out_of_memory(step, now=1.0, elapsed_s=0.0).ended
        bench.step()
    bench.scheduler.out_of_memory(bench.launch(), now=1.0, elapsed_s=0.0)
    outcome = bench.scheduler.out_of_memory(bench.launch(), now=1.0, elapsed_s=0.0)
    assert [EndReason.OUT_OF_MEMORY] == [e.reason for e in outcome.ended]


def test_the_penalty_sees_each_token_once() -> None:
    """A draw's `seen` are the prompt's and the output's distinct ids, and only where asked."""
    bench = Bench(limits())
    penal = Sampling(repetition_penalty=1.2)
    bench.add(0, prompt=60, new=8, sampling=penal)
    bench.add(1, prompt=5, new=8)
    for _ in range(4):
        bench.step()
    penalised, plain = (c.draws[0] for c in bench.launch().chunks)
    assert penalised is not None
    assert plain is not None
    expected = {*spec(0, prompt=60).prompt, *bench.tokens[0]}
    assert expected == set(penalised.seen)
    assert len(expected) == len(penalised.seen)
    assert (4, ()) == (penalised.index, plain.seen)


def test_an_engine_that_forgets_a_draw_is_our_bug() -> None:
    """A missing answer is noticed before any sequence has moved."""
    bench = Bench(limits())
    bench.add(0)
    with pytest.raises(AssertionError):
        bench.scheduler.complete(bench.launch(), (), now=0.0, elapsed_s=0.0)
