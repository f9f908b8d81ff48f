"""How long a daemon takes from its process's start until every tier serves.

What has to be done: the interpreter reads some thousand modules (torch's alone are most of it,
and twice as slow to read where nothing keeps their bytecode), the tokenizer's vocabulary is read
once for tiers that share it, the books are opened and checked, and every weight is read from the
page cache and put into its place. Each round starts a real daemon with fresh books, and stops it.

Parts: `imports` is until the daemon's first line in its log, `device` opens the device and
measures its bandwidth, `tokenizers`, `ledger` and `listen` are what they say, `weights` is from
then on until the tier serves. Runs of several `--against` trees are interleaved (A B A B ...),
and each waits until the memory of the one before it is nobody's: memory that was just freed is
found in a fraction of the time that other memory takes, and whoever came second would look fast.

Run: python bench/start.py [--rounds 7] [--tactical DIR] [--precision bf16]. Twenty seconds a round.
Writes bench/results/start.json.
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import report
from rich.console import Console
from rich.table import Table

PARTS = ("imports", "device", "tokenizers", "ledger", "listen", "tactical", "strategic")
_LAP = re.compile(r"start: (\w+) took ([0-9.]+) s")
_TIER = re.compile(r"(tactical|strategic): 100% ")
DEADLINE_S = 300.0
REST_S = 4.0
"""Between starts: a Linux guest gives free memory back to its host after two seconds."""


def start(tree: Path, flags: list[str]) -> dict[str, float]:
    """Start a daemon and stop it; seconds by part, `ready` and `cpu_ready` over all of it."""
    time.sleep(REST_S)
    environ = {k: v for k, v in os.environ.items() if not k.startswith("SAGE_FED_")}
    with tempfile.TemporaryDirectory(prefix="sage-fed-start-") as folder:
        begun = time.perf_counter()
        process = subprocess.Popen(
            [
                sys.executable, "-m", "sage_fed.cli", "serve", "--profile", "demo",
                "--listen", "127.0.0.1:0", "--metrics-listen", "127.0.0.1:0",
                "--state-dir", folder, *flags,
            ],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
            env=environ | {"PYTHONPATH": str(tree), "PYTHONUNBUFFERED": "1"}, text=True,
            # `-m` looks into the working directory first.
            cwd=tree,
        )  # fmt: skip
        try:
            return _watch(process, begun)
        finally:
            process.terminate()
            process.wait(60.0)


def _watch(process: subprocess.Popen[str], begun: float) -> dict[str, float]:
    found: dict[str, float] = {}
    log: list[str] = []
    before = begun
    assert process.stderr is not None
    for line in process.stderr:
        now = time.perf_counter()
        log.append(line)
        if lap := _LAP.search(line):
            if not found:
                found["imports"] = now - begun - float(lap[2])
            found[lap[1]] = float(lap[2])
            before = now
        elif tier := _TIER.search(line):
            found[tier[1]] = now - before
            before = now
        elif "ready on " in line:
            found["ready"] = now - begun
            found["cpu_ready"] = _cpu_s(process.pid)
            return found
        if now - begun > DEADLINE_S:
            break
    raise RuntimeError(f"the daemon did not get ready:\n{''.join(log[-20:])}")


def _cpu_s(pid: int) -> float:
    """User and system time of a process until now."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def summary(rounds: list[dict[str, float]]) -> dict[str, Any]:
    """Median, least and most of each part."""
    keys = [key for key in (*PARTS, "ready", "cpu_ready") if key in rounds[0]]
    return {
        key: {
            "median_s": round(statistics.median(r[key] for r in rounds), 3),
            "min_s": round(min(r[key] for r in rounds), 3),
            "max_s": round(max(r[key] for r in rounds), 3),
        }
        for key in keys
    }


def measure(trees: dict[str, Path], cases: dict[str, list[str]], rounds: int) -> dict[str, Any]:
    """Every tree and case in turn, after a round that is not counted."""
    found: dict[tuple[str, str], list[dict[str, float]]] = {}
    for index in range(rounds + 1):
        for case, flags in cases.items():
            for name, tree in trees.items():
                times = start(tree, flags)
                if index:  # round 0 fills the page cache
                    found.setdefault((case, name), []).append(times)
    return {case: {name: summary(found[case, name]) for name in trees} for case in cases}


def show(result: dict[str, Any]) -> None:
    """The table of medians."""
    table = Table("case", "tree", *PARTS, "READY", "CPU", title="seconds, medians")
    for case, by_tree in result.items():
        for name, parts in by_tree.items():
            cells = [
                f"{parts[key]['median_s']:.2f}" if key in parts else "-"
                for key in (*PARTS, "ready", "cpu_ready")
            ]
            table.add_row(case, name, *cells)
    Console(stderr=True, width=140).print(table)


def bytecode_kept() -> bool:
    """Whether the largest import's bytecode is there, which halves it."""
    import importlib.util  # noqa: PLC0415

    spec = importlib.util.find_spec("torch")
    assert spec is not None
    assert spec.origin is not None
    return Path(importlib.util.cache_from_source(spec.origin)).is_file()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tactical", type=Path, help="a checkpoint to start as tactical, too")
    parser.add_argument("--precision", default="bf16", help="of that checkpoint")
    parser.add_argument("--against", type=Path, help="another tree of this project to compare")
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    trees = {"here": Path(__file__).parent.parent}
    if given.against:
        trees["against"] = given.against
    cases: dict[str, list[str]] = {"bundled pair": []}
    if given.tactical:
        cases[given.tactical.name] = [
            "--set", f"tactical.model={given.tactical.absolute()}",
            "--set", f"tactical.precision={given.precision}", "--set", "cpu_threads=0",
        ]  # fmt: skip
    result = measure(trees, cases, given.rounds)
    show(result)
    body = {"rounds": given.rounds, "bytecode_kept": bytecode_kept(), "cases": result}
    report.write("start", body, given.output)
