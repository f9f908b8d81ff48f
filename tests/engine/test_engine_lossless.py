"""Drafts change no token: the bundled pair on real engines, with speculation and without."""

from __future__ import annotations

import importlib
import sys
from dataclasses import replace
from pathlib import Path
from random import Random
from types import ModuleType

import pytest
import torch
from native_kernels import require_native

from sage_fed.core import Sampling
from sage_fed.engine.sampling import choose
from sage_fed.steps import Draw

BENCH = Path(__file__).parents[2] / "bench"


@pytest.fixture(scope="module")
def lossless() -> ModuleType:
    """The script as a module."""
    sys.path.insert(0, str(BENCH))
    try:
        return importlib.import_module("lossless")
    finally:
        sys.path.remove(str(BENCH))


@pytest.mark.parametrize(
    ("precision", "kernels", "num_prompts", "seed"),
    [
        ("fp32", "native", 200, 5),
        ("fp32", "torch", 60, 6),
        ("fp32", "graphs", 60, 7),
        ("bf16", "native", 60, 8),
        ("int8", "native", 60, 9),
        ("int4", "native", 60, 10),
        ("bf16", "torch", 90, 12),
    ],
)
def test_drafts_change_no_token(
    lossless: ModuleType, precision: str, kernels: str, num_prompts: int, seed: int
) -> None:
    """In fp32 none; in other precisions only one of those that the logits' last bits decide."""
    if kernels == "native":
        require_native()
    engines = lossless.load(precision, kernels)
    found = lossless.verdict(engines, lossless.examine(engines, num_prompts, seed, 30), precision)
    assert [] == found["other_differences"]
    assert 0 == found["unlawful"]
    met = found["met"]
    assert num_prompts == found["prompts"]
    assert 0 < met["accepted_tokens"] < met["verified_tokens"], "drafts were right and wrong"
    if num_prompts >= 200:
        for what in ("drafted_tokens", "preemptions", "eos", "length", "prefix_hit_tokens"):
            assert met[what] > 0, f"the traffic had no {what}"


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kernels", ["native", "torch"])
def test_drafts_change_no_token_of_ten_thousand_prompts(lossless: ModuleType, kernels: str) -> None:
    """Whatever joins, leaves, is interrupted or found again, in batches of up to 16."""
    if kernels == "native":
        require_native()
    engines = lossless.load("fp32", kernels)
    found = lossless.verdict(engines, lossless.examine(engines, 10_000, 1), "fp32")
    assert [] == found["other_differences"]
    assert 0 == found["divergences"]
    assert 16 == max(found["steps_by_sequences"])
    for what in ("preemptions", "pauses", "cancelled", "stop_strings", "stop_token"):
        assert found["met"][what] > 0, f"the traffic had no {what}"


SAMPLINGS = (
    Sampling(),
    Sampling(repetition_penalty=1.3, presence_penalty=0.5),
    Sampling(temperature=0.7),
    Sampling(temperature=1.5, top_k=5),
    Sampling(temperature=1.0, top_p=0.5),
    Sampling(temperature=0.8, min_p=0.3),
    Sampling(temperature=1.2, top_k=20, top_p=0.9, min_p=0.05, frequency_penalty=0.4),
)


def places(count: int) -> list[tuple[torch.Tensor, Draw]]:
    """Random logits and draws of all kinds."""
    chance = torch.Generator().manual_seed(3)
    counts = ((3, 2), (9, 1))
    found = []
    for index in range(count):
        sampling = replace(SAMPLINGS[index % len(SAMPLINGS)], seed=index)
        logits = torch.randn(64, generator=chance) * 2.0
        penalised = sampling.penalises
        draw = Draw(sampling, index, (3, 9, 40) if penalised else (), counts if penalised else ())
        found.append((logits, draw))
    return found


def drawn(logits: torch.Tensor, draw: Draw) -> int:
    """The engine's choice."""
    return choose(logits[None], [draw])[0][0]


def test_what_is_drawn_from_moved_logits_is_lawful(lossless: ModuleType) -> None:
    """The judge's bound covers every move within it, whichever filters are on."""
    chance, num_changed = torch.Generator().manual_seed(4), 0
    for logits, draw in places(700):
        for bound in (1e-6, 0.05, 0.3):
            moves = (torch.randint(2, logits.shape, generator=chance) * 2 - 1) * bound
            other = drawn(logits + moves, draw)
            num_changed += other != drawn(logits, draw)
            assert lossless.can_be_drawn(logits, draw, other, bound * 1.001)
    assert num_changed > 100


def test_what_is_not_drawn_is_unlawful(lossless: ModuleType) -> None:
    """With no room to move, one token can be drawn: the engine's."""
    for logits, draw in places(140):
        lawful = [t for t in range(64) if lossless.can_be_drawn(logits, draw, t, 1e-7)]
        assert [drawn(logits, draw)] == lawful


def test_a_far_token_is_unlawful_within_a_bound(lossless: ModuleType) -> None:
    """The least bound that allows a token is about what makes it the choice."""
    logits, draw = torch.tensor([3.0, 2.0, 0.0]), Draw(Sampling(), 0)
    assert not lossless.can_be_drawn(logits, draw, 1, 0.49)
    assert lossless.can_be_drawn(logits, draw, 1, 0.51)
    assert not lossless.can_be_drawn(logits, draw, 2, 1.4)


def test_requests_of_a_seed_are_always_the_same(lossless: ModuleType) -> None:
    """So that a difference can be found again."""
    tokenizer = lossless.Tokenizer.load(lossless.MODELS / "demo-strategic")
    first, again = (lossless.requests(Random(1), tokenizer, 20, 0) for _ in range(2))
    assert first == again
