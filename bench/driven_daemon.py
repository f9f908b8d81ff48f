"""A daemon that a benchmark drives: whether it is ready, and afterwards whether it is idle.

Owns: which amounts have to be nought when no client asks any more (jobs, KV tokens, holds), in the
daemon's own answer and on its metrics page; what in its log is a bug.
Does not know: what is asked of it.
"""

from __future__ import annotations

import asyncio
import re
import time
from pathlib import Path

import grpc

from sage_fed.cli import top
from sage_fed.cli.demo import Endpoint
from sage_fed.v1 import admin_pb2, admin_pb2_grpc

IDLE_SERIES = (
    "sage_fed_requests_running",
    "sage_fed_requests_waiting",
    "sage_fed_atp_held",
    "sage_fed_kv_cache_tokens",
)
"""Gauges that are nought when nobody asks; of the KV cache the used part."""

SETTLE_S = 15.0
START_S = 120.0
TROUBLE = re.compile(r'Traceback|"exception"|internal error')
"""In the daemon's log: a bug of ours, whatever the client was told."""


async def wait_ready(endpoint: Endpoint) -> None:
    """Both tiers SERVING, by the standard health service."""
    from grpc_health.v1 import health_pb2, health_pb2_grpc  # noqa: PLC0415

    async with grpc.aio.insecure_channel(endpoint.listen) as channel:
        for tier in ("tactical", "strategic"):
            request = health_pb2.HealthCheckRequest(service=tier)
            async for response in health_pb2_grpc.HealthStub(channel).Watch(
                request, timeout=START_S, wait_for_ready=True
            ):
                if response.status == health_pb2.HealthCheckResponse.SERVING:
                    break


async def settle(endpoint: Endpoint, state_dir: Path) -> list[str]:
    """Give the last cancels a moment to be settled, then say what is left over."""
    token = (state_dir / "admin.token").read_text().strip()
    metadata = (("authorization", f"Bearer {token}"),)
    deadline = time.monotonic() + SETTLE_S
    async with grpc.aio.insecure_channel(endpoint.listen) as channel:
        stub = admin_pb2_grpc.AdminServiceStub(channel)
        while True:
            load = await stub.GetLoad(
                admin_pb2.GetLoadRequest(), timeout=SETTLE_S, metadata=metadata
            )
            page = await asyncio.to_thread(top.fetch, endpoint.metrics_url)
            left = leftovers(load, page)
            if not left or time.monotonic() > deadline:
                return left
            await asyncio.sleep(0.1)


def leftovers(load: admin_pb2.GetLoadResponse, page: str) -> list[str]:
    """Everything that should be nought when nobody asks, and is not."""
    amounts: dict[str, float] = {
        "jobs in GetLoad": len(load.jobs),
        "held uATP in GetLoad": load.held_uatp,
    }
    for tier in load.tiers:
        amounts[f"running, tier {tier.tier}"] = tier.requests_running
        amounts[f"waiting, tier {tier.tier}"] = tier.requests_waiting
        amounts[f"KV tokens used, tier {tier.tier}"] = tier.kv_tokens_used
    series: dict[str, list[float]] = {name: [] for name in IDLE_SERIES}
    for sample in top.samples(page):
        if sample.name in series and sample.labels.get("state", "used") == "used":
            series[sample.name].append(sample.value)
    amounts |= {name: sum(values) for name, values in series.items()}
    return [
        *(f"left over: {name} = {value:g}" for name, value in amounts.items() if value),
        # A renamed series would be nought for ever.
        *(f"not on the metrics page: {name}" for name, values in series.items() if not values),
    ]
