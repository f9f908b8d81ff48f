"""A daemon that a benchmark drives: its start and end, and whether it is idle afterwards.

Owns: which amounts have to be zero when no client asks any more (jobs, KV tokens, holds), in the
daemon's own answer and on its metrics page; its exit code, what in its log is a bug, its books.
Does not know: what is asked of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import tempfile
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

import grpc

from sage_fed.cli import top
from sage_fed.cli.demo import DemoDaemon, Endpoint
from sage_fed.cli.options import ledger_file
from sage_fed.ledger import CheckReport, check
from sage_fed.v1 import admin_pb2, admin_pb2_grpc

IDLE_SERIES = (
    "sage_fed_requests_running",
    "sage_fed_requests_waiting",
    "sage_fed_atp_held",
    "sage_fed_kv_cache_tokens",
)
"""Gauges that are zero when nobody asks; of the KV cache the used part."""

SETTLE_S = 15.0
START_S = 120.0
TROUBLE = re.compile(r'Traceback|"exception"|internal error')
"""In the daemon's log: a bug of ours, whatever the client was told."""


STOP_S = 60.0


@dataclass
class Driven:
    """A running demo daemon, where it keeps its files, and what was found wrong so far."""

    daemon: DemoDaemon
    endpoint: Endpoint
    state_dir: Path
    violations: list[str] = field(default_factory=list)

    async def finish(self) -> CheckReport:
        """Let it settle and stop it, then look at its log and its books; the files stay."""
        self.violations += await settle(self.endpoint, self.state_dir)
        code = await asyncio.to_thread(self.daemon.stop, STOP_S)
        if code != 0:
            self.violations.append(f"the daemon left with {code}: {self.daemon.log()}")
        if TROUBLE.search((self.state_dir / "daemon.log").read_text()):
            self.violations.append(f"the daemon logged a traceback: {self.daemon.log()}")
        books = await asyncio.to_thread(check, ledger_file(self.state_dir))
        self.violations += books.violations
        if books.open_holds:
            self.violations.append(f"{books.open_holds} holds are open in the books")
        return books


@contextlib.asynccontextmanager
async def driven(*flags: str, tokens: str = "") -> AsyncIterator[Driven]:
    """Start a demo daemon with these flags, and a tokens file where one is given."""
    with tempfile.TemporaryDirectory(prefix="sage-fed-bench-") as folder:
        state_dir = Path(folder)
        if tokens:
            (state_dir / "tokens.toml").write_text(tokens)
            flags += ("--set", f"auth.tokens_file={state_dir / 'tokens.toml'}")
        daemon = DemoDaemon(state_dir, *flags)
        try:
            endpoint = await asyncio.to_thread(daemon.endpoint, START_S)
            await wait_ready(endpoint)
            yield Driven(daemon, endpoint, state_dir)
        finally:
            await asyncio.to_thread(daemon.stop, STOP_S)


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
    """Everything that should be zero when nobody asks, and is not."""
    amounts: dict[str, float] = {
        "jobs in GetLoad": len(load.jobs),
        "held uATP in GetLoad": load.held_uatp,
    }
    for tier in load.tiers:
        amounts[f"running, tier {tier.tier}"] = tier.requests_running
        amounts[f"waiting, tier {tier.tier}"] = tier.requests_waiting
        amounts[f"KV tokens used, tier {tier.tier}"] = tier.kv_tokens_used
    shown = top.Page.read(page, 0.0)
    series = {
        name: [s.value for s in shown.having(name) if s.labels.get("state", "used") == "used"]
        for name in IDLE_SERIES
    }
    amounts |= {name: sum(values) for name, values in series.items()}
    return [
        *(f"left over: {name} = {value:g}" for name, value in amounts.items() if value),
        # A renamed series would be zero for ever.
        *(f"not on the metrics page: {name}" for name, values in series.items() if not values),
    ]
