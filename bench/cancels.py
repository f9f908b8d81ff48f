"""10,000 jobs whose clients leave at a random moment: what stays behind, and when does work stop?

Clients cancel, close their connection or let a deadline pass, anywhere from before the admission
to after the last token. Afterwards, through the daemon's own eyes: no job, no KV token, no hold is
left, and the books balance. Of each job that was stopped, the time from the client's leaving to
the end of its hold in the books is compared with one step of the slower tier plus 50 ms: the books
come last, so the device stopped before.

Run: python bench/cancels.py [--count 10000] [--clients 16]. Exit code 1 on anything left behind.
Writes bench/results/cancels.json.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from random import Random

import grpc
import report
from behaviours import FLAGS, Client, Tally
from driven_daemon import START_S, driven
from load_generator import closed_loop
from rich.console import Console

from sage_fed.cli import top
from sage_fed.cli.options import ledger_file
from sage_fed.ledger.ledger_files import snapshot

ALLOWED_S = 0.05
"""Beyond one step, from a client's leaving to the end of its job in the books."""

LONGEST_S = 0.3
"""The latest moment at which a client leaves."""

KINDS = ("cancel", "cancel", "cancel", "disconnect", "deadline")


@dataclass
class Left:
    """Whom the clients left, when (Unix seconds), and how their calls ended."""

    at_s: dict[str, float] = field(default_factory=dict)
    endings: Counter[str] = field(default_factory=Counter)


async def main(count: int, num_clients: int, seed: int, output: Path | None) -> int:
    """Run, check, report; the exit code."""
    left = Left()
    async with driven(*FLAGS) as run:
        began_s = time.monotonic()
        await storm(run.endpoint.listen, count, num_clients, seed, left)
        elapsed_s = time.monotonic() - began_s
        page = await asyncio.to_thread(top.fetch, run.endpoint.metrics_url)
        books = await run.finish()
        stops = stop_times(ledger_file(run.state_dir), left)
    violations = run.violations
    step_s = longest_step_s(page)
    late = sum(stop > step_s + ALLOWED_S for stop in stops)
    result = {
        "count": count,
        "clients": num_clients,
        "seed": seed,
        "seconds": round(elapsed_s, 1),
        "endings": dict(sorted(left.endings.items())),
        "leaked": violations[:100],
        "jobs_in_the_books": books.jobs,
        "stop_seconds": report.percentiles(stops),
        "longest_step_seconds_at_most": step_s,
        "stopped_later_than_step_and_50_ms": late,
    }
    report.write("cancels", result, output)
    console = Console(stderr=True)
    for violation in violations[:20]:
        console.print(f"VIOLATION: {violation}", markup=False)
    console.print(
        f"{count} clients left in {elapsed_s:.0f} s, {len(violations)} leaks; of {len(stops)} "
        f"stopped jobs {late} took longer than a step ({step_s * 1e3:.0f} ms) and 50 ms",
        highlight=False,
    )
    return 1 if violations else 0


async def storm(address: str, count: int, num_clients: int, seed: int, left: Left) -> None:
    """Let `count` jobs be left."""
    clients = [Client(address, Random(f"{seed} {n}"), Tally()) for n in range(num_clients)]
    await closed_loop([partial(leave, client, left) for client in clients], iter(range(count)))
    for client in clients:
        await client.drop()


async def leave(client: Client, left: Left, _: int) -> None:
    """Ask, and be gone after a while."""
    chance = client.random
    kind, moment_s = chance.choice(KINDS), chance.uniform(0.0, LONGEST_S) * chance.random()
    timeout_s = moment_s + 1e-3 if kind == "deadline" else 60.0
    async with asyncio.timeout(START_S):
        call = client.stream(client.job(chance.randint(1, 400)), timeout_s)
        reading = asyncio.create_task(follow(call))
        await asyncio.wait({reading}, timeout=moment_s)
        gone_s = time.time()
        if kind == "cancel":
            call.cancel()
        elif kind == "disconnect":
            await client.drop()
        job_id, ending = await reading
    left.endings[f"{kind}: {ending}"] += 1
    if job_id and ending in ("CANCELLED", "DEADLINE_EXCEEDED"):
        left.at_s[job_id] = gone_s


async def follow(call: grpc.aio.UnaryStreamCall) -> tuple[str, str]:
    """The job's id, "" where it never began, and how the call ended."""
    job_id = ""
    try:
        async for response in call:
            if response.WhichOneof("event") == "started":
                job_id = response.started.job_id
    except grpc.aio.AioRpcError as error:
        return job_id, error.code().name
    except asyncio.CancelledError:
        with contextlib.suppress(asyncio.CancelledError):
            return job_id, "CANCELLED" if call.cancelled() else "GONE"
    return job_id, "OK"


def stop_times(ledger: Path, left: Left) -> list[float]:
    """Seconds from each client's leaving to the end of its job's hold, where it came after."""
    with snapshot(ledger) as (db, _):
        ended = dict(
            db.execute(
                "SELECT job_id, max(time_ns) FROM entry JOIN job USING (job_id) "
                "WHERE outcome = 'cancelled' OR state = 'voided' GROUP BY job_id"
            )
        )
    stops = [ended[job_id] / 1e9 - at_s for job_id, at_s in left.at_s.items() if job_id in ended]
    return [stop_s for stop_s in stops if stop_s > 0]


def longest_step_s(page: str) -> float:
    """The upper bound of the slowest step's bucket, over both tiers."""
    counts: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for sample in top.Page.read(page, 0.0).having("sage_fed_engine_step_seconds_bucket"):
        key = sample.labels["tier"], sample.labels["kind"]
        counts.setdefault(key, []).append((float(sample.labels["le"]), sample.value))
    longest = 0.0
    for buckets in counts.values():
        total = buckets[-1][1]
        if total:
            longest = max(longest, next(bound for bound, count in buckets if count == total))
    return longest


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    sys.exit(asyncio.run(main(given.count, given.clients, given.seed, given.output)))
