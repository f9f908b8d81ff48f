"""The peers' benchmark on a tiny checkpoint: its own part, its arithmetic, and who is missing."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BENCH = Path(__file__).parent.parent / "bench"


@pytest.fixture
def plan(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The arithmetic as a module."""
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module("peers_worker")


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The ratios as a module."""
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module("peers")


@pytest.mark.timeout(300)
def test_a_tiny_run_measures_ours_and_reports_the_missing_peers(tmp_path: Path) -> None:
    """Without the peers' interpreter ours is measured, and each peer is in the JSON as missing."""
    output = tmp_path / "peers.json"
    engines = ("sage_fed bf16", "llama.cpp BF16", "OpenVINO int8", "transformers generate bf16")
    run = subprocess.run(
        [
            sys.executable, str(BENCH / "peers.py"), "--shape", "tiny", "--rounds", "1",
            "--threads", "1", "--folder", str(tmp_path), "--output", str(output),
            "--engines", *engines,
        ],
        capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip
    assert 0 == run.returncode, run.stderr
    body = json.loads(output.read_text())
    assert body == json.loads(run.stdout.splitlines()[-1])
    found = body["engines"]
    assert set(engines) == found.keys()
    for name in ("llama.cpp BF16", "OpenVINO int8"):
        assert "not installed" in found[name]["missing"]
        assert name in run.stderr
    for name in ("sage_fed bf16", "transformers generate bf16"):
        cells = found[name]["cells"]
        assert {"prompt 8", "prompt 24", "concurrent 1", "concurrent 3"} == cells.keys()
        assert all(value["median"] > 0 for cell in cells.values() for value in cell.values())
    # Both computed the same model: greedy tokens of the same prompt.
    ours, theirs = found["sage_fed bf16"], found["transformers generate bf16"]
    assert ours["first_tokens"] == theirs["first_tokens"]
    ratios = {(r["cell"], r["figure"]): r for r in body["ratios"]}
    best = theirs["cells"]["prompt 8"]["decode_tokens_per_s"]["median"]
    assert best == ratios["prompt 8", "decode_tokens_per_s"]["best"]


def test_rates_come_from_the_tokens_times(plan: ModuleType) -> None:
    """A rate leaves the prompts out: it counts what came after the last of the first tokens."""
    assert {"ttft_s": 0.5, "decode_tokens_per_s": 8.0} == plan.single([[0.5, 0.625, 0.75]])
    together = plan.together([[0.5, 0.75, 1.0], [0.75, 1.0, 1.25]])
    assert {"tokens_per_s": 3 / 0.5, "all_prefilled_s": 0.75} == together


def test_a_ratio_above_one_is_ahead(table: ModuleType) -> None:
    """Rates compare as they are, times to the first token the other way round, with the best."""

    def engine(rate: float, first_s: float) -> dict[str, Any]:
        figures = {"ttft_s": {"median": first_s}, "decode_tokens_per_s": {"median": rate}}
        return {"cells": {"prompt 32": figures}}

    engines = {
        "sage_fed int8": engine(60.0, 0.1),
        "llama.cpp Q8_0": engine(50.0, 0.2),
        "OpenVINO int8": engine(75.0, 0.3),
    }
    rows = {row["figure"]: row for row in table.ratios(engines)}
    assert ("OpenVINO int8", 0.8) == (
        rows["decode_tokens_per_s"]["best_peer"],
        rows["decode_tokens_per_s"]["ratio"],
    )
    assert ("llama.cpp Q8_0", 2.0) == (rows["ttft_s"]["best_peer"], rows["ttft_s"]["ratio"])
    assert {"llama.cpp Q8_0": 2.0, "OpenVINO int8": 3.0} == rows["ttft_s"]["ratio_to_each"]


def test_no_two_prompts_share_a_prefix(plan: ModuleType) -> None:
    """A cache of prefixes finds nothing, and every engine gets the same ids in a round."""
    first = plan.prompts(16, 32, 151936, 3)
    assert first == plan.prompts(16, 32, 151936, 3)
    assert 16 == len({tuple(prompt[:2]) for prompt in first})
