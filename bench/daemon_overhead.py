"""Tokens per second through the daemon's gRPC streaming, against the executor and the engine alone.

What is added to a step of the engine: the scheduler and the hand-over on the device's thread,
while the device waits; and for each token a task switch, a decode, a message and a write on the
event loop, which share the machine's cores with the device's threads where the device is a CPU.
A real 0.5B's step takes tens of milliseconds, the bundled pair's half a millisecond: the second is
the hard case, in which Python is what is measured.

The same number of sequences starts at once, the same prompts and settings every way, in
interleaved rounds (A B A B ...). Tokens per second count from the start of the first to the end
of the last, prefill included. The client is `lean_client`, in a process of its own; the engine
and the executor run in this process, the daemon in another, each idle while another is measured.

Run: python bench/daemon_overhead.py [--model DIR --precision bf16] [--quick].
Writes bench/results/daemon_overhead_<model>.json.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import report
import torch
from lean_client import LeanClient, Reply, Run
from rich.console import Console
from rich.table import Table

from sage_fed.cli.demo_daemon import DemoDaemon
from sage_fed.client import Client
from sage_fed.core import Message, Sampling, Tier, TierState
from sage_fed.engine import Engine, EngineOptions, load_engine
from sage_fed.executor import Executor, TierSetup
from sage_fed.scheduler import Ended, SequenceSpec
from sage_fed.settings import TierSettings, load_settings, resolve_model
from sage_fed.steps import BLOCK_SIZE, Chunk, Draw, Step
from sage_fed.tasks import task_at
from sage_fed.text import Tokenizer
from sage_fed.v1 import inference_pb2 as pb
from sage_fed.v1 import types_pb2 as types

METHOD = "/sage_fed.v1.InferenceService/GenerateStream"
START_S = 120.0
WAYS = ("engine", "executor", "daemon")
_GREEDY = Sampling(temperature=0.0)


def prompts(count: int, round_index: int) -> list[str]:
    """Prompts that no round before has had, so that no cache knows them."""
    first = 1000 * round_index
    return [f"{first + i}. {task_at(1, first + i, 'test').prompt}" for i in range(count)]


class Alone:
    """The engine, and the executor over it, in this process."""

    def __init__(self, tier: TierSettings) -> None:
        model = resolve_model(tier.model)
        self._tokenizer = Tokenizer.load(model)
        self._ids = itertools.count(1)
        self.engine: Engine | None = None

        def load(progress: Callable[[float], None]) -> Engine:
            self.engine = load_engine(
                EngineOptions(
                    model=str(model),
                    kv_cache_bytes=tier.kv_cache_bytes,
                    precision=tier.precision,
                    max_context_tokens=tier.max_context_tokens,
                    num_valid_ids=self._tokenizer.num_valid_ids,
                ),
                progress,
            )
            return self.engine

        setup = TierSetup(load, tier.max_batch, tier.max_waiting, tier.prefill_chunk_tokens)
        self.executor = Executor({Tier.TACTICAL: setup})

    async def start(self) -> None:
        """Load, or fail."""
        await self.executor.start()
        status = await self.executor.loaded(Tier.TACTICAL)
        assert status.state is TierState.READY, status

    def encode(self, prompt: str) -> tuple[int, ...]:
        """The daemon's work too, but not on these clocks."""
        return self._tokenizer.encode_messages((Message("user", prompt),))

    def run_engine(self, asked: list[tuple[int, ...]], num_new: int) -> float:
        """Steps one after another, from the executor's idle engine; seconds."""
        assert self.engine is not None
        # Blocks from the end of the pool: the executor's prefix cache fills from its beginning.
        each = -(-(max(map(len, asked)) + num_new) // BLOCK_SIZE)
        blocks = [
            tuple(self.engine.num_blocks - 1 - i * each - j for j in range(each))
            for i in range(len(asked))
        ]
        begun = time.perf_counter()
        newest = [0] * len(asked)
        for index in range(num_new):
            chunks = [
                Chunk(
                    seq_id=i,
                    start=len(tokens) + index - 1 if index else 0,
                    token_ids=(newest[i],) if index else tokens,
                    blocks=blocks[i],
                    draw=Draw(_GREEDY, index),
                )
                for i, tokens in enumerate(asked)
            ]
            for drawn in self.engine.run(Step(Tier.TACTICAL, tuple(chunks))):
                newest[drawn.seq_id] = drawn.token_id
        return time.perf_counter() - begun

    async def run_executor(self, asked: list[tuple[int, ...]], num_new: int) -> float:
        """The device's thread and the hand-over to a reader each; seconds."""

        async def read(tokens: tuple[int, ...]) -> None:
            spec = SequenceSpec(
                seq_id=next(self._ids),
                tier=Tier.TACTICAL,
                prompt=tokens,
                max_new_tokens=num_new,
                sampling=_GREEDY,
                ignore_eos=True,
            )
            stream = self.executor.submit(spec)
            while not isinstance(await stream.next(), Ended):
                pass

        begun = time.perf_counter()
        await asyncio.gather(*map(read, asked))
        return time.perf_counter() - begun


def job(prompt: str, num_new: int) -> bytes:
    """One streamed greedy request as it travels."""
    sampling = types.SamplingParams(temperature=0.0, max_new_tokens=num_new, ignore_eos=True)
    spec = types.JobSpec(text=prompt, tier=types.TIER_TACTICAL, sampling=sampling)
    return pb.GenerateStreamRequest(job=spec).SerializeToString()


def check(replies: list[Reply], num_new: int) -> None:
    """Every stream brought what was asked for."""
    for reply in replies:
        last = pb.GenerateStreamResponse.FromString(reply.messages[-1])
        assert last.finished.usage.output_tokens == num_new, last


def thread_cpu_s(pid: int) -> dict[int, float]:
    """Processor seconds of a process's threads; the event loop's is the process's own id."""
    found = {}
    for path in Path(f"/proc/{pid}/task").iterdir():
        fields = (path / "stat").read_text().rsplit(")", 1)[1].split()
        found[int(path.name)] = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return found


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
    alone = Alone(settings.tactical)
    await alone.start()
    rates: dict[tuple[str, int], list[float]] = {}
    costs: dict[int, list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory(prefix="sage-fed-overhead-") as folder:
        daemon = DemoDaemon(Path(folder), "--log-level", "warning", *flags)
        try:
            listen = daemon.endpoint(START_S).listen
            await asyncio.to_thread(wait_ready, listen)
            client = LeanClient(listen)
            for index, many in itertools.product(range(given.rounds + 1), given.at_once):
                num_new = given.tokens[given.at_once.index(many)]
                texts = prompts(many, index)
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


def wait_ready(address: str) -> None:
    """Both tiers: a load in the background would be measured too."""
    with Client(address) as client:
        until = time.monotonic() + START_S
        while any(model.state is not TierState.READY for model in client.models()):
            assert time.monotonic() < until, "the daemon did not get ready"
            time.sleep(0.1)


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
    flags = ["--set", "budget.initial_atp=900000000", "--set", "budget.capacity_atp=1000000000"]
    if given.model:
        own = {
            "tactical.model": given.model.absolute(),
            "tactical.precision": given.precision or "bf16",
        }
        for key, value in (own | {"cpu_threads": 0}).items():
            flags += ["--set", f"{key}={value}"]
    rows = asyncio.run(measure(given, flags))
    show(rows)
    name = given.model.name if given.model else "bundled"
    report.write(f"daemon_overhead_{name}", {"rounds": given.rounds, "rows": rows}, given.output)
