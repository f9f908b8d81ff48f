"""Makes the bundled pair's quality card: how often its answers are wrong, and what tells so.

    python bench/pair/reliability.py

Writes tasks of the test split (never trained on, in any wording) as a file that anyone could have
written, starts a demo daemon and lets `sage-fed calibrate --quality` ask both tiers. The card is
fitted to some of them; two families are held out and reported apart: `fresh`, more tasks of the
same kinds, and the kind of question that the pair was never trained on.
Writes `sage_fed/cards/quality/`, replacing the card that is there, and
`bench/results/pair_reliability.json`.
Does not know: how anything is asked, checked or fitted.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tasks import FAMILIES, HELD_OUT_FAMILY, Task, task_at

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import report

from sage_fed.cards.rate_card import BUNDLED_CARDS
from sage_fed.cli.demo import DemoDaemon
from sage_fed.client import wait_serving
from sage_fed.core import UATP_PER_ATP

CARDS = BUNDLED_CARDS / "quality"
SEED = 18
_MAX_NEW_TOKENS = 32
_START_S, _STOP_S, _RUN_S = 120.0, 60.0, 3600.0
_BALANCE_ATP = 10_000_000


def tasks(num_fitted: int, num_fresh: int, num_unseen: int) -> Iterator[dict[str, Any]]:
    """Yield the lines of a file of tasks, no prompt twice, all families and grades alike."""
    seen: set[str] = set()
    parts = (
        (num_fitted, tuple(FAMILIES), ""),
        (num_fresh, tuple(FAMILIES), "fresh"),
        (num_unseen, (HELD_OUT_FAMILY.name,), HELD_OUT_FAMILY.name),
    )
    for part, (wanted, families, held_out) in enumerate(parts):
        index, found = 0, 0
        while found < wanted:
            task = task_at(SEED + part, index, "test", families)
            index += 1
            if task.prompt not in seen:
                seen.add(task.prompt)
                found += 1
                yield line_of(task, held_out)


def line_of(task: Task, held_out: str) -> dict[str, Any]:
    """Return a task as a line of the file."""
    line = {
        "prompt": task.prompt,
        "check": {"exact": task.answer},
        "class": task.family,
        "max_new_tokens": _MAX_NEW_TOKENS,
    }
    return line | ({"held_out": held_out} if held_out else {})


def calibrate(file: Path, state_dir: Path, parallel: int) -> dict[str, Any]:
    """Ask a fresh demo daemon; returns what the command says of its card."""
    balance = [f"budget.{key}={_BALANCE_ATP}" for key in ("initial_atp", "capacity_atp")]
    daemon = DemoDaemon(state_dir, *(word for one in balance for word in ("--set", one)))
    try:
        endpoint = daemon.endpoint(_START_S)
        for service in ("tactical", "strategic"):
            if not wait_serving(endpoint.listen, service, _START_S):
                raise SystemExit(f"the {service} tier did not get ready:\n{daemon.log()}")
        done = subprocess.run(
            [
                *(sys.executable, "-m", "sage_fed.cli", "calibrate", "--quality", str(file)),
                *("--parallel", str(parallel), "--json"),
                *("--state-dir", str(state_dir), "--address", endpoint.listen),
            ],
            env={key: value for key, value in os.environ.items() if "SAGE_FED" not in key},
            stdout=subprocess.PIPE,
            text=True,
            timeout=_RUN_S,
            check=True,
        )
    finally:
        daemon.stop(_STOP_S)
    return dict(json.loads(done.stdout))


def main() -> int:
    """Make the card, keep it and its figures, end with one JSON line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--num-fitted", type=int, default=3300)
    parser.add_argument("--num-fresh", type=int, default=2200)
    parser.add_argument("--num-unseen", type=int, default=300)
    parser.add_argument("--parallel", type=int, default=8)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="sage-fed-reliability-") as folder:
        state_dir = Path(folder)
        file = state_dir / "tasks.jsonl"
        lines = tasks(args.num_fitted, args.num_fresh, args.num_unseen)
        file.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
        made = calibrate(file, state_dir, args.parallel)
        CARDS.mkdir(exist_ok=True)
        for stale in CARDS.glob("demo-*"):
            stale.unlink()
        version = made["version"].removesuffix("-2")
        for suffix in (".toml", ".md"):
            text = Path(made["path"]).with_suffix(suffix).read_text()
            (CARDS / f"{version}{suffix}").write_text(text.replace(made["version"], version))
    kept = ("classes", "left_out", "held_out")
    result = {"card": version, "uatp_per_atp": UATP_PER_ATP} | {key: made[key] for key in kept}
    report.write("pair_reliability", result, None)
    return 0


if __name__ == "__main__":
    sys.exit(main())
