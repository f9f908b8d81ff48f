"""Tokens per second through the daemon's gRPC streaming, against the executor and the engine alone.

What is added to a step of the engine: the scheduler and the hand-over on the device's thread,
while the device waits; and for each token a task switch, a decode, a message and a write on the
event loop, which share the machine's cores with the device's threads where the device is a CPU.
A real 0.5B's step takes tens of milliseconds, the bundled pair's half a millisecond: the second is
the hard case, in which Python is what is measured.

The same number of sequences starts at once, the same prompts and settings every way, in
interleaved rounds (A B A B ...). Tokens per second count from the start of the first to the end
of the last, prefill included. The client is `LeanClient`, in a process of its own; the engine
and the executor run in this process, the daemon in another, each idle while another is measured.

Run: python bench/daemon_overhead.py [--model DIR --precision bf16] [--quick].
Writes bench/results/daemon_overhead_<model>.json.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import statistics
import tempfile
from pathlib import Path
from typing import Any

import report
import torch
import uvloop
from direct import RICH, Alone, check, job, prompts, thread_cpu_s
from driven_daemon import START_S, wait_ready
from load_generator import METHOD, LeanClient, Run
from rich.console import Console
from rich.table import Table

from sage_fed.cli.demo import DemoDaemon
from sage_fed.settings import load_settings

WAYS = ("engine", "executor", "daemon")


def spent(pid: int, before: dict[int, float], run: Run, num_tokens: int) -> dict[str, float]:
    """Processor time per token since `before`, in microseconds, by who spent it."""
    rest = {tid: s - before.get(tid, 0.0) for tid, s in thread_cpu_s(pid).items()}
    loop = rest.pop(pid)
    device = max(rest.values(), default=0.0)
    parts = {"client": run.cpu_s, "event_loop": loop, "busiest_other_thread": device}
    parts["all_other_threads"] = sum(rest.values()) - device
    return {name: round(seconds / num_tokens * 1e6, 1) for name, seconds in parts.items()}


async def measure(given: argparse.Namespace, flags: list[str]) -> list[dict[str, Any]]:
    """Interleaved rounds of the three ways, after one that is not counted."""
    named = {"profile": "demo"} | dict(f.split("=", 1) for f in flags[1::2])
    settings = load_settings(named, {"HOME": str(Path.home())}, None).settings
    torch.set_num_threads(settings.cpu_threads or torch.get_num_threads())
    alone = Alone(settings)
    await alone.start()
    rates: dict[tuple[str, int], list[float]] = {}
    costs: dict[int, list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory(prefix="sage-fed-overhead-") as folder:
        daemon = DemoDaemon(Path(folder), "--log-level", "warning", *flags)
        try:
            endpoint = daemon.endpoint(START_S)
            await wait_ready(endpoint)
            client = LeanClient(endpoint.listen)
            for index, many in itertools.product(range(given.rounds + 1), given.at_once):
                num_new = given.tokens[given.at_once.index(many)]
                texts = prompts(many, 2 * index + (many > 1))
                asked = [alone.encode(text) for text in texts]
                took = {"engine": await asyncio.to_thread(alone.run_engine, asked, num_new)}
                took["executor"] = await alone.run_executor(asked, num_new)
                before = thread_cpu_s(daemon.pid)
                bodies = [job(text, num_new) for text in texts]
                run = await asyncio.to_thread(client.run, METHOD, bodies, many)
                cost = spent(daemon.pid, before, run, many * num_new)
                check(run.replies, num_new)
                first, last = min(r.sent for r in run.replies), max(r.end for r in run.replies)
                took["daemon"] = last - first
                if index:  # round 0 warms up
                    costs.setdefault(many, []).append(cost)
                    for way, seconds in took.items():
                        rates.setdefault((way, many), []).append(many * num_new / seconds)
            client.close()
        finally:
            daemon.stop(60.0)
    await alone.executor.stop(0.0)
    return [row(many, given, rates, costs[many]) for many in given.at_once]


def row(
    many: int,
    given: argparse.Namespace,
    rates: dict[tuple[str, int], list[float]],
    costs: list[dict[str, float]],
) -> dict[str, Any]:
    """One concurrency: rates, their spread, and each round's share of the engine's rate."""
    shares = {
        way: [a / b for a, b in zip(rates[way, many], rates["engine", many], strict=True)]
        for way in WAYS[1:]
    }
    return {
        "at_once": many,
        "new_tokens": given.tokens[given.at_once.index(many)],
        "tokens_per_s": {
            way: {
                "median": round(statistics.median(rates[way, many]), 1),
                "min": round(min(rates[way, many]), 1),
                "max": round(max(rates[way, many]), 1),
            }
            for way in WAYS
        },
        "share_of_engine": {w: round(statistics.median(s), 4) for w, s in shares.items()},
        "share_of_engine_by_round": {w: [round(x, 4) for x in s] for w, s in shares.items()},
        "cpu_us_per_token": {
            name: round(statistics.median(cost[name] for cost in costs), 1) for name in costs[0]
        },
    }


def show(rows: list[dict[str, Any]]) -> None:
    """The table of medians."""
    table = Table("at once", *WAYS, "executor", "daemon", "CPU us a token", title="tokens/s")
    for found in rows:
        rates = [f"{found['tokens_per_s'][way]['median']:.1f}" for way in WAYS]
        shares = [f"{found['share_of_engine'][way]:.1%}" for way in WAYS[1:]]
        cpu = ", ".join(f"{k} {v:.0f}" for k, v in found["cpu_us_per_token"].items())
        table.add_row(str(found["at_once"]), *rates, *shares, cpu)
    Console(stderr=True, width=150).print(table)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--model", type=Path, help="a checkpoint; else the bundled tactical one")
    parser.add_argument("--precision", help="bf16 for a checkpoint, else as bundled")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="two rounds of fewer tokens")
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    given.at_once, given.tokens = (1, 32), (128, 64) if given.model else (448, 128)
    if given.quick:
        given.rounds, given.tokens = 2, tuple(n // 2 for n in given.tokens)
    flags = [*RICH]
    if given.model:
        own = {
            "tactical.model": given.model.absolute(),
            "tactical.precision": given.precision or "bf16",
        }
        for key, value in (own | {"cpu_threads": 0}).items():
            flags += ["--set", f"{key}={value}"]
    rows = uvloop.run(measure(given, flags))
    show(rows)
    name = given.model.name if given.model else "bundled"
    report.write(f"daemon_overhead_{name}", {"rounds": given.rounds, "rows": rows}, given.output)
