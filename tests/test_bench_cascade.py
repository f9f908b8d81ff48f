"""The benchmark of what cascades give, with the bundled pair and few questions."""

from __future__ import annotations

import gzip
import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCH = Path(__file__).parents[1] / "bench"


def test_cascades_are_measured_by_the_daemon(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The scene of the bundled pair; a second run asks nothing again and finds the same."""
    monkeypatch.syspath_prepend(str(BENCH))
    output, kept = tmp_path / "cascade.json", tmp_path / "kept"
    words = ["cascade", "pair", "--tasks", "60", "--kept", str(kept), "--output", str(output)]
    monkeypatch.setattr(sys, "argv", words)
    found: list[dict[str, Any]] = []
    for _ in range(2):
        importlib.import_module("cascade").main()
        found.append(json.loads(output.read_text())["scenes"]["pair"])
        del found[-1]["date"]
    assert found[0] == found[1]
    assert 30 == found[0]["tasks"]
    assert found[0]["atp_of_strategic"]["value"] < 1.3
    assert 0.0 <= found[0]["max_error"] <= 0.9
    assert 60 * 2 == sum(len(file.read_text().splitlines()) for file in kept.glob("answers-*"))
    assert 30 == sum(len(file.read_text().splitlines()) for file in kept.glob("pair-*"))


PROBLEM = {
    "task_id": "T/0",
    "prompt": "import math\n\ndef half(n):\n    '''Half of n, rounded down.'''\n",
    "entry_point": "half",
    "test": "def check(candidate):\n    assert 3 == candidate(7)\n",
}


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        ("Here:\n```python\ndef half(n):\n    return math.floor(n / 2)\n```\nDone.", 0),
        ("    return n // 2\n", 0),
        ("```python\ndef half(n):\n    return n\n```", 1),
        ("I cannot.", 1),
    ],
)
def test_an_answer_is_judged_by_the_problems_own_tests(
    answer: str, code: int, tmp_path: Path
) -> None:
    """A fenced function, or a body alone; what is wrong, or no code, fails."""
    file = tmp_path / "problems.jsonl.gz"
    with gzip.open(file, "wt") as lines:
        lines.write(json.dumps(PROBLEM) + "\n")
    command = [sys.executable, "-I", str(BENCH / "humaneval_check.py"), str(file), "T/0"]
    done = subprocess.run(command, input=answer.encode(), capture_output=True, check=False)
    assert code == done.returncode
