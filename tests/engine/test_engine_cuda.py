"""The engine on a GPU, against itself on the CPU; skips itself where there is none."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from engine_driver import Driver, generate
from tiny_models import Checkpoint, prompt_of

from sage_fed.core import Sampling
from sage_fed.engine import Engine, EngineOptions, load_engine

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

Checkpoints = Callable[[str], Checkpoint]

NAMES = ("qwen2-tied", "qwen3", "llama3", "mistral", "llama-biased")


def on_cuda(source: Checkpoint, precision: str) -> Engine:
    options = EngineOptions(
        model=str(source.path), kv_cache_bytes=1 << 22, device="cuda:0", precision=precision
    )
    return load_engine(options, lambda _: None)


@pytest.mark.parametrize("name", NAMES)
def test_fp32_on_cuda_gives_the_tokens_of_the_cpu(checkpoint: Checkpoints, name: str) -> None:
    """A ragged batch in fp32 answers as `transformers` does on the CPU."""
    source = checkpoint(name)
    driver = Driver(on_cuda(source, "fp32"))
    lengths = (1, 16, 45, 80)
    for seq_id, length in enumerate(lengths):
        driver.add(seq_id, prompt_of(length), 20, pieces=[30, 1, 30, 19])
    expected = {i: source.greedy(prompt_of(length), 20) for i, length in enumerate(lengths)}
    assert expected == driver.finish()


def test_sampled_tokens_on_cuda_are_those_of_the_cpu(
    checkpoint: Checkpoints, engine_of: Callable[[str], Engine]
) -> None:
    """The same seed draws the same tokens on either device in fp32."""
    engine = on_cuda(checkpoint("llama"), "fp32")
    for extra in ({}, {"top_k": 20}, {"top_p": 0.9}, {"min_p": 0.05}):
        sampling = Sampling(temperature=1.1, seed=8, **extra)
        expected = generate(engine_of("llama"), prompt_of(30), 20, sampling)
        assert expected == generate(engine, prompt_of(30), 20, sampling)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("name", NAMES)
def test_half_precision_on_cuda_is_close(
    checkpoint: Checkpoints, name: str, precision: str
) -> None:
    """Half precision puts nearly all of its probability where fp32 does."""
    source, prompt = checkpoint(name), prompt_of(40)
    driver = Driver(on_cuda(source, precision))
    driver.add(0, prompt, 1, Sampling(top_logprobs=131), pieces=[25, 15])
    driver.finish()
    logprob = driver.finished[0].logprobs[0]
    assert logprob is not None
    actual = torch.tensor([value for _, value in sorted(logprob.top)]).exp()
    expected = source.logits(prompt)[-1].softmax(-1)
    assert (actual - expected).abs().sum() / 2 < 0.1


def test_memory_comes_back_when_an_engine_is_closed(checkpoint: Checkpoints) -> None:
    """`close` frees the weights and the pool."""
    before = torch.cuda.memory_allocated()
    engine = on_cuda(checkpoint("llama"), "bf16")
    assert torch.cuda.memory_allocated() >= before + engine.info.kv_cache_bytes
    engine.close()
    assert torch.cuda.memory_allocated() == before
