"""Checkpoints with random weights: complete, loadable, the same for the same seed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from engine_driver import generate
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_models import prompt_of
from transformers import AutoModelForCausalLM

from sage_fed.engine import (
    SHAPES,
    EngineOptions,
    load_engine,
    plan_checkpoint,
    write_checkpoint,
)
from sage_fed.engine.random_checkpoint import CheckpointPlan, Shape
from sage_fed.errors import CannotWrite

TINY = Shape(64, 3, 4, 2, 96, 256, tied=False, tokenizer_ids=200, max_position=128)


def write(plan: CheckpointPlan, path: Path, seed: int = 0) -> list[int]:
    """Write it; returns what was reported."""
    reported: list[int] = []
    write_checkpoint(plan, path, seed=seed, progress=reported.append, complete=lambda _: None)
    return reported


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("qwen2.5-0.5b", 494_032_768), ("qwen2.5-1.5b", 1_543_714_304), ("qwen2.5-7b", 7_615_616_512)],
)
def test_a_shape_has_the_published_number_of_parameters(name: str, parameters: int) -> None:
    """Counted as on the models' pages; that is what speed depends on."""
    assert parameters == plan_checkpoint(SHAPES[name]).parameters


def test_the_7b_is_sharded_like_the_published_one() -> None:
    """Four files of at most 4 GB."""
    plan = plan_checkpoint(SHAPES["qwen2.5-7b"])
    sizes = [sum(map(plan.tensor_bytes, shard.values())) for shard in plan.shards]
    assert 4 == len(sizes)
    assert max(sizes) <= 4_000_000_000


@pytest.mark.parametrize("max_shard_bytes", [10**9, 100_000])
def test_what_is_written_runs_as_transformers_runs_it(tmp_path: Path, max_shard_bytes: int) -> None:
    """One file or several, `transformers` and the engine read the same finite model."""
    plan = plan_checkpoint(TINY, num_layers=2, weight_type="fp32", max_shard_bytes=max_shard_bytes)
    assert (max_shard_bytes < 10**9) == (len(plan.shards) > 1)
    reported = write(plan, tmp_path / "m")
    assert sorted(reported) == reported
    assert plan.num_bytes == reported[-1]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    assert plan.parameters == model.num_parameters()
    engine = load_engine(EngineOptions(str(tmp_path / "m"), 1 << 22), lambda _: None)
    prompt = prompt_of(20)
    with torch.inference_mode():
        expected = model(torch.tensor([prompt])).logits[0, -1]
    assert expected.isfinite().all()
    assert (int(expected.argmax()),) == generate(engine, prompt, 1)
    assert frozenset() == engine.eos_token_ids


def test_weights_are_ordinary_numbers(tmp_path: Path) -> None:
    """Finite, never denormal, spread as a model's own initialisation is."""
    write(plan_checkpoint(TINY), tmp_path / "m")
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    for name, values in tensors.items():
        assert torch.bfloat16 == values.dtype
        assert values.isfinite().all()
        assert not ((values != 0) & (values.abs() < torch.finfo(torch.bfloat16).tiny)).any()
        mean = 1.0 if name.endswith("norm.weight") else 0.0
        assert abs(values.float().mean() - mean) < 0.02, name
        assert 0.01 < values.float().std() < 0.03, name


def test_a_seed_is_a_checkpoint(tmp_path: Path) -> None:
    """The same seed writes the same bytes whatever the threads do, another one does not."""
    plan = plan_checkpoint(TINY)
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        write(plan, tmp_path / name, seed)
    a, b, c = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
    assert a == b
    assert a != c


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    """What is there stays as it is, and the refusal names it."""
    target = tmp_path / "mine"
    target.mkdir()
    with pytest.raises(CannotWrite, match="mine"):
        write(plan_checkpoint(TINY), target)
    assert [] == list(target.iterdir())


def test_a_full_disk_is_said_beforehand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Needed and free bytes are in the message, and nothing is left behind."""
    monkeypatch.setattr("sage_fed.engine.random_checkpoint.free_bytes", lambda _: 1234)
    with pytest.raises(CannotWrite, match="1,234"):
        write(plan_checkpoint(TINY), tmp_path / "m")
    assert [] == list(tmp_path.iterdir())


def test_an_interrupted_run_leaves_nothing(tmp_path: Path) -> None:
    """Half a checkpoint is never found under the name of a whole one."""

    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    plan = plan_checkpoint(TINY)
    with pytest.raises(KeyboardInterrupt):
        write_checkpoint(plan, tmp_path / "m", seed=0, progress=interrupt, complete=lambda _: None)
    assert [] == list(tmp_path.iterdir())


def test_headers_are_aligned(tmp_path: Path) -> None:
    """Data begins at a multiple of 8 bytes, as the format's readers may expect."""
    write(plan_checkpoint(TINY), tmp_path / "m")
    with (tmp_path / "m" / "model.safetensors").open("rb") as file:
        assert 0 == int.from_bytes(file.read(8), "little") % 8
    with safe_open(tmp_path / "m" / "model.safetensors", framework="pt") as opened:
        assert {"format": "pt"} == opened.metadata()
    assert "bfloat16" == json.loads((tmp_path / "m" / "config.json").read_text())["dtype"]
