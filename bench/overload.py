"""Ten times more than the daemon can do, for a minute: what do the refused and the admitted get?

First the capacity, by as many clients as the tier has places, each asking again at once; then the
same jobs arrive at ten times that rate, whatever comes of them; then nothing, and one job after
the other until they are as fast as before. A refusal has to come within 10 ms (99th percentile)
and say when to come back; an admitted job is to take as long as under full load without the
excess; and five seconds after the flood all is as it was.

The load comes from a process of its own, which on few cores takes part of the machine from the
daemon (its share is in the result), and which reads the admitted jobs' tokens with the loop that
takes the times of the refusals. So some of the calls come from another process that does nothing
else, one after the other at a steady pace, before the others for the processor: a client on
another machine, as far as one machine can have it. Its refusals are the ones that are judged.

Run: python bench/overload.py [--seconds 60] [--factor 10]
     [--model DIR --precision int8 --tokens 32] [--mixed]
Exit code 1 on a wrong answer. Without a checkpoint: the bundled pair, whose daemon streams tokens
faster than any real model's has to. Writes bench/results/overload.json or overload_<model>.json.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import multiprocessing
import os
import sys
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import psutil
import report
from behaviours import FLAGS
from driven_daemon import driven
from google.rpc.error_details_pb2 import RetryInfo
from grpc_status import rpc_status
from load_generator import before, closed_loop, open_loop, stream_request, stream_times
from rich.console import Console

from sage_fed.core import Tier
from sage_fed.v1 import inference_pb2, types_pb2
from sage_fed.v1 import inference_pb2_grpc as rpc

PLACES, WAITING = 8, 8
NEW_TOKENS = 480
"""Of the bundled pair: then ten times the capacity is a rate that one generator can send."""
LIMITS = (
    "--set", f"tactical.max_batch={PLACES}", "--set", f"tactical.max_waiting={WAITING}",
    "--set", f"strategic.max_batch={PLACES}", "--set", f"strategic.max_waiting={WAITING}",
    "--set", "limits.max_jobs=4096", "--log-level", "warning",
)  # fmt: skip
CHANNELS = 4
STUCK_S = 60.0
REFUSED_IN_S = 0.010
RECOVERED_IN_S = 5.0
ASIDE_PER_S = 20.0
ASIDE_NICE = -10


@dataclass
class Calls:
    """How the calls of one phase ended, and how long they took."""

    codes: Counter[str] = field(default_factory=Counter)
    answered_s: list[float] = field(default_factory=list)
    first_token_s: list[float] = field(default_factory=list)
    refused_s: list[float] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    def figures(self) -> dict[str, Any]:
        """Percentiles of everything."""
        return {
            "codes": dict(sorted(self.codes.items())),
            "answered_seconds": report.percentiles(self.answered_s),
            "first_token_seconds": report.percentiles(self.first_token_s),
            "refused_seconds": report.percentiles(self.refused_s),
        }


class Asker:
    """Jobs over a few connections, in turn of the kinds that there are."""

    def __init__(self, address: str, jobs: Jobs) -> None:
        options = [("grpc.use_local_subchannel_pool", 1)]
        self._channels = [
            grpc.aio.insecure_channel(address, options=options) for _ in range(CHANNELS)
        ]
        self._stubs = [rpc.InferenceServiceStub(channel) for channel in self._channels]
        self._requests = itertools.cycle(jobs.requests())
        self._asked = 0

    async def close(self) -> None:
        """Hang up."""
        for channel in self._channels:
            await channel.close()

    async def ask(self, calls: Calls) -> None:
        """One job, from its request to its ending."""
        self._asked += 1
        stub = self._stubs[self._asked % CHANNELS]
        began_s = time.perf_counter()
        try:
            call = stub.GenerateStream(next(self._requests), timeout=STUCK_S)
            first_s, answered_s = await stream_times(call)
        except grpc.aio.AioRpcError as error:
            elapsed_s = time.perf_counter() - began_s
            code = error.code().name
            calls.codes[code] += 1
            calls.refused_s.append(elapsed_s)
            if code != "RESOURCE_EXHAUSTED" or not retry_info(error):
                calls.wrong.append(f"{code}: {error.details()}")
        else:
            calls.codes["OK"] += 1
            calls.answered_s.append(answered_s)
            calls.first_token_s.append(first_s)


def ask_aside(address: str, seconds: float, new_tokens: int) -> tuple[list[float], list[str]]:
    """In a process of its own: seconds that each refusal took, and what was wrong.

    One that is admitted is left at its first event: it would hold up the others.
    """
    if os.geteuid() == 0:
        os.nice(ASIDE_NICE)
    refused_s: list[float] = []
    wrong: list[str] = []
    request = stream_request("count", new_tokens)
    with grpc.insecure_channel(address) as channel:
        stub = rpc.InferenceServiceStub(channel)
        for number in range(int(seconds * ASIDE_PER_S)):
            if number == 0:
                grpc.channel_ready_future(channel).result(STUCK_S)
                start_s = time.perf_counter()
            time.sleep(max(start_s + number / ASIDE_PER_S - time.perf_counter(), 0.0))
            began_s = time.perf_counter()
            call = stub.GenerateStream(request, timeout=STUCK_S)
            try:
                next(call)
            except grpc.RpcError as error:
                refused_s.append(time.perf_counter() - began_s)
                if error.code() is not grpc.StatusCode.RESOURCE_EXHAUSTED or not retry_info(error):
                    wrong.append(f"{error.code().name}: {error.details()}")
            else:
                call.cancel()
    return refused_s, wrong


def retry_info(error: grpc.RpcError) -> bool:
    """Whether a refusal says when to come back."""
    status = rpc_status.from_call(error)  # type: ignore[arg-type] # an error is its call, too
    return status is not None and any(d.Is(RetryInfo.DESCRIPTOR) for d in status.details)


async def saturate(asker: Asker, seconds: float, clients: int) -> tuple[Calls, float]:
    """Closed loop: the endings, and jobs per second."""
    calls = Calls()

    async def ask(_: object) -> None:
        await asker.ask(calls)

    began_s = time.monotonic()
    await closed_loop([ask] * clients, before(began_s + seconds))
    return calls, calls.codes["OK"] / (time.monotonic() - began_s)


async def flood(asker: Asker, rate: float, seconds: float) -> Calls:
    """Open loop: jobs arrive at a rate, whatever becomes of those before them."""
    calls = Calls()

    async def ask(_: object) -> None:
        await asker.ask(calls)

    await open_loop(ask, rate, seconds)
    return calls


async def recover(asker: Asker, usual_s: float) -> float:
    """Seconds until a job takes no more than twice what it takes an idle daemon."""
    began_s = time.monotonic()
    while True:
        calls = Calls()
        await asker.ask(calls)
        if calls.answered_s and calls.answered_s[0] <= 2 * usual_s:
            return time.monotonic() - began_s
        if time.monotonic() - began_s > STUCK_S:
            return STUCK_S
        await asyncio.sleep(0.05)


@dataclass(frozen=True)
class Jobs:
    """What is asked for, of which tactical model; None is the bundled one."""

    new_tokens: int
    model: Path | None
    precision: str
    chosen: tuple[str, ...] = ()
    """Further settings of the daemon, `NAME=VALUE`."""
    mixed: bool = False
    """In turn: the tactical tier, the strategic one, which speculates, and a cascade."""

    def requests(self) -> tuple[inference_pb2.GenerateStreamRequest, ...]:
        """One of each kind."""
        plain = stream_request("count", self.new_tokens)
        if not self.mixed:
            return (plain,)
        cascade = stream_request("count", self.new_tokens)
        cascade.job.tier = types_pb2.TIER_AUTO
        cascade.job.mode = types_pb2.MODE_CASCADE
        cascade.job.max_error = 0.01  # most answers are more doubtful
        deep = stream_request("count", self.new_tokens, Tier.STRATEGIC)
        return plain, deep, cascade

    @property
    def settings(self) -> tuple[str, ...]:
        """Of the daemon."""
        model = (f"tactical.model={self.model}", f"tactical.precision={self.precision}")
        settings = (*(model if self.model else ()), *self.chosen)
        return tuple(word for setting in settings for word in ("--set", setting))

    @property
    def name(self) -> str:
        """For people; no path."""
        return f"{self.model.name} {self.precision}" if self.model else "bundled"


async def main(
    seconds: float, factor: float, measure_s: float, jobs: Jobs, output: Path | None
) -> int:
    """Run, check, report; the exit code."""
    async with driven(*FLAGS, *LIMITS, *jobs.settings) as run:
        asker = Asker(run.endpoint.listen, jobs)
        await saturate(asker, 1.0, PLACES)  # warm
        alone, _ = await saturate(asker, measure_s / 2, 1)
        usual_s = sorted(alone.answered_s)[len(alone.answered_s) // 2]
        full, capacity = await saturate(asker, measure_s, PLACES + WAITING)
        own, its = psutil.Process(), psutil.Process(run.daemon.pid)
        busy_before = busy_s(own), busy_s(its)
        began_s = time.monotonic()
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, mp_context=spawn) as pool:
            aside = asyncio.get_running_loop().run_in_executor(
                pool, ask_aside, run.endpoint.listen, seconds, jobs.new_tokens
            )
            over = await flood(asker, factor * capacity - ASIDE_PER_S, seconds)
            aside_s, aside_wrong = await aside
        flooded_s = time.monotonic() - began_s
        cores = [(busy_s(p) - b) / flooded_s for p, b in zip((own, its), busy_before, strict=True)]
        recovered_s = await recover(asker, usual_s)
        await asker.close()
        await run.finish()
    violations = [*over.wrong[:20], *aside_wrong[:20], *run.violations]
    refused = report.percentiles(aside_s).get("p99", 0.0)
    if recovered_s > RECOVERED_IN_S:
        violations.append(f"it took {recovered_s:.1f} s to recover")
    result = {
        "seconds": seconds,
        "factor": factor,
        "model": jobs.name,
        "settings": list(jobs.chosen),
        "new_tokens": jobs.new_tokens,
        "mixed_modes": jobs.mixed,
        "places": PLACES,
        "waiting": WAITING,
        "capacity_jobs_per_s": round(capacity, 2),
        "arrived_jobs_per_s": round(sum(over.codes.values()) / flooded_s + ASIDE_PER_S, 2),
        "alone": alone.figures(),
        "at_capacity": full.figures(),
        "overloaded": over.figures(),
        "aside": {
            "calls_per_s": ASIDE_PER_S,
            "nice": ASIDE_NICE,
            "refused": len(aside_s),
            "refused_seconds": report.percentiles(aside_s),
        },
        "cores_of_load_and_daemon": [round(share, 2) for share in cores],
        "refused_within_10_ms_p99": refused <= REFUSED_IN_S,
        "recovered_seconds": round(recovered_s, 2),
        "violations": violations,
    }
    name = f"overload_{jobs.model.name}" if jobs.model else "overload"
    name += "_mixed" if jobs.mixed else ""
    report.write(name, result, output)
    console = Console(stderr=True)
    for violation in violations[:20]:
        console.print(f"VIOLATION: {violation}", markup=False)
    console.print(
        f"{capacity:.1f} jobs/s; at {factor:g} times that {over.codes} , refused p99 "
        f"{refused * 1e3:.1f} ms; p50 of the admitted {full.figures()['answered_seconds']} at "
        f"capacity, {over.figures()['answered_seconds']} overloaded; recovered in "
        f"{recovered_s:.1f} s",
        highlight=False,
        markup=False,
    )
    return 1 if violations else 0


def busy_s(process: psutil.Process) -> float:
    """CPU seconds of a process so far."""
    times = process.cpu_times()
    return float(times.user + times.system)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--factor", type=float, default=10.0)
    parser.add_argument("--measure-seconds", type=float, default=6.0)
    parser.add_argument("--model", type=Path, help="a checkpoint; else the bundled tactical one")
    parser.add_argument("--precision", default="int8")
    parser.add_argument("--tokens", type=int, default=NEW_TOKENS, help="of a job")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", dest="chosen")
    parser.add_argument("--mixed", action="store_true", help="jobs of all modes")
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    model = given.model and given.model.absolute()
    jobs = Jobs(given.tokens, model, given.precision, tuple(given.chosen), given.mixed)
    run = main(given.seconds, given.factor, given.measure_seconds, jobs, given.output)
    sys.exit(asyncio.run(run))
