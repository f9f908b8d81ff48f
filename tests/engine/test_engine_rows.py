"""A chunk with several draws yields the rows that feeding its tokens one by one yields."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import pytest
import torch
from native_kernels import require_native
from tiny_models import Checkpoint, prompt_of

from sage_fed.core import Sampling, Tier
from sage_fed.engine import Engine, EngineOptions, load_engine
from sage_fed.engine.cuda_graphs import EagerCapture
from sage_fed.steps import BLOCK_SIZE, PENDING, Chunk, Draw, SampledToken, Step

Checkpoints = Callable[[str], Checkpoint]
T = Tier.TACTICAL
ALL = 1 << 20
MODES = ("native", "torch", "graphs")
SAMPLINGS = (
    Sampling(top_logprobs=ALL),
    Sampling(temperature=0.8, seed=7, top_logprobs=ALL),
    Sampling(temperature=1.1, top_k=20, top_p=0.9, seed=3, top_logprobs=ALL),
    Sampling(temperature=0.7, repetition_penalty=1.4, seed=11, top_logprobs=ALL),
    Sampling(repetition_penalty=1.2),
)


@pytest.fixture(scope="module", params=MODES)
def mode(request: pytest.FixtureRequest) -> str:
    mode: str = request.param
    if mode == "native":
        require_native()
    return mode


@pytest.fixture(scope="module")
def engine(checkpoint: Checkpoints, mode: str) -> Engine:
    kernels = "native" if mode == "native" else "torch"
    options = EngineOptions(
        str(checkpoint("qwen2-tied").path), kv_cache_bytes=1 << 22, kernels=kernels, max_batch=4
    )
    return load_engine(options, lambda _: None, EagerCapture() if mode == "graphs" else None)


def draws_of(tokens: Sequence[int], count: int, sampling: Sampling, first: int) -> tuple[Draw, ...]:
    """Draws behind the last `count` of `tokens`, each with what its penalty has seen."""
    ends = range(len(tokens) - count + 1, len(tokens) + 1)
    seen = [tuple(tokens[:end]) if sampling.repetition_penalty != 1 else () for end in ends]
    return tuple(Draw(sampling, first + row, ids) for row, ids in enumerate(seen))


def assert_equal_rows(expected: Sequence[SampledToken], found: Sequence[SampledToken]) -> None:
    """The same tokens, from log-probabilities that differ in fp32's last bits at most."""
    for one, other in zip(expected, found, strict=True):
        assert (one.seq_id, one.token_id) == (other.seq_id, other.token_id)
        assert (one.logprob is None) == (other.logprob is None)
        if one.logprob is not None and other.logprob is not None:
            a, b = (torch.tensor([v for _, v in sorted(x.logprob.top)]) for x in (one, other))  # type: ignore[union-attr] # just seen
            torch.testing.assert_close(a, b, atol=1e-4, rtol=0)


@pytest.mark.parametrize("seed", range(12))
def test_rows_of_one_chunk_are_those_of_single_steps(engine: Engine, seed: int) -> None:
    """In mixed batches: others decode, prefill without draws, or verify tokens of their own."""
    rng = random.Random(seed)
    whole: list[Chunk] = []
    expected: list[SampledToken] = []
    free = list(range(engine.num_blocks))
    rng.shuffle(free)
    for seq_id in range(rng.randint(1, 5)):
        tokens = prompt_of(rng.randint(2, 100), seed=100 * seed + seq_id)
        fed = rng.randint(1, min(40, len(tokens)))
        count = rng.choice([0, 1, fed, rng.randint(1, fed)])
        start, sampling = len(tokens) - fed, rng.choice(SAMPLINGS)
        needed = -(-len(tokens) // BLOCK_SIZE)
        alone, together = ([free.pop() for _ in range(needed)] for _ in range(2))
        draws = draws_of(tokens, count, sampling, first=5)
        if len(tokens) > count:
            before = Chunk(seq_id, 0, tokens[: len(tokens) - count], tuple(alone))
            engine.run(Step(T, (before,)))
        for row, draw in enumerate(draws):
            at = len(tokens) - count + row
            step = Step(T, (Chunk(seq_id, at, tokens[at : at + 1], tuple(alone), (draw,)),))
            expected += engine.run(step)
        if start:
            # Full blocks before a chunk may be another sequence's: those of the prefix cache.
            shared = start // BLOCK_SIZE if start <= len(tokens) - count else 0
            together[:shared] = alone[:shared]
            if rest := tokens[shared * BLOCK_SIZE : start]:
                engine.run(Step(T, (Chunk(seq_id, shared * BLOCK_SIZE, rest, tuple(together)),)))
        whole.append(Chunk(seq_id, start, tokens[start:], tuple(together), draws))
    order = list(range(len(whole)))
    rng.shuffle(order)
    found = engine.run(Step(T, tuple(whole[i] for i in order)))
    by_id = {c.seq_id: [t for t in expected if t.seq_id == c.seq_id] for c in whole}
    assert_equal_rows([token for i in order for token in by_id[whole[i].seq_id]], found)


@pytest.mark.parametrize("kernels", ["native", "torch"])
def test_a_paused_step_yields_the_same_rows(checkpoint: Checkpoints, kernels: str) -> None:
    if kernels == "native":
        require_native()
    options = EngineOptions(
        str(checkpoint("qwen2-tied").path), kv_cache_bytes=1 << 20, kernels=kernels
    )
    engine = load_engine(options, lambda _: None)
    tokens = prompt_of(50)
    draws = draws_of(tokens, 9, SAMPLINGS[1], first=0)
    step = Step(T, (Chunk(1, 0, tokens, (4, 1, 2, 9), draws), Chunk(2, 0, tokens[:5], (7,))))
    expected = engine.run(step)
    in_flight = engine.launch(step, 0.0)
    while in_flight.paused:
        in_flight.resume(0.0)
    assert expected == in_flight.wait()
    assert 9 == len(expected)


def test_pending_is_the_last_of_several_draws(engine: Engine) -> None:
    """What follows a verification on the device is what its last row draws."""
    tokens, blocks = prompt_of(20), (3, 5)
    draws = draws_of(tokens, 4, Sampling(), first=0)
    first = engine.launch(Step(T, (Chunk(1, 0, tokens, blocks, draws),)))
    if not engine.pipelined:
        first.wait()
    after = Draw(Sampling(), 4)
    second = engine.launch(Step(T, (Chunk(1, 20, (PENDING,), blocks, (after,)),)))
    if engine.pipelined:
        first.wait()
    (token,) = second.wait()
    last = first_of(engine, tokens)
    (expected,) = engine.run(Step(T, (Chunk(1, 20, (last,), blocks, (after,)),)))
    assert expected == token


def first_of(engine: Engine, prompt: tuple[int, ...]) -> int:
    """The greedy token behind a prompt."""
    (token,) = engine.run(Step(T, (Chunk(8, 0, prompt, (10, 11), (Draw(Sampling(), 0),)),)))
    return token.token_id


def test_more_draws_than_tokens_are_a_bug(engine: Engine) -> None:
    chunk = Chunk(1, 0, (5,), (0,), (Draw(Sampling(), 0), Draw(Sampling(), 1)))
    with pytest.raises(AssertionError, match="more draws than tokens"):
        engine.run(Step(T, (chunk,)))
