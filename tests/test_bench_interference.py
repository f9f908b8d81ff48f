"""The interference benchmark in its shortest form, so that it works when it is wanted."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

BENCH = Path(__file__).parent.parent / "bench"


def test_every_scene_is_measured_and_compared(tmp_path: Path) -> None:
    """One short round on the bundled pair writes figures for each scene, tier and comparison."""
    output = tmp_path / "result.json"
    done = subprocess.run(
        [
            sys.executable, str(BENCH / "interference.py"), "--rounds", "1", "--seconds", "2",
            "--strategic-streams", "4", "--threads", "1", "--output", str(output),
        ],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert 0 == done.returncode, done.stderr
    result = json.loads(output.read_text())
    assert result == json.loads(done.stdout.splitlines()[-1])
    tiers = {name: set(scene) for name, scene in result["scenes"].items()}
    both = {"tactical", "strategic"}
    assert {
        "tactical_alone": {"tactical"}, "strategic_alone": {"strategic"},
        "together": both, "apart": both,
    } == tiers  # fmt: skip
    for scene in result["scenes"].values():
        for figures in scene.values():
            assert 0 < figures["fed_tokens_per_s"]["median"]
            assert 0 < figures["longest_step_ms"]["median"]
    assert 1 == result["scenes"]["together"]["tactical"]["inter_token_p99_ms"]["rounds"]
    assert None not in result["compared"].values()
