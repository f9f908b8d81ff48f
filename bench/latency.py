"""What the daemon adds to the executor: time to the first token, and in total.

Between a client and a sequence's first token stand, beyond the executor: a request and a reply
over a local socket, the event loop, encoding, quoting and routing (all Python, some hundred
microseconds together), and one commit of the ledger with its sync of the disk, the hold, which
has to be durable before any device work; the settlement and its sync are before the ending.
With many requests at once the ledger commits them in groups, so the sync is shared, and the
event loop's Python is what adds up.

To tell the disk from the rest, a second daemon keeps its books in memory (`/dev/shm`, where a
sync is free), and each daemon's own metrics say how long its ledger took for a commit, from taking
it to durable: "besides commits" is without the one before the first token, or
the two before the end. The same prompts run every way in
interleaved rounds (A B A B ...). The executor runs in this process, each daemon in its own, all
idle while another is measured; the client of the daemons is `LeanClient`, which costs nothing,
and `--client grpc` shows what an ordinary Python client adds on the same cores.

Run: python bench/latency.py [--rounds 4] [--client grpc] [--quick]. Two minutes.
Writes bench/results/latency.json.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import report
import torch
import uvloop
from direct import RICH, Alone, job, prompts
from driven_daemon import START_S, wait_ready
from load_generator import METHOD, LeanClient, closed_loop, stream_times
from rich.console import Console
from rich.table import Table

from sage_fed.cli.demo import DemoDaemon
from sage_fed.cli.top import Page, fetch
from sage_fed.settings import load_settings
from sage_fed.v1 import inference_pb2 as pb

CONCURRENCIES = (1, 16)
LENGTHS = (1, 16)
REQUESTS = {1: 60, 16: 320}
"""Requests of one round by concurrency."""

Times = list[tuple[float, float]]
"""Of each request: seconds to the first token, seconds to the end."""

Way = Callable[[Sequence[str], int, int], Awaitable[Times]]
"""(prompts, new tokens, at once) -> their times: a closed loop."""


@dataclass
class Sample:
    """Times of one way at one concurrency and length; `commit_s` is of a commit, round by round."""

    first_s: list[float] = field(default_factory=list)
    total_s: list[float] = field(default_factory=list)
    commit_s: list[float] = field(default_factory=list)

    def add(self, times: Times, commit_s: float) -> None:
        """Keep a round's."""
        self.first_s += [first for first, _ in times]
        self.total_s += [total for _, total in times]
        self.commit_s.append(commit_s)


@dataclass
class Commits:
    """A daemon's commits so far, as its metrics tell them."""

    url: str
    number: float = 0.0
    seconds: float = 0.0

    def since(self) -> float:
        """Mean seconds of a commit since the last call."""
        page = Page.read(fetch(self.url), time.monotonic())
        number = page.total("sage_fed_ledger_commit_seconds_count") or 0.0
        seconds = page.total("sage_fed_ledger_commit_seconds_sum") or 0.0
        mean_s = (seconds - self.seconds) / max(1.0, number - self.number)
        self.number, self.seconds = number, seconds
        return mean_s


def through_executor(alone: Alone) -> Way:
    """Without a daemon; encoding is the daemon's work, so it is not on this clock."""

    async def run(texts: Sequence[str], num_new: int, at_once: int) -> Times:
        encoded = {text: alone.encode(text) for text in texts}
        times = Times()

        async def ask(text: str) -> None:
            times.append(await alone.ask(encoded[text], num_new))

        await closed_loop([ask] * at_once, iter(texts))
        return times

    return run


def through_lean(client: LeanClient) -> Way:
    """The client that costs nothing."""

    async def run(texts: Sequence[str], num_new: int, at_once: int) -> Times:
        bodies = [job(text, num_new) for text in texts]
        done = await asyncio.to_thread(client.run, METHOD, bodies, at_once)
        return [(reply.first - reply.sent, reply.end - reply.sent) for reply in done.replies]

    return run


def through_grpc(channel: grpc.aio.Channel) -> Way:
    """The ordinary client of Python programs, in this process."""
    call = channel.unary_stream(METHOD, response_deserializer=pb.GenerateStreamResponse.FromString)

    async def run(texts: Sequence[str], num_new: int, at_once: int) -> Times:
        times = Times()

        async def ask(text: str) -> None:
            times.append(await stream_times(call(job(text, num_new), timeout=60.0)))

        await closed_loop([ask] * at_once, iter(texts))
        return times

    return run


async def measure(given: argparse.Namespace) -> dict[tuple[str, int, int], Sample]:
    """Interleaved rounds of all ways, after one that is not counted."""
    settings = load_settings({"profile": "demo"}, {"HOME": str(Path.home())}, None).settings
    torch.set_num_threads(settings.cpu_threads or torch.get_num_threads())
    alone = Alone(settings)
    await alone.start()
    ways: dict[str, Way] = {"executor": through_executor(alone)}
    samples: dict[tuple[str, int, int], Sample] = {}
    daemons: list[DemoDaemon] = []
    clients: list[LeanClient] = []
    commits: dict[str, Commits] = {}
    with (
        tempfile.TemporaryDirectory(prefix="sage-fed-latency-") as disk,
        tempfile.TemporaryDirectory(dir="/dev/shm") as memory,
    ):
        try:
            for name, folder in (("daemon", disk), ("daemon, books in memory", memory)):
                daemons.append(DemoDaemon(Path(folder), "--log-level", "warning", *RICH))
                endpoint = daemons[-1].endpoint(START_S)
                listen, commits[name] = endpoint.listen, Commits(endpoint.metrics_url)
                await wait_ready(endpoint)
                if given.client == "grpc":
                    ways[name] = through_grpc(grpc.aio.insecure_channel(listen))
                else:
                    clients.append(LeanClient(listen))
                    ways[name] = through_lean(clients[-1])
            for index in range(given.rounds + 1):
                for nth, (many, length) in enumerate(itertools.product(CONCURRENCIES, LENGTHS)):
                    texts = prompts(REQUESTS[many] // given.shorter, 4 * index + nth)
                    for way, run in ways.items():
                        # Round 0 warms up: its sample is thrown away.
                        kept = samples.setdefault((way, many, length), Sample())
                        times = await run(texts, length, many)
                        commit_s = commits[way].since() if way in commits else 0.0
                        (kept if index else Sample()).add(times, commit_s)
        finally:
            for client in clients:
                client.close()
            for daemon in daemons:
                daemon.stop(60.0)
    await alone.executor.stop(0.0)
    return samples


def rows(samples: dict[tuple[str, int, int], Sample]) -> list[dict[str, Any]]:
    """For each concurrency and length: every way, and what the daemons add."""
    ways = list(dict.fromkeys(way for way, _, _ in samples))
    found = []
    for many, length in itertools.product(CONCURRENCIES, LENGTHS):
        for name in ("first_s", "total_s"):
            by_way = {
                way: _percentiles_ms(getattr(samples[way, many, length], name)) for way in ways
            }
            alone = by_way["executor"]
            # Of one commit at a time only: in a crowd, one commit is many requests'.
            commit_ms = {
                way: round(statistics.median(samples[way, many, length].commit_s) * 1e3, 3)
                for way in ways[1:]
            }
            before = {"first_s": 1, "total_s": 2}[name]
            found.append(
                {
                    "concurrency": many,
                    "max_new_tokens": length,
                    "time": {"first_s": "time to first token", "total_s": "total"}[name],
                    "requests": len(samples[ways[0], many, length].total_s),
                    "ms": by_way,
                    "added_ms": {
                        way: {p: round(by_way[way][p] - alone[p], 3) for p in alone}
                        for way in ways[1:]
                    },
                    "commit_ms": commit_ms,
                    "added_besides_commits_p50_ms": {
                        way: round(by_way[way]["p50"] - alone["p50"] - before * commit_ms[way], 3)
                        for way in ways[1:]
                    },
                }
            )
    return found


def _percentiles_ms(seconds: list[float]) -> dict[str, float]:
    found = report.percentiles(seconds, 1e3)
    return {point: found[point] for point in ("p50", "p99")}


def show(found: list[dict[str, Any]]) -> None:
    """The table, p50 / p99 in ms."""
    added = list(found[0]["added_ms"])
    table = Table("at once", "tokens", "time", title="p50 / p99 in ms")
    for heading in (*found[0]["ms"], *(f"{way} adds" for way in added), "besides commits, p50"):
        table.add_column(heading, justify="right")
    for row in found:
        cells = [*row["ms"].values(), *(row["added_ms"][way] for way in added)]
        shown = [f"{cell['p50']:.2f} / {cell['p99']:.2f}" for cell in cells]
        besides = " / ".join(f"{ms:.2f}" for ms in row["added_besides_commits_p50_ms"].values())
        size = str(row["concurrency"]), str(row["max_new_tokens"])
        table.add_row(*size, row["time"], *shown, besides)
    Console(stderr=True, width=150).print(table)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--client", choices=("lean", "grpc"), default="lean")
    parser.add_argument("--quick", action="store_true", help="one round of fewer requests")
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    given.shorter = 4 if given.quick else 1
    given.rounds = 1 if given.quick else given.rounds
    result = rows(uvloop.run(measure(given)))
    show(result)
    body = {"rounds": given.rounds, "client": given.client, "rows": result}
    report.write("latency", body, given.output)
