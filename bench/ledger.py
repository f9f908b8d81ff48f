"""How many holds a second the ledger acknowledges, durably.

    python bench/ledger.py [--seconds 3] [--directory DIR]

The physics: with `synchronous=FULL` an acknowledged hold has been through one `fsync`, so one
client alone is bound by the disk's sync latency, and N clients share a sync as far as group
commit puts them together. The figure to look at is therefore operations per commit beside the
rate. Measures holds through the real asyncio facade, thread and file, and a bare
`write + fsync` of one WAL frame on the same disk as the limit.
Run it on the disk that the daemon will use: a RAM-backed folder makes every figure meaningless.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import report

from sage_fed.ledger import AccountTerms, HoldRequest, Ledger, RequestKey

CONCURRENCY = (1, 16, 128)
ROUNDS = 5
WAL_FRAME_BYTES = 4096 + 24


def syncs_per_s(directory: Path, seconds: float) -> float:
    """How often one WAL frame can be appended and synced; the limit of one client alone."""
    descriptor, name = tempfile.mkstemp(dir=directory)
    frame, count = bytes(WAL_FRAME_BYTES), 0
    try:
        began_s = time.perf_counter()
        while time.perf_counter() - began_s < seconds:
            os.write(descriptor, frame)
            os.fdatasync(descriptor)
            count += 1
        return count / (time.perf_counter() - began_s)
    finally:
        os.close(descriptor)
        Path(name).unlink()


async def measure(path: Path, concurrency: int, seconds: float) -> dict[str, float]:
    """One round on fresh books: holds a second, latency percentiles, holds a commit."""
    groups: list[int] = []
    latencies_s: list[float] = []
    ledger = await Ledger(path, on_commit=lambda size, _: groups.append(size)).open()
    await ledger.ensure_account("bench", AccountTerms(2**50, initial_uatp=2**50))
    numbers, key = itertools.count(), RequestKey("bench")

    async def client(until_s: float) -> None:
        while time.perf_counter() < until_s:
            began_s = time.perf_counter()
            await ledger.hold(
                key, lambda _: HoldRequest(f"job-{next(numbers)}", 1000, "card", "tactical")
            )
            latencies_s.append(time.perf_counter() - began_s)

    async def load(for_s: float) -> float:
        began_s = time.perf_counter()
        await asyncio.gather(*(client(began_s + for_s) for _ in range(concurrency)))
        return time.perf_counter() - began_s

    await load(seconds / 5)  # Warm-up: page cache, statement cache, WAL file.
    groups.clear()
    latencies_s.clear()
    elapsed_s = await load(seconds)
    rates = {
        "holds_per_s": len(latencies_s) / elapsed_s,
        "holds_per_commit": sum(groups) / len(groups),
        "p50_ms": statistics.median(latencies_s) * 1000,
        "p99_ms": statistics.quantiles(latencies_s, n=100)[98] * 1000,
    }
    await ledger.close()
    return rates


def main() -> None:
    """Measure, print a table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=1.0, help="of each round")
    parser.add_argument("--directory", type=Path, help="on the disk to measure")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(dir=arguments.directory) as folder:
        limit = syncs_per_s(Path(folder), arguments.seconds)
        print(f"one frame written and synced: {limit:8.0f}/s")
        print("clients  holds/s   (spread)           holds/commit   p50 ms   p99 ms")
        for concurrency in CONCURRENCY:
            rounds = [
                asyncio.run(
                    measure(Path(folder) / f"{concurrency}-{n}.db", concurrency, arguments.seconds)
                )
                for n in range(ROUNDS)
            ]
            row: dict[str, Any] = {
                key: round(statistics.median(each[key] for each in rounds), 3) for key in rounds[0]
            }
            rates = [each["holds_per_s"] for each in rounds]
            row |= {"clients": concurrency, "spread": [round(min(rates)), round(max(rates))]}
            rows.append(row)
            print(
                f"{concurrency:7} {row['holds_per_s']:8.0f}   {row['spread']!s:18} "
                f"{row['holds_per_commit']:12.1f} {row['p50_ms']:8.2f} {row['p99_ms']:8.2f}"
            )
    result = {"synchronous": "full", "rounds": ROUNDS, "syncs_per_s": round(limit), "results": rows}
    report.write("ledger", result, arguments.output)


if __name__ == "__main__":
    main()
