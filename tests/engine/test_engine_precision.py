"""What each precision may cost the bundled pair, against bf16: bounds, not hopes.

Measured with bench/precision.py, whose definition of quality this is. The bounds leave about
twice what was seen, because kernels on another machine round in another order.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from sage_fed.text import Tokenizer

BENCH = Path(__file__).parents[2] / "bench"

# Precision -> largest logit error, KL divergence, perplexity against bf16's, accuracy lost.
BOUNDS: dict[str, tuple[float, float, float, float]] = {
    "fp32": (0.8, 0.0002, 1.005, 0.02),
    "fp16": (0.8, 0.0002, 1.005, 0.02),
    "int8": (2.0, 0.002, 1.02, 0.04),
    "int4": (14.0, 0.08, 1.10, 0.09),
}


@pytest.fixture(scope="module")
def precision() -> ModuleType:
    """The benchmark as a module."""
    with pytest.MonkeyPatch.context() as patched:
        patched.syspath_prepend(str(BENCH))
        return importlib.import_module("precision")


@pytest.mark.parametrize("name", ["demo-tactical", "demo-strategic"])
def test_every_precision_keeps_the_bundled_pairs_quality(precision: ModuleType, name: str) -> None:
    """Logits, perplexity and accuracy on test questions of every family, on all kernels."""
    path = precision.MODELS / name
    tokenizer = Tokenizer.load(path)
    texts = precision.questions(tokenizer, 2)
    rows: list[dict[str, Any]] = precision.measure_quality(path, texts, tokenizer.num_valid_ids)
    reference = rows[0]
    assert ("bf16", 0.0) == (reference["precision"], reference["max_logit_error"])
    assert reference["num_questions"] > 80
    assert reference["accuracy"] > 0.5
    for row in rows[1:]:
        largest, divergence, perplexity, lost = BOUNDS[row["precision"]]
        assert row["max_logit_error"] < largest, row
        assert row["mean_kl"] < divergence, row
        assert row["perplexity"] < perplexity * reference["perplexity"], row
        assert row["accuracy"] > reference["accuracy"] - lost, row
    bytes_of = {(row["precision"], row["kernels"]): row["step_bytes"] for row in rows}
    for (name_of, kernels), num_bytes in bytes_of.items():
        if name_of == "int4":
            assert num_bytes < 0.8 * bytes_of["int8", kernels]


def test_a_model_loses_nothing_against_itself(precision: ModuleType) -> None:
    """The measure is zero where nothing differs, so what it shows elsewhere is a difference."""
    path = precision.MODELS / "demo-tactical"
    texts = precision.questions(Tokenizer.load(path), 1)[:8]
    first, second = (
        precision.logits_of(precision.load(path, "bf16", "auto"), texts) for _ in range(2)
    )
    row = precision.quality(texts, first, second)
    assert (0.0, 1.0) == (row["max_logit_error"], row["same_best_token"])
    assert abs(row["mean_kl"]) < 1e-6
