"""What clients do to a daemon in a GPU run, and what they and the daemon's own metrics see of it.

Owns: closed loops of streams on both tiers through clients that cost nothing, a storm of
cancels, and percentiles of the daemon's histograms between two scrapes.
Does not know: the process, its models.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from random import Random
from typing import Any

import grpc
from interference import Load
from lean_client import LeanClient, Reply, Run

from sage_fed.cli import top
from sage_fed.core import TIER_ROLES, Tier
from sage_fed.v1 import inference_pb2 as pb
from sage_fed.v1 import inference_pb2_grpc as rpc
from sage_fed.v1 import types_pb2 as types

WIRE = {Tier.TACTICAL: types.TIER_TACTICAL, Tier.STRATEGIC: types.TIER_STRATEGIC}
HISTOGRAMS = {
    "first_token_s": "sage_fed_time_to_first_token_seconds",
    "inter_token_s": "sage_fed_inter_token_latency_seconds",
}
_METHOD = "/sage_fed.v1.InferenceService/GenerateStream"
_WARM_UP_SHARE = 0.2
_MOST_REQUESTS = 5000
_CALL_S = 120.0


class Clients:
    """One lean client, in a process of its own, for each tier."""

    def __init__(self, address: str, valid_ids: int) -> None:
        self._lean = {tier: LeanClient(address) for tier in TIER_ROLES}
        self._valid_ids = valid_ids

    def close(self) -> None:
        """End the processes."""
        for client in self._lean.values():
            client.close()

    def run(self, loads: Sequence[Load], seconds: float) -> dict[str, Any]:
        """Keep every load's streams busy for a while; tokens/s by tier, warm-up left out."""
        requests = [list(itertools.islice(self._requests(load), _MOST_REQUESTS)) for load in loads]
        begun = time.perf_counter()
        with ThreadPoolExecutor(len(loads)) as threads:
            runs = list(threads.map(partial(self._one, seconds), loads, requests))
        window = begun + _WARM_UP_SHARE * seconds, begun + seconds
        length_s = window[1] - window[0]
        rows = {
            load.tier.name: {
                "streams": load.streams,
                "requests": len(run.replies),
                "tokens_per_s": sum(tokens_within(r, window) for r in run.replies) / length_s,
            }
            for load, run in zip(loads, runs, strict=True)
        }
        for load, run in zip(loads, runs, strict=True):
            if len(run.replies) == _MOST_REQUESTS:
                raise RuntimeError(f"the {load.tier.name} load ran out of requests")
            if any(tokens_of(reply) != load.new_tokens for reply in run.replies):
                raise RuntimeError(f"a {load.tier.name} request ended before its last token")
        return rows

    def _one(self, seconds: float, load: Load, requests: list[bytes]) -> Run:
        return self._lean[load.tier].run(_METHOD, requests, load.streams, seconds)

    def _requests(self, load: Load) -> Iterator[bytes]:
        random = Random(f"{load.tier} {load.streams}")
        while True:
            # A prefix that was seen before would be prefill that the load does not do.
            prompt = [random.randrange(300, self._valid_ids) for _ in range(load.prompt_tokens)]
            request = pb.GenerateStreamRequest(job=_job(load.tier, prompt, load.new_tokens))
            yield request.SerializeToString()


async def cancel_storm(
    address: str, loads: Sequence[Load], valid_ids: int, cancels: int
) -> dict[str, Any]:
    """Streams that are cancelled at a random token, or before the first; how many of each."""
    random = Random(cancels)
    numbers = iter(range(cancels))
    seen = {"cancels": 0, "before_the_first_token": 0, "tokens_read": 0}

    async with grpc.aio.insecure_channel(address) as channel:
        stub = rpc.InferenceServiceStub(channel)

        async def one(load: Load) -> None:
            for _ in numbers:
                prompt = [random.randrange(300, valid_ids) for _ in range(load.prompt_tokens)]
                request = pb.GenerateStreamRequest(job=_job(load.tier, prompt, load.new_tokens))
                call = stub.GenerateStream(request, timeout=_CALL_S)
                last, read = random.randrange(load.new_tokens // 2), 0
                if last == 0:
                    await asyncio.sleep(random.random() / 50)
                else:
                    async for reply in call:
                        read += len(reply.delta.token_ids)
                        if read >= last:
                            break
                call.cancel()
                seen["cancels"] += 1
                seen["before_the_first_token"] += read == 0
                seen["tokens_read"] += read

        async with asyncio.timeout(_CALL_S), asyncio.TaskGroup() as group:
            for load in loads:
                for _ in range(load.streams):
                    group.create_task(one(load))
    return seen


def percentiles_between(before: str, after: str) -> dict[str, dict[str, Any]]:
    """p50 and p99 of each tier's latencies, as the daemon's histograms have them."""
    pages = top.Between(top.Page.read(before, 0.0), top.Page.read(after, 1.0))
    found: dict[str, dict[str, Any]] = {}
    for tier in TIER_ROLES:
        for name, series in HISTOGRAMS.items():
            if pages.after.total(f"{series}_count", tier=tier.name) is None:
                raise RuntimeError(f"not on the metrics page: {series} of tier {tier.name}")
            found.setdefault(tier.name, {})[name] = {
                f"p{round(100 * share)}": pages.quantile(share, series, tier=tier.name)
                for share in (0.5, 0.99)
            }
    return found


def tokens_of(reply: Reply) -> int:
    """The tokens that came."""
    deltas = map(pb.GenerateStreamResponse.FromString, reply.messages)
    return sum(len(message.delta.token_ids) for message in deltas)


def tokens_within(reply: Reply, window: tuple[float, float]) -> float:
    """Those of them that came in a span of time, as if they had come evenly."""
    tokens = tokens_of(reply)
    if reply.last <= reply.first:
        return tokens if window[0] <= reply.first <= window[1] else 0
    overlap = min(reply.last, window[1]) - max(reply.first, window[0])
    return tokens * max(overlap, 0.0) / (reply.last - reply.first)


def shares(rows: Mapping[str, Any], alone: Mapping[str, float]) -> dict[str, float]:
    """Tokens/s through the daemon over those of the executor alone, tier by tier and in all."""
    found = {
        tier: row["tokens_per_s"] / alone[tier] for tier, row in rows.items() if alone.get(tier)
    }
    if total := sum(alone.values()):
        found["all"] = sum(row["tokens_per_s"] for row in rows.values()) / total
    return found


def _job(tier: Tier, prompt: Sequence[int], new_tokens: int) -> types.JobSpec:
    sampling = types.SamplingParams(temperature=0.0, max_new_tokens=new_tokens, ignore_eos=True)
    return types.JobSpec(token_ids=types.TokenIds(ids=prompt), tier=WIRE[tier], sampling=sampling)
