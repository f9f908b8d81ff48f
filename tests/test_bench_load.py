"""The loading benchmark's own parts, on a checkpoint of some megabytes."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest

from sage_fed.engine import plan_checkpoint, write_checkpoint
from sage_fed.engine.random_checkpoint import Shape

BENCH = Path(__file__).parents[1] / "bench"
TINY = Shape(64, 2, 4, 2, 96, 151936, tied=True, max_position=2048)


@pytest.fixture
def bench_load(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script as a module."""
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module("load")


def test_starts_are_measured_in_time_and_memory(bench_load: ModuleType, tmp_path: Path) -> None:
    """Every start has its bytes read and its peak; one from kept weights reads what was kept."""
    model = tmp_path / "tiny"
    write_checkpoint(
        plan_checkpoint(TINY), model, seed=0, progress=lambda _: None, complete=lambda _: None
    )
    size = bench_load.num_bytes(model)
    plain = bench_load.start(model, "int8", None)
    assert 0 < plain["weight_bytes"] < size
    bench_load.start(model, "int8", tmp_path / "kept")
    again = bench_load.start(model, "int8", tmp_path / "kept")
    row = bench_load.summary("int8, kept", [again], bench_load.num_bytes(tmp_path / "kept"))
    assert row["weight_bytes"] <= row["read_bytes"] < 0.6 * size
    assert row["load_s"] > 0
    assert bench_load.cat_s(model) > 0
    bench_load.forget(model)
    assert size == bench_load.num_bytes(model)
