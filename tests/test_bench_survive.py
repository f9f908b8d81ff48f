"""The benchmarks of what production does to a daemon, with counts that CI has time for.

Each starts a real daemon, or a real ledger's writer, and fails on anything that it leaves behind;
their full counts and their times are in `bench/results/`.
"""

from __future__ import annotations

import asyncio
import importlib
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BENCH = Path(__file__).parents[1] / "bench"
Script = Callable[[str], ModuleType]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Script:
    """A script of the benchmarks as a module."""
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module


def result(path: Path) -> dict[str, Any]:
    body: dict[str, Any] = json.loads(path.read_text())
    return body


def test_nothing_is_left_of_clients_that_leave_at_random(script: Script, tmp_path: Path) -> None:
    """600 cancels, disconnects and deadlines: no job, no KV token and no hold stays."""
    output = tmp_path / "cancels.json"
    assert 0 == asyncio.run(script("cancels").main(600, 12, 7, output))
    seen = result(output)
    assert 600 == sum(seen["endings"].values())
    assert [] == seen["leaked"]
    # Many were stopped in the middle, or it would be a test of something else.
    assert seen["stop_seconds"]["n"] > 20


def test_no_kill_of_the_writer_loses_what_it_acknowledged(script: Script, tmp_path: Path) -> None:
    """30 kills at random instants."""
    output = tmp_path / "kills.json"
    assert 0 == script("kills").main(30, 1, output)
    seen = result(output)
    assert [] == seen["lost_or_unbalanced"]
    assert all(seen["acknowledged"].values())
    assert seen["holds_voided_after_kills"] > 0


def test_an_overloaded_daemon_refuses_in_words_and_recovers(script: Script, tmp_path: Path) -> None:
    """Ten times its capacity for some seconds: every refusal says when to come back."""
    output = tmp_path / "overload.json"
    overload = script("overload")
    jobs = overload.Jobs(48, None, "fp32", mixed=True)
    assert 0 == asyncio.run(overload.main(4.0, 10.0, 2.0, jobs, output))
    seen = result(output)["overloaded"]["codes"]
    assert {"OK", "RESOURCE_EXHAUSTED"} == seen.keys()
    assert seen["RESOURCE_EXHAUSTED"] > seen["OK"]


def test_no_message_is_answered_with_an_error_of_ours(script: Script, tmp_path: Path) -> None:
    """600 messages made from the descriptors, over every RPC."""
    output = tmp_path / "fuzz.json"
    assert 0 == script("fuzz").main(600, 3, output)
    seen = result(output)
    assert [] == seen["violations"]
    assert {"OK", "INVALID_ARGUMENT"} <= seen["codes"].keys()
    assert seen["jobs_in_the_books"] > 2


def test_a_soak_judges_what_it_saw(script: Script, tmp_path: Path) -> None:
    """Ten seconds of mixed traffic leaves nothing behind, and nobody is answered wrongly."""
    output = tmp_path / "soak.json"
    soak = script("soak")
    asyncio.run(soak.main(soak.Plan(10.0, 6, 0.05, 1, "4MiB"), output))
    seen = result(output)
    # A slope over ten seconds is noise; half an hour of it is in bench/results.
    grown = ("grows by", "become slower")
    assert [] == [v for v in seen["violations"] if not any(word in v for word in grown)]
    assert seen["requests"] > 30
    assert 0 == seen["ledger"]["open_holds"]
