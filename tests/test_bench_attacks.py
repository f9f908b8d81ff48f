"""The attacks' benchmark: its verdict by table, and its shortest form against a real daemon."""

from __future__ import annotations

import importlib
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BENCH = Path(__file__).parents[1] / "bench"
MIB = 2**20
Script = Callable[[str], ModuleType]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Script:
    """A script of the benchmarks as a module."""
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module


@pytest.mark.parametrize(
    ("worse", "failed"),
    [
        ({}, []),
        ({"jobs": 50, "p99_s": 0.05, "connects": 5, "scrapes": 5}, []),
        ({"jobs": 49}, ["jobs"]),
        ({"jobs": 0}, ["jobs", "p99"]),
        ({"p99_s": 0.051}, ["p99"]),
        ({"connects": 4}, ["connections"]),
        ({"scrapes": 4}, ["scrapes"]),
        ({"rss": 600 * MIB + 256 * MIB}, []),
        ({"rss": 600 * MIB + 256 * MIB + 1}, ["memory"]),
    ],
)
def test_an_attack_is_judged_beside_its_control(
    script: Script, worse: dict[str, Any], failed: list[str]
) -> None:
    """Half of the control's jobs, connections and scrapes, five times its p99, 256 MiB more."""
    attacks = script("attacks")

    def seen(
        jobs: int = 100, p99_s: float = 0.01, connects: int = 10, scrapes: int = 10,
        rss: int = 600 * MIB,
    ) -> object:  # fmt: skip
        return attacks.Seen(
            seconds=1.0, codes=Counter(OK=jobs), job_s=[p99_s] * jobs,
            connects=Counter(OK=connects), scrapes=Counter(OK=scrapes), rss_bytes=rss,
        )  # fmt: skip

    judged = attacks.judge(seen(**worse), seen(), 600 * MIB)
    assert failed == judged["failed"]
    json.dumps(judged, allow_nan=False)


def test_a_control_that_got_nothing_done_excuses_nothing(script: Script) -> None:
    """Nothing beside nothing is no pass."""
    attacks = script("attacks")
    nothing = attacks.Seen(seconds=1.0)
    assert ["jobs", "connections", "p99", "scrapes"] == attacks.judge(nothing, nothing, 0)["failed"]


def test_no_more_is_burned_than_was_asked_for(script: Script) -> None:
    """The control's process leaves the victims what the attack's left them."""
    burned = script("attackers").burn(0.3, 0.5)
    # A busy machine may have less for it.
    assert 0.0 < burned < 0.55


@pytest.mark.slow
def test_an_attack_is_measured_beside_a_control(script: Script, tmp_path: Path) -> None:
    """One short round: the attacker calls, victims work in each phase, another tree's stays."""
    output = tmp_path / "attacks.json"
    other = {"before": {"reset-calls": {"commit": "x", "error": "x", "judged": {"failed": []}}}}
    output.write_text(json.dumps({"trees": other}))
    attacks = script("attacks")
    attacks.main(attacks.Plan(("reset-calls",), seconds=1.0, rounds=1), output)
    trees = json.loads(output.read_text())["trees"]
    assert other["before"] == trees["before"]
    found = trees["here"]["reset-calls"]
    assert [] == found["violations"]
    assert found["attacker"]["endings"]["GIVEN UP"] > 0
    assert not any("Error" in ending for ending in found["attacker"]["endings"])
    assert 0.0 < found["attacker"]["control_cores"] < found["attacker"]["cores"] + 0.1
    assert {"quiet", "attack", "control"} == found["phases"].keys()
    # A busy machine may get no more done in a second; that everything was tried shows.
    for phase in found["phases"].values():
        assert sum(phase["codes"].values()) > 4
        assert sum(phase["own_connection_codes"].values()) > 0
        assert sum(phase["scrapes"].values()) > 0
        assert phase["rss_peak_bytes"] > 100 * MIB
    assert found["phases"]["quiet"]["codes"]["OK"] > 0
    assert found["phases"]["quiet"]["ledger_rows"]["job"] > 0
