"""The prefix cache: what is found again, by whom, what is kept, and what it never changes."""

from __future__ import annotations

import itertools
from dataclasses import replace

import hypothesis.strategies as st
import pytest
from fake_engine import FakeEngine, spec
from hypothesis import given
from scheduler_bench import Bench, T

from sage_fed.core import Sampling
from sage_fed.device import BlockPool, EndReason, SequenceSpec, TierLimits
from sage_fed.device.kv_blocks import BlockKeys
from sage_fed.steps import BLOCK_SIZE, NO_TOKEN


def same(seq_id: int, prompt: int = 40, **fields: object) -> SequenceSpec:
    """A sequence that asks what every other one asks."""
    return spec(seq_id, prompt=prompt, system=prompt, **fields)  # type: ignore[arg-type]


def test_a_prompt_is_found_again() -> None:
    """The second time only what is behind the last full block is fed to the model."""
    bench = Bench()
    bench.run(same(0, prompt=40))
    bench.add(same(1, prompt=40))
    (chunk,) = bench.step().chunks
    assert (32, 8) == (chunk.start, len(chunk.token_ids))
    bench.run()
    assert [(40, 0), (40, 32)] == [
        (bench.ended[i].prompt_tokens, bench.ended[i].cached_tokens) for i in range(2)
    ]
    assert (80, 32) == (bench.queried, bench.hit)


@pytest.mark.parametrize(("prompt", "found"), [(15, 0), (16, 0), (17, 16), (32, 16), (33, 32)])
def test_the_last_token_is_always_computed(prompt: int, found: int) -> None:
    """Its logits are wanted: a prompt that ends with a block has that block computed again."""
    bench = Bench()
    bench.run(same(0, prompt=prompt))
    bench.run(same(1, prompt=prompt))
    assert found == bench.ended[1].cached_tokens


def test_nothing_of_a_sequence_that_broke_down_is_found_again() -> None:
    """Keys and values that led to no number are not to be trusted, whichever block they are in."""
    bench = Bench(prefill_chunk_tokens=16)
    bench.add(same(0, prompt=40))
    for _ in range(2):
        bench.step()
    keys, prompt = BlockKeys(""), same(0, prompt=40).prompt
    assert 2 == len(bench.schedule.pool.find(keys.of(i, prompt) for i in range(2)))
    step = bench.launch()
    broken = tuple(replace(d, token_id=NO_TOKEN) for d in bench.engine.run(step))
    (ended,) = bench.scheduler.complete(step, broken, now=bench.now, elapsed_s=0.01).ended
    assert EndReason.NOT_FINITE is ended.reason
    assert (0, 0) == bench.kv()
    bench.run(same(1, prompt=40))
    assert (0, 0) == (bench.ended[1].cached_tokens, bench.hit)


def test_an_answer_is_found_by_the_next_turn() -> None:
    """A conversation that goes on begins with its last prompt and answer, which are kept."""
    bench = Bench()
    first = spec(0, prompt=20, new=30)
    bench.run(first)
    longer = (*first.prompt, *bench.tokens[0], 1, 2, 3)
    bench.run(SequenceSpec(1, T, longer, 4, ignore_eos=True))
    # 20 + 30 tokens, the last of which was drawn but never fed: 49 are stored, 48 in full blocks.
    assert 48 == bench.ended[1].cached_tokens


def test_a_prompt_is_shared_while_it_still_runs() -> None:
    """Blocks are found as soon as they are full, and are owned by both."""
    bench = Bench()
    bench.add(same(0, prompt=40, new=20))
    bench.step()
    bench.add(same(1, prompt=40, new=20, sampling=Sampling(seed=1)))
    bench.step()
    # 4 blocks each, the two full ones of the prompt once.
    assert (6 * BLOCK_SIZE, 0) == bench.kv()
    bench.run()
    assert 0 == bench.kv()[0]


def test_an_account_does_not_find_anothers_prompt() -> None:
    """Neither its tokens nor, by the time to the first token, that somebody asked them."""
    bench = Bench()
    bench.run(same(0, account="a"))
    bench.run(same(1, account="b"))
    bench.run(same(2, account="a"))
    assert [0, 0, 32] == [bench.ended[i].cached_tokens for i in range(3)]


def test_keys_tell_accounts_tokens_and_places_apart() -> None:
    """Only the same account, tokens and beginning have the same key."""
    ids = list(range(48))
    other = [99, *ids[1:]]
    plain = [BlockKeys("a").of(i, ids) for i in range(3)]
    assert plain == [BlockKeys("a").of(i, ids) for i in range(3)]
    strangers = {BlockKeys("b").of(i, ids) for i in range(3)}
    strangers |= {BlockKeys("a").of(i, other) for i in range(3)}
    strangers |= {BlockKeys("a").of(i, [*ids[16:32], *ids[:16], *ids[32:]]) for i in range(3)}
    assert 9 == len(strangers)
    assert not strangers & set(plain)


@pytest.mark.parametrize("off", ["tier", "sequence"])
def test_it_can_be_switched_off(off: str) -> None:
    """Nothing is looked up and nothing is kept."""
    bench = Bench(prefix_cache=off != "tier")
    for i in range(2):
        bench.run(same(i, prefix_cache=off != "sequence"))
        assert (0, 0) == bench.kv()
    assert (0, 0, 0) == (bench.ended[1].cached_tokens, bench.queried, bench.hit)


def test_kept_blocks_make_room() -> None:
    """A full cache stops nobody, and what was used longest ago goes first, its end before it."""
    bench = Bench(num_blocks=8)
    for i, account in enumerate("abc"):
        bench.run(same(i, prompt=33, new=1, account=account))
    # Two full blocks of each account are kept; using a's makes b's the oldest.
    assert (0, 6 * BLOCK_SIZE) == bench.kv()
    bench.run(same(3, prompt=33, new=1, account="a"))
    bench.run(spec(4, prompt=40, new=8, account="d"))
    for i, account in ((5, "c"), (6, "a")):
        bench.run(same(i, prompt=33, new=1, account=account))
    assert [32, 32, 32] == [bench.ended[i].cached_tokens for i in (3, 5, 6)]
    bench.run(same(7, prompt=33, new=1, account="b"))
    assert 16 == bench.ended[7].cached_tokens


def test_admission_reserves_only_what_is_not_shared() -> None:
    """Two sequences of four blocks run together in six, where two of them are the same."""
    bench = Bench(num_blocks=6)
    bench.add(same(0, prompt=33, new=30))
    bench.step()
    bench.add(same(1, prompt=33, new=30))
    assert 2 == len(bench.step().chunks)
    bench.run()


def test_a_cut_prompt_leaves_what_it_had_computed() -> None:
    """A cancel in the middle of a prefill keeps the full blocks, and counts what was fed."""
    bench = Bench(prefill_chunk_tokens=40)
    bench.add(same(0, prompt=100))
    bench.step()
    (ended,) = bench.scheduler.cancel(0, 1.0)
    assert (40, 0) == (ended.prompt_tokens, ended.cached_tokens)
    bench.run(same(1, prompt=100))
    assert 32 == bench.ended[1].cached_tokens


def test_a_step_that_did_not_fit_publishes_nothing() -> None:
    """Its blocks may hold anything."""
    bench = Bench()
    bench.add(same(0))
    for _ in range(2):
        outcome = bench.land(bench.launch(), fits=False)
    assert [EndReason.OUT_OF_MEMORY] == [e.reason for e in outcome.ended]
    assert (0, 0) == bench.kv()


def test_a_closed_tier_forgets() -> None:
    """A new engine's memory knows nothing of the last one's."""
    bench = Bench()
    bench.run(same(0))
    bench.scheduler.close_tier(T, EndReason.FAILED, 0.0)
    bench.scheduler.open_tier(T, TierLimits(64, 512), frozenset())
    bench.engine = FakeEngine()
    bench.run(same(1))
    assert 0 == bench.ended[1].cached_tokens


def test_a_pool_counts_owners() -> None:
    """A shared block is available after its last owner, and only a published one can be shared."""
    pool = BlockPool(2)
    (block,) = pool.take(1)
    with pytest.raises(AssertionError):
        pool.share((block,))
    pool.publish(block, b"k")
    pool.share(pool.find([b"k"]))
    assert (0, 1) == (pool.num_freed_by((block,)), pool.num_available)
    pool.give_back((block,))
    assert (1, 0) == (pool.num_freed_by((block,)), pool.num_kept)
    pool.give_back((block,))
    assert (2, 1, 0) == (pool.num_available, pool.num_kept, pool.num_owned)
    assert pool.fits(2)
    assert not pool.fits(2, pool.find([b"k"]))
    pool.take(2)
    assert () == pool.find([b"k"])


@given(
    prompts=st.lists(
        st.lists(st.integers(0, 3), min_size=1, max_size=70).map(tuple), min_size=1, max_size=12
    ),
    num_blocks=st.integers(6, 20),
    chunk=st.integers(1, 80),
)
def test_a_hit_is_the_longest_stored_beginning(
    prompts: list[tuple[int, ...]], num_blocks: int, chunk: int
) -> None:
    """One after the other with room for all, each prompt's hit is what the earlier ones share.

    In little room the hit may be shorter, never longer, and the tokens are the same.
    """
    for blocks in (num_blocks, 1000):
        bench = Bench(num_blocks=blocks, prefill_chunk_tokens=chunk)
        for i, prompt in enumerate(prompts):
            bench.run(SequenceSpec(i, T, prompt, 5, ignore_eos=True))
            stored = [(*p, *bench.tokens[j][:-1]) for j, p in enumerate(prompts[:i])]
            common = max((_common(prompt[:-1], s) for s in stored), default=0)
            expected = common // BLOCK_SIZE * BLOCK_SIZE
            if blocks == 1000:
                assert expected == bench.ended[i].cached_tokens
            else:
                assert expected >= bench.ended[i].cached_tokens
            assert 0 == bench.ended[i].cached_tokens % BLOCK_SIZE


def _common(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    pairs = zip(a, b, strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
