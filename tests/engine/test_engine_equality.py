"""The engine against `transformers`: the same tokens and the same logits, in fp32."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import pytest
import torch
from engine_driver import Driver, generate
from native_kernels import require_native
from tiny_models import CONFIGS, Checkpoint, prompt_of
from transformers import AutoModelForCausalLM

from sage_fed.core import Sampling, Tier
from sage_fed.engine import Engine, EngineOptions, load_engine
from sage_fed.engine.decoder import Decoder
from sage_fed.engine.native import Library
from sage_fed.errors import DeviceOutOfMemory
from sage_fed.steps import BLOCK_SIZE, PENDING, Chunk, Draw, Step

Checkpoints = Callable[[str], Checkpoint]
Engines = Callable[[str], Engine]

BUNDLED = Path(__file__).parents[2] / "sage_fed" / "models"
LENGTHS = (1, 2, BLOCK_SIZE - 1, BLOCK_SIZE, BLOCK_SIZE + 1, 77)
EVERY_LOGPROB = Sampling(top_logprobs=131)


def logprobs_by_id(engine: Engine, prompt: tuple[int, ...], pieces: tuple[int, ...]) -> list[float]:
    driver = Driver(engine)
    driver.add(0, prompt, 1, EVERY_LOGPROB, pieces)
    driver.finish()
    logprob = driver.finished[0].logprobs[0]
    assert logprob is not None
    return [value for _, value in sorted(logprob.top)]


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("length", LENGTHS)
def test_greedy_tokens_are_those_of_transformers(
    checkpoint: Checkpoints, engine_of: Engines, name: str, length: int
) -> None:
    """Whatever the architecture and the prompt's length, greedy tokens are equal, one by one."""
    prompt = prompt_of(length)
    expected = checkpoint(name).greedy(prompt, 30)
    actual = generate(engine_of(name), prompt, 30)
    assert expected == actual
    assert len(set(expected)) > 3, "the model only repeats itself, so the comparison says little"


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_are_close_to_those_of_transformers(
    checkpoint: Checkpoints, engine_of: Engines, name: str
) -> None:
    """The whole distribution agrees, not only its best token, from prompt and from cache."""
    prompt = prompt_of(50)
    expected = checkpoint(name).logits(prompt)[-1].log_softmax(-1)
    for pieces in ((50,), (20, 29, 1), (33, 17)):
        actual = torch.tensor(logprobs_by_id(engine_of(name), prompt, pieces))
        torch.testing.assert_close(actual, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["qwen2-tied", "qwen3", "llama3"])
def test_any_split_of_the_prompt_gives_the_same_tokens(
    checkpoint: Checkpoints, engine_of: Engines, name: str
) -> None:
    """Chunked prefill is invisible: also pieces of one token and across block borders."""
    prompt = prompt_of(61)
    expected = checkpoint(name).greedy(prompt, 12)
    rng = random.Random(5)
    splits = [(1,) * 61, (16, 16, 16, 13), (15, 2, 44), (60, 1), (1, 60)]
    splits += [tuple(rng.randint(1, 30) for _ in range(61)) for _ in range(5)]
    for pieces in splits:
        assert expected == generate(engine_of(name), prompt, 12, pieces=pieces), pieces


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", ["qwen2-tied", "llama"])
def test_joining_and_leaving_at_random_changes_no_token(
    checkpoint: Checkpoints, engine_of: Engines, name: str, seed: int
) -> None:
    """Up to 8 sequences in chunks, in any mixture, answer as each of them alone would."""
    rng = random.Random(seed)
    driver = Driver(engine_of(name))
    expected: dict[int, tuple[int, ...]] = {}
    waiting = list(range(14))
    while waiting or driver.running:
        while waiting and len(driver.running) < 8 and rng.random() < 0.5:
            seq_id = waiting.pop()
            prompt, num_new = prompt_of(rng.randint(1, 70), seq_id), rng.randint(1, 25)
            pieces = [rng.randint(1, 40) for _ in range(70)]
            driver.add(seq_id, prompt, num_new, pieces=pieces)
            expected[seq_id] = checkpoint(name).greedy(prompt, num_new)
        moving = [i for i in driver.running if rng.random() < 0.8]
        rng.shuffle(moving)
        if moving:
            driver.step(*moving)
    actual = {i: tuple(sequence.output) for i, sequence in driver.finished.items()}
    assert expected == actual
    assert driver.engine.num_blocks == len(driver.free)


def test_contexts_of_very_different_length_decode_together(
    checkpoint: Checkpoints, engine_of: Engines
) -> None:
    """Long and short contexts share a step (in groups of their own) and stay right."""
    config = CONFIGS["qwen2-tied"]
    context = config.max_position_embeddings
    lengths = (context - 10, 3, context - 9, 1, 130, 17)
    driver = Driver(engine_of("qwen2-tied"))
    for seq_id, length in enumerate(lengths):
        driver.add(seq_id, prompt_of(length), 8)
    expected = {
        seq_id: checkpoint("qwen2-tied").greedy(prompt_of(length), 8)
        for seq_id, length in enumerate(lengths)
    }
    assert expected == driver.finish()


@pytest.mark.parametrize("kernels", ["native", "torch"])
def test_what_a_block_held_before_cannot_reach_its_next_owner(
    checkpoint: Checkpoints, kernels: Literal["native", "torch"]
) -> None:
    """Even a cache full of NaN (an overflow of strangers) leaves a new sequence untouched."""
    if kernels == "native":
        require_native()
    source = checkpoint("llama")
    options = EngineOptions(model=str(source.path), kv_cache_bytes=1 << 20, kernels=kernels)
    engine = load_engine(options, lambda _: None)
    forward = engine._forward
    cache = forward._cache if kernels == "native" else forward._decoder._cache
    with torch.inference_mode():
        cache.pool.fill_(float("nan"))
    driver = Driver(engine)
    for seq_id, length in enumerate((3, 40)):
        driver.add(seq_id, prompt_of(length), 30, pieces=[2, 20])
    expected = {i: source.greedy(prompt_of(n), 30) for i, n in enumerate((3, 40))}
    assert expected == driver.finish()


def test_a_step_without_draws_yields_nothing(engine_of: Engines) -> None:
    """A prompt piece that is not the last one fills the cache and draws no token."""
    chunk = Chunk(1, 0, prompt_of(20), (3, 4))
    assert () == engine_of("llama").run(Step(Tier.TACTICAL, (chunk,)))


def test_a_step_can_be_run_again(engine_of: Engines) -> None:
    """Repeating a step, as after running out of memory, yields the same tokens."""
    step = Step(Tier.TACTICAL, (Chunk(1, 0, prompt_of(20), (3, 4), (Draw(Sampling(), 0),)),))
    assert engine_of("llama").run(step) == engine_of("llama").run(step)


def test_running_out_of_memory_fails_the_step_only(
    checkpoint: Checkpoints, engine_of: Engines, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error has the project's type, and the engine then answers as if nothing had been."""

    def exhausted(*_: object) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    def no_memory(*_: object) -> bool:
        raise MemoryError("no memory for a step's activations")

    engine, prompt = engine_of("llama"), prompt_of(20)
    with monkeypatch.context() as patched:
        patched.setattr(Decoder, "logits", exhausted)
        patched.setattr(Library, "session_run", no_memory)
        with pytest.raises(DeviceOutOfMemory, match="20 tokens"):
            generate(engine, prompt, 5)
    assert checkpoint("llama").greedy(prompt, 5) == generate(engine, prompt, 5)


@pytest.mark.parametrize(
    ("chunk", "problem"),
    [
        (Chunk(1, 0, (), (0,)), "without tokens"),
        (Chunk(1, 0, (1,) * 17, (0,)), "without blocks"),
        (Chunk(1, 256, (1,), tuple(range(17))), "beyond the context"),
        (Chunk(1, 0, (131,), (0,)), "beyond the vocabulary"),
        (Chunk(1, 0, (-2,), (0,)), "below the vocabulary"),
        (Chunk(77, 0, (PENDING,), (0,)), "no token of the sequence is pending"),
        (Chunk(1, 0, (1, PENDING), (0,)), "only a chunk's first token can be pending"),
    ],
)
def test_a_contradictory_chunk_is_a_bug(engine_of: Engines, chunk: Chunk, problem: str) -> None:
    """What would write into a stranger's cache, or crash a GPU, never reaches the device."""
    with pytest.raises(AssertionError, match=problem):
        engine_of("llama").run(Step(Tier.TACTICAL, (chunk,)))


@pytest.mark.parametrize("name", ["demo-tactical", "demo-strategic"])
def test_the_bundled_pair_answers_as_transformers_does(name: str) -> None:
    """Both shipped models, batched, give the tokens that `generate` gives in fp32."""
    path = BUNDLED / name
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    source = Checkpoint(path, model)
    options = EngineOptions(model=str(path), kv_cache_bytes=1 << 25, max_context_tokens=256)
    driver = Driver(load_engine(options, lambda _: None))
    lengths = (5, 23, 64)
    for seq_id, length in enumerate(lengths):
        driver.add(seq_id, prompt_of(length), 48, pieces=[17] * 4)
    expected = {i: source.greedy(prompt_of(length), 48) for i, length in enumerate(lengths)}
    assert expected == driver.finish()
