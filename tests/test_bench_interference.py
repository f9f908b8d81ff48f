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
        "strategic_beside_idle": {"strategic"}, "together": both, "together_speculating": both,
        "apart": both,
    } == tiers  # fmt: skip
    for scene in result["scenes"].values():
        for figures in scene.values():
            assert {"fed_tokens_per_s", "output_tokens_per_s", "longest_step_ms"} <= figures.keys()
            assert 1 == figures["busy_share"]["rounds"]
    # What a busy machine did not deliver in two seconds is None, but it is there.
    assert {
        "tactical_inter_token_p99_together_times", "tactical_first_token_p99_apart_times",
        "strategic_fed_tokens_per_s_together_kept", "strategic_fed_tokens_per_s_beside_idle_kept",
    } <= result["compared"].keys()  # fmt: skip
