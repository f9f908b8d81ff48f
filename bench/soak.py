"""Half an hour of mixed traffic: does anything grow, and does anything get slower?

The clients of the stress run, fewer and with pauses: they read, cancel, disconnect, read slowly,
ask for nonsense, meet deadlines and repeat themselves. Every few seconds the daemon's resident
memory, its file descriptors and its threads are noted, and of every window the latency of whole
answers. After a warm-up of a fifth none of them may have a slope that matters.

What is expected to grow, and then not any more: the index of the prefix cache, up to a key for
each block of `kv_cache_bytes`, and SQLite's page cache, up to 2 MB.

Run: python bench/soak.py [--seconds 1800] [--clients 8]. Exit code 1 on any violation.
Writes bench/results/soak.json.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any

import psutil
import report
from behaviours import FLAGS, Client, Tally, crowd
from driven_daemon import Driven, driven
from rich.console import Console

from sage_fed.cli.options import ledger_file

WARM_UP = 0.2
"""Of the run, before anything is judged."""

MOST_MIB_PER_MIN = 0.5
MOST_FDS, MOST_THREADS = 8, 1
"""How far the last fifth may be above the first one after the warm-up."""

SLOWER = 1.25
"""How much slower the last windows' median answer may be than the first ones'."""


@dataclass(frozen=True)
class Sample:
    """The daemon at one instant."""

    at_s: float
    rss_bytes: int
    num_fds: int
    num_threads: int


@dataclass(frozen=True)
class Plan:
    """How long, by how many clients, each with a pause of how long between its jobs."""

    seconds: float = 1800.0
    clients: int = 8
    pause_s: float = 0.2
    seed: int = 1
    kv_cache: str = "16MiB"


async def main(plan: Plan, output: Path | None) -> int:
    """Run, check, report; the exit code."""
    flags = (*FLAGS, "--set", "ledger.result_retention_s=60")
    for tier in ("tactical", "strategic"):
        flags += ("--set", f"{tier}.kv_cache_bytes={plan.kv_cache}")
    async with driven(*flags) as run:
        tally, samples, windows = await soak(run, plan)
        books = await run.finish()
        ledger_bytes = ledger_file(run.state_dir).stat().st_size
    tally.violations += run.violations
    figures, grown = judge(samples, windows)
    tally.violations += grown
    result = {
        **asdict(plan),
        "requests": sum(tally.endings.values()),
        "tokens_read": tally.tokens,
        **figures,
        "ledger": {
            "jobs": books.jobs,
            "entries": books.entries,
            "open_holds": books.open_holds,
            "bytes": ledger_bytes,
        },
        "violations": tally.violations[:100],
    }
    report.write("soak", result, output)
    console = Console(stderr=True)
    for violation in tally.violations[:20]:
        console.print(f"VIOLATION: {violation}", markup=False)
    console.print(f"{result['requests']} requests; {figures}", highlight=False, markup=False)
    return 1 if tally.violations else 0


async def soak(run: Driven, plan: Plan) -> tuple[Tally, list[Sample], list[list[float]]]:
    """All clients until the time is over; what was seen of the daemon, and answers by window."""
    tally = Tally()
    samples: list[Sample] = []
    windows: list[list[float]] = []
    began_s = time.monotonic()
    process = psutil.Process(run.daemon.pid)

    def look() -> None:
        run.daemon.check()
        with process.oneshot():
            samples.append(
                Sample(
                    time.monotonic() - began_s,
                    process.memory_info().rss,
                    process.num_fds(),
                    process.num_threads(),
                )
            )
        windows.append(tally.seconds[sum(map(len, windows)) :])

    clients = [
        Client(run.endpoint.listen, Random(f"{plan.seed} {index}"), tally, pause_s=plan.pause_s)
        for index in range(plan.clients)
    ]
    tally.violations += await crowd(
        clients, began_s + plan.seconds, look, max(0.5, plan.seconds / 360)
    )
    return tally, samples, windows


def judge(
    samples: Sequence[Sample], windows: Sequence[Sequence[float]]
) -> tuple[dict[str, Any], list[str]]:
    """The slopes after the warm-up, and what is wrong with them."""
    settled = samples[int(len(samples) * WARM_UP) :]
    first, last = parts(settled)
    minutes = [sample.at_s / 60 for sample in settled]
    rss_mib = [sample.rss_bytes / 2**20 for sample in settled]
    slope = statistics.linear_regression(minutes, rss_mib).slope if len(settled) > 1 else 0.0
    late = windows[int(len(windows) * WARM_UP) :]
    early_s, late_s = ([s for window in part for s in window] for part in parts(late))
    figures = {
        "rss_mib": {
            "after_warm_up": round(median(first, "rss_bytes") / 2**20, 1),
            "at_the_end": round(median(last, "rss_bytes") / 2**20, 1),
            "per_minute": round(slope, 3),
        },
        "fds": {"after_warm_up": median(first, "num_fds"), "at_the_end": median(last, "num_fds")},
        "threads": {
            "after_warm_up": median(first, "num_threads"),
            "at_the_end": median(last, "num_threads"),
        },
        "answer_seconds_after_warm_up": report.percentiles(early_s),
        "answer_seconds_at_the_end": report.percentiles(late_s),
        "rss_mib_by_time": [
            (round(s.at_s), round(s.rss_bytes / 2**20, 1))
            for s in samples[:: len(samples) // 40 or 1]
        ],
    }
    wrong = []
    if slope > MOST_MIB_PER_MIN:
        wrong.append(f"the process grows by {slope:.2f} MiB/min")
    if median(last, "num_fds") > median(first, "num_fds") + MOST_FDS:
        wrong.append("file descriptors grow")
    if median(last, "num_threads") > median(first, "num_threads") + MOST_THREADS:
        wrong.append("threads grow")
    if min(len(early_s), len(late_s)) > 20 and statistics.median(
        late_s
    ) > SLOWER * statistics.median(early_s):
        wrong.append("answers become slower")
    return figures, wrong


def parts(series: Sequence[Any]) -> tuple[Sequence[Any], Sequence[Any]]:
    """The first and the last quarter."""
    quarter = max(1, len(series) // 4)
    return series[:quarter], series[-quarter:]


def median(samples: Sequence[Sample], of: str) -> float:
    """Of one field."""
    return float(statistics.median(getattr(sample, of) for sample in samples))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--seconds", type=float, default=Plan.seconds)
    parser.add_argument("--clients", type=int, default=Plan.clients)
    parser.add_argument("--pause-seconds", type=float, default=Plan.pause_s)
    parser.add_argument("--seed", type=int, default=Plan.seed)
    parser.add_argument("--kv-cache", default=Plan.kv_cache, help="of each tier")
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    asked = Plan(given.seconds, given.clients, given.pause_seconds, given.seed, given.kv_cache)
    sys.exit(asyncio.run(main(asked, given.output)))
