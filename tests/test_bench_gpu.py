"""The GPU benchmark in its small form on the CPU, so that it is right when a GPU is at hand."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import json
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

BENCH = Path(__file__).parent.parent / "bench"

NOT_ON_A_BARE_GPU_MACHINE = (
    "apsw", "grpc", "grpc_health", "prometheus_client", "pydantic", "typer",
    "rich",
)  # fmt: skip

WITHOUT_THEM = """
import runpy, sys
from pathlib import Path
sys.modules.update(dict.fromkeys(sys.argv.pop(1).split(",")))
del sys.argv[0]
sys.path.insert(0, str(Path(sys.argv[0]).parent))
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script as a module."""
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module("gpu")


@pytest.mark.timeout(300)
def test_the_small_form_runs_every_part_where_only_torch_is_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every section is there and without errors, in the file and as the one line on stdout."""
    output = tmp_path / "gpu.json"
    run = subprocess.run(
        [
            sys.executable, "-c", WITHOUT_THEM, ",".join(NOT_ON_A_BARE_GPU_MACHINE),
            str(BENCH / "gpu.py"), "--shapes", "small", "--device", "cpu", "--output", str(output),
        ],
        capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip
    assert 0 == run.returncode, run.stderr
    (line,) = run.stdout.splitlines()
    body = json.loads(line)
    assert body["parts"] == json.loads(output.read_text())["parts"]
    statuses = {name: part["status"] for name, part in body["parts"].items()}
    ran = (
        "environment", "correctness", "resident", "speed", "interference", "precisions", "peers",
        "load",
    )  # fmt: skip
    assert {**dict.fromkeys(ran, "ok"), "daemon": "skipped"} == statuses
    missed = ", ".join(sorted(NOT_ON_A_BARE_GPU_MACHINE))
    assert f"not installed: {missed}" in body["parts"]["daemon"]["reason"]
    results = {name: body["parts"][name]["result"] for name in ran}

    precisions = results["correctness"]["precisions"]
    assert {"fp32", "bf16", "fp16", "int8", "int4"} == precisions.keys()
    assert all(len(models) >= 2 for models in precisions.values())

    speed = results["speed"]
    points = {(r["tier"], r["batch"], r["context"]) for r in speed["decode"]}
    tiers, batches, contexts = ("tactical", "strategic"), (1, 2, 4), (16, 64, 128)
    assert {(t, b, c) for t in tiers for b in batches for c in contexts} == points
    assert {"decode", "prefill"} == {row["phase"] for row in speed["ratio"]}
    assert ([], 2) == (speed["cut"], len(speed["overhead"]))
    assert all(row["median_s"] > 0 for row in speed["decode"] + speed["prefill"])

    together = results["interference"]["together"]
    assert set(tiers) == together.keys()
    assert all(row["tokens_per_s"] > 0 for row in together.values())

    assert {"two_threads"} == results["interference"]["cost_without_interleaving"].keys()

    for tiers_of in results["precisions"]["precisions"].values():
        assert all(tiers_of[tier]["equal"] for tier in tiers)
        assert [1, 2] == [row["batch"] for row in tiers_of["tactical"]["decode"]]
    assert {"tactical", "strategic"} == results["precisions"]["speedup_over_bf16"]["int4"].keys()
    for rows in results["peers"]["tiers"].values():
        assert all(row["engine"]["tokens_per_s"] > 0 < row["eager"]["tokens_per_s"] for row in rows)
    assert all(results["load"][number]["ready_s"] > 0 for number in ("first", "second"))

    # The table without rich came with the run; with rich it has to hold the same rows.
    monkeypatch.syspath_prepend(str(BENCH))
    importlib.import_module("gpu_report").show(body)
    for table in (run.stderr, capsys.readouterr().err):
        assert "decode strategic 4 x 128" in table
        assert "together: tactical" in table


def test_a_part_that_fails_is_recorded_and_the_others_run(
    gpu: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A failure costs its own part and the exit code, and no other part."""

    def broken(_: object) -> dict[str, Any]:
        raise RuntimeError("the device fell off the bus")

    parts = {
        "environment": broken,
        "correctness": lambda _: {"ok": False, "error": float("nan")},
        "speed": lambda _: {"measured": 1},
    }
    monkeypatch.setattr(gpu, "PARTS", parts)
    monkeypatch.setattr(importlib.import_module("gpu_report"), "show", lambda _: None)
    run = gpu.Run("small", "cpu", 60.0, None)
    assert 1 == gpu.main(run, ["resident"], tmp_path / "gpu.json")
    body = json.loads(capsys.readouterr().out)
    found = body["parts"]
    assert "RuntimeError: the device fell off the bus" == found["environment"]["error"]
    assert "broken" in found["environment"]["where"][-1]
    assert {"ok": False, "error": "nan"} == found["correctness"]["result"]
    assert ["environment", "correctness"] == body["bad"]
    assert "ok" == found["speed"]["status"]


def test_a_part_that_hangs_is_stopped(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """A part that does not look at the clock is interrupted when its time and grace are over."""
    monkeypatch.setattr(gpu, "_GRACE_S", 0.0)

    def hanging(_: object) -> dict[str, Any]:
        while True:
            pass

    record = gpu.guarded("environment", hanging, gpu.Run("small", "cpu", 1.0, None))
    assert "failed" == record["status"]
    assert record["error"].startswith("PartTimeout")


@pytest.mark.timeout(300)
def test_the_small_form_puts_the_daemon_under_load(tmp_path: Path) -> None:
    """Both shapes are served and driven through gRPC, cancels leave nothing, a card is measured."""
    output = tmp_path / "gpu.json"
    run = subprocess.run(
        [
            sys.executable, str(BENCH / "gpu.py"), "--shapes", "small", "--device", "cpu",
            "--only", "interference", "daemon", "--output", str(output),
        ],
        capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip
    assert 0 == run.returncode, run.stderr
    result = json.loads(output.read_text())["parts"]["daemon"]["result"]
    assert ([], []) == (result["cut"], result["left_over"])
    assert ["1", "4"] == list(result["mixed"])
    mixed = result["mixed"]["4"]
    assert {"tactical", "strategic", "all"} == mixed["share_of_executor_alone"].keys()
    for tier in ("tactical", "strategic"):
        seen = mixed[tier]["by_the_daemons_metrics"]
        assert all(seen[name]["p50"] > 0 for name in ("first_token_s", "inter_token_s"))
        assert mixed[tier]["tokens_per_s"] > 0
    assert 20 == result["cancels"]["cancels"]
    assert result["calibration"]["card"].startswith("# ")
    assert "20 cancels" in run.stderr


@pytest.mark.usefixtures("gpu")
def test_the_daemons_part_asks_for_everything_that_the_daemon_depends_on() -> None:
    """Else it would start where something is missing, and spend the machine's time on an error."""
    project = tomllib.loads((BENCH.parent / "pyproject.toml").read_text())["project"]
    needed = set(importlib.import_module("gpu_daemon").NEEDED)
    of_module = importlib.metadata.packages_distributions()
    brought = {
        canonicalize_name(name) for module in needed for name in of_module[module.split(".")[0]]
    }
    wanted = {canonicalize_name(Requirement(line).name) for line in project["dependencies"]}
    assert wanted <= brought
    assert all(importlib.util.find_spec(module) for module in needed)
