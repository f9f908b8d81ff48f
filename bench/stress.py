"""64 clients at once against a real demo daemon: does anything stick, leak or go missing?

Each client picks one behaviour after another: reads, cancels, disconnects, slow reading, bad
requests, deadlines, replays. One client in eight spends from an account that is nearly empty.
Afterwards, through the daemon's own eyes and from outside: no job, no KV token, no hold is left,
the metrics agree, the process has not grown, it leaves with 0, and the books balance.

Run: python bench/stress.py [--seconds 60] [--clients 64]. Exit code 1 on any violation.
Writes bench/results/stress.json.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from random import Random

import psutil
import report
from behaviours import FLAGS, Client, Tally, crowd
from driven_daemon import Driven, driven
from rich.console import Console
from rich.table import Table

POOR_TOKEN = "stress-poor"
GROWTH_SHARE = 0.05
"""How much of its size after warm-up the process may have grown by at the end."""


async def main(seconds: float, num_clients: int, seed: int, output: Path | None) -> int:
    """Run, check, report; the exit code."""
    digest = hashlib.sha256(POOR_TOKEN.encode()).hexdigest()
    poor = f'[[token]]\nsha256 = "{digest}"\naccount = "poor"\nrole = "user"\n'
    async with driven(*FLAGS, tokens=poor) as run:
        tally, memory = await storm(run, seconds, num_clients, seed)
        books = await run.finish()
    tally.violations += run.violations
    growth, slope = growth_of(memory)
    if growth > GROWTH_SHARE * memory_after_warm_up(memory):
        tally.violations.append(f"the process grew by {growth / 2**20:.1f} MiB")
    show(tally)
    Console(stderr=True).print(
        f"{sum(tally.endings.values())} requests, {tally.tokens} tokens read; memory "
        f"{memory_after_warm_up(memory) / 2**20:.0f} MiB after warm-up, {growth / 2**20:+.1f} MiB "
        f"at the end, {slope * 60 / 2**20:+.2f} MiB/min",
        highlight=False,
    )
    result = {
        "seconds": seconds,
        "clients": num_clients,
        "seed": seed,
        "requests": sum(tally.endings.values()),
        "endings": {f"{name}: {code}": n for (name, code), n in sorted(tally.endings.items())},
        "tokens_read": tally.tokens,
        "streams_finished": tally.finished_streams,
        "read_seconds": report.percentiles(tally.seconds),
        "rss_after_warm_up_bytes": round(memory_after_warm_up(memory)),
        "rss_growth_bytes": round(growth),
        "rss_slope_bytes_per_min": round(slope * 60),
        "ledger": {"jobs": books.jobs, "entries": books.entries, "open_holds": books.open_holds},
        "violations": tally.violations[:100],
    }
    report.write("stress", result, output)
    return 1 if tally.violations else 0


async def storm(
    run: Driven, seconds: float, num_clients: int, seed: int
) -> tuple[Tally, list[tuple[float, int]]]:
    """All clients until the time is over; meanwhile the daemon's memory, once a second."""
    tally = Tally()
    memory: list[tuple[float, int]] = []
    process = psutil.Process(run.daemon.pid)

    def look() -> None:
        run.daemon.check()
        memory.append((time.monotonic(), process.memory_info().rss))

    clients = [
        Client(
            run.endpoint.listen,
            Random(f"{seed} {index}"),
            tally,
            POOR_TOKEN if index % 8 == 7 else None,
        )
        for index in range(num_clients)
    ]
    tally.violations += await crowd(clients, time.monotonic() + seconds, look, 1.0)
    return tally, memory


def memory_after_warm_up(memory: Sequence[tuple[float, int]]) -> float:
    """Median size in the second fifth of the run."""
    fifth = max(1, len(memory) // 5)
    return statistics.median(rss for _, rss in memory[fifth : 2 * fifth] or memory)


def growth_of(memory: Sequence[tuple[float, int]]) -> tuple[float, float]:
    """Bytes from after warm-up to the last fifth, and the slope after warm-up in bytes/s."""
    fifth = max(1, len(memory) // 5)
    settled = memory[fifth:]
    last = statistics.median(rss for _, rss in memory[-fifth:])
    times, sizes = [at for at, _ in settled], [float(rss) for _, rss in settled]
    slope = statistics.linear_regression(times, sizes).slope if len(set(times)) > 1 else 0.0
    return last - memory_after_warm_up(memory), slope


def show(tally: Tally) -> None:
    """Endings by behaviour, then the violations."""
    table = Table("behaviour", "ending", title="stress: how requests ended")
    table.add_column("number", justify="right")
    for (name, code), number in sorted(tally.endings.items()):
        table.add_row(name, code, str(number))
    console = Console(stderr=True)
    console.print(table)
    for violation in tally.violations[:20]:
        console.print(f"VIOLATION: {violation}", markup=False)
    if not tally.violations:
        console.print("nothing stuck, nothing leaked, the books balance")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    sys.exit(asyncio.run(main(given.seconds, given.clients, given.seed, given.output)))
