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
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from random import Random

import psutil
import report
from driven_daemon import START_S, settle, wait_ready
from rich.console import Console
from rich.table import Table
from stress_clients import Client, Tally

from sage_fed.cli.demo import DemoDaemon, Endpoint
from sage_fed.cli.options import ledger_file
from sage_fed.ledger import check

POOR_TOKEN = "stress-poor"
FLAGS = (
    "--set", "budget.initial_atp=900000000", "--set", "budget.capacity_atp=1000000000",
    "--set", "accounts.poor.budget.initial_atp=200",
    "--set", "accounts.poor.budget.capacity_atp=200",
    "--set", "accounts.poor.budget.refill_atp_per_s=50",
    "--set", "accounts.poor.budget.strategic_floor_atp=20",
    "--log-level", "warning",
)  # fmt: skip
GROWTH_SHARE = 0.05
"""How much of its size after warm-up the process may have grown by at the end."""


async def main(seconds: float, num_clients: int, seed: int, output: Path | None) -> int:
    """Run, check, report; the exit code."""
    with tempfile.TemporaryDirectory(prefix="sage-fed-stress-") as folder:
        state_dir = Path(folder)
        tokens = state_dir / "tokens.toml"
        digest = hashlib.sha256(POOR_TOKEN.encode()).hexdigest()
        tokens.write_text(f'[[token]]\nsha256 = "{digest}"\naccount = "poor"\nrole = "user"\n')
        daemon = DemoDaemon(state_dir, *FLAGS, "--set", f"auth.tokens_file={tokens}")
        try:
            endpoint = daemon.endpoint(START_S)
            await wait_ready(endpoint)
            tally, memory = await storm(daemon, endpoint, seconds, num_clients, seed)
            leftovers = await settle(endpoint, state_dir)
            tally.violations += leftovers
        finally:
            code = daemon.stop(60.0)
        if code != 0:
            tally.violations.append(f"the daemon left with {code}: {daemon.log()}")
        books = check(ledger_file(state_dir))
        tally.violations += books.violations
        if books.open_holds:
            tally.violations.append(f"{books.open_holds} holds are open in the books")
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
    daemon: DemoDaemon, endpoint: Endpoint, seconds: float, num_clients: int, seed: int
) -> tuple[Tally, list[tuple[float, int]]]:
    """All clients until the time is over; meanwhile the daemon's memory, once a second."""
    tally = Tally()
    memory: list[tuple[float, int]] = []
    until = time.monotonic() + seconds
    process = psutil.Process(daemon.pid)

    async def watch() -> None:
        while True:
            daemon.check()
            memory.append((time.monotonic(), process.memory_info().rss))
            await asyncio.sleep(1.0)

    watcher = asyncio.create_task(watch())
    try:
        async with asyncio.TaskGroup() as group:
            for index in range(num_clients):
                token = POOR_TOKEN if index % 8 == 7 else None
                client = Client(endpoint.listen, Random(f"{seed} {index}"), tally, token)
                group.create_task(client.run(until))
    finally:
        watcher.cancel()
    if watcher.done() and not watcher.cancelled() and watcher.exception():
        tally.violations.append(f"the daemon died: {watcher.exception()}")
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
