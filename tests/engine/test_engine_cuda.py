"""The engine on a GPU, against itself on the CPU; skips itself where there is none."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from engine_driver import Driver, generate
from tiny_models import Checkpoint, prompt_of

from sage_fed.core import Sampling, Tier
from sage_fed.engine import Engine, EngineOptions, load_engine
from sage_fed.engine import precision as numbers
from sage_fed.engine.cuda_graphs import EagerCapture
from sage_fed.engine.precision import QuantisedFormat
from sage_fed.steps import PENDING, Chunk, Draw, Step

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


@pytest.mark.parametrize("kind", ["int8", "int4", "fp8"])
@pytest.mark.parametrize("rows", [1, 2, 8, 33, 200])
def test_quantised_products_are_those_of_the_dequantised_weights(kind: str, rows: int) -> None:
    """Each kind, at each number of rows, as near as bf16 (and fp8 activations) let it be."""
    if kind == "fp8" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("the device has no 8-bit floats")
    device = torch.device("cuda:0")
    generator = torch.Generator().manual_seed(rows)
    w = torch.randn(192, 896, generator=generator) * 0.05
    bias = torch.randn(192, generator=generator)
    builder = QuantisedFormat(kind, torch.bfloat16, device).builder(192, 896, bias=True)
    builder.place_weight(0, w)
    builder.place_bias(0, bias)
    layer = builder.build()
    x = torch.randn(rows, 896, generator=generator).bfloat16()
    wide = getattr(numbers, f"dequantise_{kind}")(*getattr(numbers, f"quantise_{kind}")(w))
    expected = x.float() @ wide.t() + bias
    found = layer(x.to(device)).float().cpu()
    bound = 0.05 if kind == "fp8" else 0.01
    assert (found - expected).norm() / expected.norm() < bound
    assert found.isfinite().all()


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8", "int4"])
@pytest.mark.parametrize("kernels", ["auto", "torch"])
def test_graphs_give_the_tokens_of_uncaptured_steps(
    checkpoint: Checkpoints, precision: str, kernels: str
) -> None:
    """Replayed, padded and compiled steps choose what plain ones do, or nearly as good."""
    source = checkpoint("qwen2-tied")
    options = EngineOptions(
        model=str(source.path),
        kv_cache_bytes=1 << 22,
        device="cuda:0",
        precision=precision,
        kernels=kernels,
        max_batch=6,
        verify_tokens=(3,),
    )
    tops = []
    for capture in (None, EagerCapture()):
        engine = load_engine(options, lambda _: None, capture)
        driver = Driver(engine)
        driver.add(0, prompt_of(40), 1, Sampling(top_logprobs=131), pieces=[37, 3])
        for seq_id, length in enumerate((1, 16, 45, 80), start=1):
            driver.add(seq_id, prompt_of(length), 20, pieces=[30, 1, 30, 19])
        driver.finish()
        logprob = driver.finished[0].logprobs[0]
        assert logprob is not None
        tops.append(torch.tensor([value for _, value in sorted(logprob.top)]).exp())
        if precision == "fp32":
            outputs = {i: tuple(s.output) for i, s in driver.finished.items() if i}
            expected = {
                i: source.greedy(prompt_of(n), 20) for i, n in enumerate((1, 16, 45, 80), start=1)
            }
            assert expected == outputs
        engine.close()
    assert (tops[0] - tops[1]).abs().sum() / 2 < 0.1


def test_steps_in_flight_draw_what_steps_that_wait_do(checkpoint: Checkpoints) -> None:
    """Pending tokens, resolved on the device, two steps in flight; times are the device's."""
    source, prompt = checkpoint("llama3"), prompt_of(20)
    engine = on_cuda(source, "fp32")
    flights, answer = [], []
    for number in range(10):
        token_ids = prompt if number == 0 else (PENDING,)
        start = 0 if number == 0 else len(prompt) + number - 1
        chunk = Chunk(3, start, token_ids, (7, 1, 4), (Draw(Sampling(), number),))
        flights.append(engine.launch(Step(Tier.TACTICAL, (chunk,))))
    for flight in flights:
        answer += [drawn.token_id for drawn in flight.wait()]
        assert flight.device_s is not None
        assert flight.device_s > 0
    assert source.greedy(prompt, 10) == tuple(answer)


def test_memory_comes_back_when_an_engine_is_closed(checkpoint: Checkpoints) -> None:
    """`close` frees the weights, the pool and the graphs; the libraries keep their workspace."""
    options = EngineOptions(
        model=str(checkpoint("llama").path), kv_cache_bytes=1 << 30, device="cuda:0",
        precision="bf16",
    )  # fmt: skip
    before = torch.cuda.memory_allocated()
    engine = load_engine(options, lambda _: None)
    assert torch.cuda.memory_allocated() >= before + engine.info.kv_cache_bytes
    engine.close()
    assert torch.cuda.memory_allocated() < before + (1 << 28)
