"""What the daemon adds: gRPC, routing and a FULL-durable ledger, over the executor alone.

Physics first: a request through the daemon crosses two processes (HTTP/2 over loopback), is
encoded, quoted and routed (microseconds of Python), waits for one fsync before device work
(the hold) and one before its ending (the settlement). With many requests at once the ledger
commits them in groups, so the fsync is shared, and the event loop's Python is what adds up.

The same prompts run on the same settings either way, in interleaved rounds (A B A B ...), so
that a machine that speeds up or slows down meets both. The executor runs in this process, the
daemon in its own; both are idle while the other is measured.

Run: python bench/latency.py [--rounds 4]. Writes bench/results/latency.json.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import report
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc
from rich.console import Console
from rich.table import Table

from sage_fed.cli.demo_daemon import DemoDaemon
from sage_fed.core import Message, Sampling, Tier, TierState
from sage_fed.engine import Engine, EngineOptions, load_engine
from sage_fed.executor import Executor, TierSetup
from sage_fed.scheduler import Ended, SequenceSpec
from sage_fed.settings import TierSettings, load_settings, resolve_model
from sage_fed.tasks import task_at
from sage_fed.text import Tokenizer
from sage_fed.v1 import inference_pb2 as pb
from sage_fed.v1 import inference_pb2_grpc as rpc
from sage_fed.v1 import types_pb2 as types

START_S = 120.0
CONCURRENCIES = (1, 16)
LENGTHS = (1, 16)
REQUESTS = {1: 60, 16: 320}
"""Requests of one round by concurrency."""

FLAGS = (
    "--set", "budget.initial_atp=900000000", "--set", "budget.capacity_atp=1000000000",
    "--log-level", "warning",
)  # fmt: skip

Ask = Callable[[str, int], Awaitable[tuple[float, float]]]
"""(prompt, max_new_tokens) -> (seconds to the first token, seconds to the end)."""


@dataclass
class Sample:
    """Times of one way of asking at one concurrency and length."""

    first_s: list[float] = field(default_factory=list)
    total_s: list[float] = field(default_factory=list)


class Direct:
    """The executor in this process, with the demo's settings."""

    def __init__(self, tier: TierSettings) -> None:
        model = resolve_model(tier.model)
        self._tokenizer = Tokenizer.load(model)
        self._ids = itertools.count(1)

        def load(progress: Callable[[float], None]) -> Engine:
            return load_engine(
                EngineOptions(
                    model=str(model),
                    kv_cache_bytes=tier.kv_cache_bytes,
                    precision=tier.precision,
                    max_context_tokens=tier.max_context_tokens,
                    num_valid_ids=self._tokenizer.num_valid_ids,
                ),
                progress,
            )

        setup = TierSetup(load, tier.max_batch, tier.max_waiting, tier.prefill_chunk_tokens)
        self.executor = Executor({Tier.TACTICAL: setup})

    async def start(self) -> None:
        """Load, or fail."""
        await self.executor.start()
        status = await self.executor.loaded(Tier.TACTICAL)
        assert status.state is TierState.READY, status

    async def ask(self, prompt: str, max_new_tokens: int) -> tuple[float, float]:
        """One sequence; encoding is the daemon's work, so it is not on this clock."""
        tokens = self._tokenizer.encode_messages((Message("user", prompt),))
        spec = SequenceSpec(
            seq_id=next(self._ids),
            tier=Tier.TACTICAL,
            prompt=tokens,
            max_new_tokens=max_new_tokens,
            sampling=Sampling(),
            ignore_eos=True,
        )
        begun = time.perf_counter()
        stream = self.executor.submit(spec)
        first = None
        while not isinstance(await stream.next(), Ended):
            first = first or time.perf_counter()
        ended = time.perf_counter()
        assert first is not None
        return first - begun, ended - begun


class ThroughDaemon:
    """A gRPC client of a real daemon process."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._stub = rpc.InferenceServiceStub(channel)

    async def ask(self, prompt: str, max_new_tokens: int) -> tuple[float, float]:
        """One streamed request; ends when the status has come, so after the settlement."""
        job = types.JobSpec(
            text=prompt,
            tier=types.TIER_TACTICAL,
            sampling=types.SamplingParams(
                temperature=0.0, max_new_tokens=max_new_tokens, ignore_eos=True
            ),
        )
        begun = time.perf_counter()
        first = None
        async for response in self._stub.GenerateStream(
            pb.GenerateStreamRequest(job=job), timeout=60.0
        ):
            if response.WhichOneof("event") == "delta":
                first = first or time.perf_counter()
        ended = time.perf_counter()
        assert first is not None
        return first - begun, ended - begun


async def round_of(ask: Ask, concurrency: int, length: int, sample: Sample) -> None:
    """A closed loop: each worker asks its next question when the last is answered."""
    questions = iter(range(REQUESTS[concurrency]))

    async def worker() -> None:
        for index in questions:
            first_s, total_s = await ask(task_at(1, index, "test").prompt, length)
            sample.first_s.append(first_s)
            sample.total_s.append(total_s)

    async with asyncio.TaskGroup() as group:
        for _ in range(concurrency):
            group.create_task(worker())


async def measure(rounds: int) -> dict[tuple[str, int, int], Sample]:
    """Interleaved rounds of both ways, after one that is not counted."""
    settings = load_settings({"profile": "demo"}, {"HOME": str(Path.home())}, None).settings
    torch.set_num_threads(settings.cpu_threads or torch.get_num_threads())
    direct = Direct(settings.tactical)
    await direct.start()
    samples: dict[tuple[str, int, int], Sample] = {}
    with tempfile.TemporaryDirectory(prefix="sage-fed-latency-") as folder:
        daemon = DemoDaemon(Path(folder), *FLAGS)
        try:
            async with grpc.aio.insecure_channel(daemon.endpoint(START_S).listen) as channel:
                await wait_serving(channel)
                ways: dict[str, Ask] = {
                    "executor": direct.ask,
                    "daemon": ThroughDaemon(channel).ask,
                }
                for index in range(rounds + 1):
                    for concurrency, length in itertools.product(CONCURRENCIES, LENGTHS):
                        for way, ask in ways.items():
                            key = (way, concurrency, length)
                            # Round 0 warms up: its sample is thrown away.
                            kept = samples.setdefault(key, Sample()) if index else Sample()
                            await round_of(ask, concurrency, length, kept)
        finally:
            daemon.stop(60.0)
    await direct.executor.stop(0.0)
    return samples


async def wait_serving(channel: grpc.aio.Channel) -> None:
    """Both tiers: a load in the background would be measured too."""
    for tier in Tier:
        request = health_pb2.HealthCheckRequest(service=tier.value)
        call = health_pb2_grpc.HealthStub(channel).Watch(
            request, timeout=START_S, wait_for_ready=True
        )
        async for response in call:
            if response.status == health_pb2.HealthCheckResponse.SERVING:
                break


def percentiles_ms(values: list[float]) -> dict[str, float]:
    """p50 and p99 in milliseconds."""
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    return {"p50": round(cuts[49] * 1e3, 3), "p99": round(cuts[98] * 1e3, 3)}


def rows(samples: dict[tuple[str, int, int], Sample]) -> list[dict[str, Any]]:
    """For each concurrency and length: both ways and the difference."""
    found = []
    for concurrency, length in itertools.product(CONCURRENCIES, LENGTHS):
        for name in ("first_s", "total_s"):
            alone = percentiles_ms(getattr(samples["executor", concurrency, length], name))
            daemon = percentiles_ms(getattr(samples["daemon", concurrency, length], name))
            found.append(
                {
                    "concurrency": concurrency,
                    "max_new_tokens": length,
                    "time": {"first_s": "time to first token", "total_s": "total"}[name],
                    "requests": len(samples["daemon", concurrency, length].total_s),
                    "executor_ms": alone,
                    "daemon_ms": daemon,
                    "added_ms": {p: round(daemon[p] - alone[p], 3) for p in alone},
                }
            )
    return found


def show(found: list[dict[str, Any]]) -> None:
    """The table, p50 / p99 in ms."""
    table = Table("at once", "tokens", "time", title="added latency, p50 / p99 in ms")
    for heading in ("executor", "daemon", "added"):
        table.add_column(heading, justify="right")
    for row in found:
        cells = (
            f"{row[k]['p50']:.2f} / {row[k]['p99']:.2f}"
            for k in ("executor_ms", "daemon_ms", "added_ms")
        )
        table.add_row(str(row["concurrency"]), str(row["max_new_tokens"]), row["time"], *cells)
    Console(stderr=True, width=110).print(table)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    result = rows(asyncio.run(measure(given.rounds)))
    show(result)
    report.write("latency", {"rounds": given.rounds, "rows": result}, given.output)
