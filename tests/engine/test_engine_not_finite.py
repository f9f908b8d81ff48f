"""Numbers that break down: no garbage token, and only for the sequence that they belong to."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from engine_driver import Driver, generate
from native_kernels import require_native
from safetensors.torch import load_file, save_file
from tiny_models import Checkpoint, prompt_of

from sage_fed.core import Sampling
from sage_fed.engine import Engine, EngineOptions, load_engine
from sage_fed.engine.cuda_graphs import EagerCapture
from sage_fed.engine.sampling import choose, pick
from sage_fed.steps import NO_TOKEN, Draw

SAMPLINGS = [
    Sampling(),
    Sampling(top_logprobs=3),
    Sampling(temperature=1.0, seed=1),
    Sampling(temperature=1.0, top_k=5, seed=1),
    Sampling(temperature=1.0, top_p=0.9, seed=1, repetition_penalty=1.3),
    Sampling(repetition_penalty=1.3),
]
BAD_TOKEN = 100
WELL = tuple(token for token in prompt_of(60) if token != BAD_TOKEN)
SICK = (*WELL[:20], BAD_TOKEN, *WELL[20:30])

Edit = Callable[[dict[str, torch.Tensor]], None]
Poisoned = Callable[[str, str, Edit], Engine]


@pytest.fixture
def poisoned(checkpoint: Callable[[str], Checkpoint], tmp_path: Path) -> Poisoned:
    """An engine on weights that somebody damaged."""

    def of(kernels: str, precision: str, edit: Edit) -> Engine:
        if kernels == "native":
            require_native()
        shutil.copytree(checkpoint("qwen2-untied").path, tmp_path / "model")
        weights = load_file(tmp_path / "model" / "model.safetensors")
        edit(weights)
        save_file(weights, tmp_path / "model" / "model.safetensors", {"format": "pt"})
        options = EngineOptions(
            model=str(tmp_path / "model"), kv_cache_bytes=1 << 22, precision=precision,
            kernels="torch" if kernels == "graphs" else kernels,
        )  # fmt: skip
        return load_engine(options, lambda _: None, EagerCapture() if kernels == "graphs" else None)

    return of


def embedding(value: float) -> Edit:
    """Damage what one token means."""

    def edit(weights: dict[str, torch.Tensor]) -> None:
        weights["model.embed_tokens.weight"][BAD_TOKEN] = value

    return edit


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    ("kernels", "precision"),
    [("torch", "fp32"), ("torch", "bf16"), ("graphs", "fp32"), ("graphs", "bf16"),
     ("native", "fp32"), ("native", "bf16"), ("native", "int8"), ("native", "int4")],
)  # fmt: skip
def test_only_the_sequence_whose_numbers_broke_down_has_no_token(
    poisoned: Poisoned, kernels: str, precision: str, value: float
) -> None:
    """A prompt that runs into damage gets none; one beside it in the batch gets its own."""
    engine = poisoned(kernels, precision, embedding(value))
    alone = generate(engine, WELL, 1)
    driver = Driver(engine)
    driver.add(0, WELL, 1)
    driver.add(1, SICK, 1)
    driver.add(2, WELL, 1)
    outputs = driver.finish()
    assert (NO_TOKEN,) == outputs[1]
    assert alone == outputs[0] == outputs[2]
    assert alone[0] >= 0


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=repr)
@pytest.mark.parametrize("kernels", ["torch", "graphs", "native"])
def test_however_a_token_is_drawn_a_nan_is_noticed(
    poisoned: Poisoned, kernels: str, sampling: Sampling
) -> None:
    """Greedy, random, filtered or with log-probabilities."""
    engine = poisoned(kernels, "fp32", embedding(float("nan")))
    assert (NO_TOKEN,) == generate(engine, SICK, 1, sampling)
    assert generate(engine, WELL, 1, sampling)[0] >= 0
    # The last piece is a step of decoding, or of three rows.
    for last in (1, 3):
        pieces = [len(SICK) - last, last]
        assert (NO_TOKEN,) == generate(engine, SICK, 1, sampling, pieces)
        assert generate(engine, WELL, 1, sampling, [len(WELL) - last, last])[0] >= 0


@pytest.mark.parametrize("kernels", ["torch", "graphs", "native"])
@pytest.mark.parametrize("token", [0, 70, 130])
def test_one_logit_that_is_no_number_is_enough(
    poisoned: Poisoned, kernels: str, token: int
) -> None:
    """Also where the others look well: a head with a damaged row is not to be trusted."""

    def edit(weights: dict[str, torch.Tensor]) -> None:
        weights["lm_head.weight"][token, 3] = float("nan")

    engine = poisoned(kernels, "fp32", edit)
    assert (NO_TOKEN,) == generate(engine, WELL, 1)


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=repr)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_rows_are_judged_one_by_one(sampling: Sampling, value: float) -> None:
    """What stays on the device for the next step is an id of the vocabulary all the same."""
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(1))
    well = [token for token, _ in choose(logits, [Draw(sampling, 0, (1, 2))] * 3)]
    logits[1, 17] = value
    picked = pick(logits, [Draw(sampling, 0, (1, 2))] * 3)
    found = [token for token, _ in picked.choices(picked.results)]
    assert [well[0], NO_TOKEN, well[2]] == found
    assert all(0 <= token < 50 for token in picked.tokens.tolist())


def test_a_row_without_any_candidate_has_no_token() -> None:
    """Logits that are all minus infinity are no distribution either."""
    logits = torch.full((1, 9), float("-inf"))
    assert [(NO_TOKEN, None)] == choose(logits, [Draw(Sampling(), 0)])
