"""Calls that cost nothing and take long, or never end: whoever sends them holds up nobody else.

The figures (`docs/decisions/0026-work-off-the-loop.md`) are measured; here is what holds at any
speed.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import grpc
import pytest
from daemon_process import DaemonProcess
from google.rpc.error_details_pb2 import ErrorInfo, RetryInfo
from grpc_status import rpc_status
from sound_daemon import sound_daemon
from typer.testing import CliRunner
from waiting import WAIT_S

from sage_fed.cli import top
from sage_fed.cli.app import build_app
from sage_fed.client import Client
from sage_fed.core import Tier
from sage_fed.errors import InvalidField
from sage_fed.v1 import inference_pb2, inference_pb2_grpc, types_pb2

SETTINGS = (
    *("--set", "limits.max_prompt_chars=200000", "--set", "limits.max_message_bytes=4MiB"),
    *("--set", "limits.max_waiting_chars=20000000"),
)
"""A hundred of the longest prompts, so that a flood of them takes seconds."""


@pytest.fixture
def token(tmp_path: Path) -> str:
    """Of an account beside that of callers without a token."""
    made = CliRunner().invoke(
        build_app(),
        ["token", "create", "--account", "quiet", "--tokens-file", str(tmp_path / "tokens.toml"),
         "--json"],
        catch_exceptions=False,
    )  # fmt: skip
    return str(json.loads(made.stdout)["token"])


@pytest.fixture
def daemon(tmp_path: Path, token: str) -> Iterator[DaemonProcess]:
    assert token
    tokens = f"auth.tokens_file={tmp_path / 'tokens.toml'}"
    with sound_daemon(tmp_path / "state", "--set", tokens, *SETTINGS) as daemon:
        yield daemon


async def test_a_flood_of_long_counts_holds_up_nobody_else(
    daemon: DaemonProcess, token: str
) -> None:
    """Another account's jobs are answered while the flood still waits, which is bounded."""
    request = inference_pb2.CountTokensRequest(text="lorem ipsum " * 16_000)
    job = types_pb2.JobSpec(text="count " * 200, tier="TIER_TACTICAL")
    job.sampling.max_new_tokens = 2
    async with asyncio.timeout(4 * WAIT_S), grpc.aio.insecure_channel(daemon.address) as channel:
        loud = inference_pb2_grpc.InferenceServiceStub(channel)
        flood = [asyncio.ensure_future(_ask(loud.CountTokens(request))) for _ in range(200)]
        await asyncio.wait(flood, return_when=asyncio.FIRST_COMPLETED)
        async with grpc.aio.insecure_channel(daemon.address) as own:
            quiet = inference_pb2_grpc.InferenceServiceStub(own)
            for _ in range(5):
                await quiet.Generate(
                    inference_pb2.GenerateRequest(job=job),
                    metadata=(("authorization", f"Bearer {token}"),),
                )
        # They have their turns one after the other: what is beyond the bound is refused then.
        while sum(call.done() and call.result() is not None for call in flood) <= 50:
            under_way = [call for call in flood if not call.done()]
            await asyncio.wait(under_way, return_when=asyncio.FIRST_COMPLETED)
        waiting = [call for call in flood if not call.done()]
        refused = [error for call in flood if call.done() and (error := call.result())]
        assert len(waiting) > 10
        for call in waiting:
            call.cancel()
        await asyncio.gather(*flood, return_exceptions=True)
    for error in refused:
        assert grpc.StatusCode.RESOURCE_EXHAUSTED is error.code()
    status = rpc_status.from_call(refused[0])  # type: ignore[arg-type] # it has what is asked of it
    assert status is not None
    found = {detail.type_url.rpartition(".")[2]: detail.value for detail in status.details}
    info = ErrorInfo.FromString(found["ErrorInfo"])
    limited = {"account": "local", "limit": "max_waiting_chars", "allowed": "20000000"}
    assert ("RATE_LIMITED", limited) == (info.reason, dict(info.metadata))
    assert RetryInfo.FromString(found["RetryInfo"]).retry_delay.ToMilliseconds() > 0
    page = top.Page.read(top.fetch(daemon.metrics_url), 0.0)
    counted = page.total("sage_fed_calls_denied_total", reason="waiting")
    assert counted is not None
    assert len(refused) <= counted < 200, "those that were refused meanwhile among them"


async def _ask(call: grpc.aio.UnaryUnaryCall[object, object]) -> grpc.aio.AioRpcError | None:
    """Return how a call was refused; None where it was answered."""
    try:
        await call
    except grpc.aio.AioRpcError as error:
        return error
    return None


def test_a_prompt_that_is_far_too_long_is_refused_by_its_length(daemon: DaemonProcess) -> None:
    """As text and as ids; a quote says the same, and counting tokens still counts them."""
    with Client(daemon.address) as client:
        long = "lorem ipsum " * 16_000
        with pytest.raises(InvalidField, match=r"has at least [\d,]+ tokens") as raised:
            client.generate(long, tier=Tier.STRATEGIC)
        assert "job.prompt" == raised.value.field
        assert client.count_tokens(long).prompt_tokens > 20_000
        quote = client.quote(long)
    assert "prompt_too_long" == getattr(quote.decision, "reason")  # noqa: B009
    assert 0 < quote.prompt_tokens <= 200_000


def test_sockets_that_drip_do_not_blind_the_metrics(demo_daemon: DaemonProcess) -> None:
    """Far more of them than there are places, and every scrape is answered."""
    where = urlsplit(demo_daemon.metrics_url)
    with contextlib.ExitStack() as stack:
        drips = [
            stack.enter_context(socket.create_connection((where.hostname, where.port), WAIT_S))
            for _ in range(40)
        ]
        for _ in range(20):
            for drip in drips:
                with contextlib.suppress(ConnectionError):  # one that had to give way
                    drip.sendall(b"G")
            assert "sage_fed_build_info" in top.fetch(demo_daemon.metrics_url)
