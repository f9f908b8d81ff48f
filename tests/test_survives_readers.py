"""Clients that ask and do not read, or begin and do not end: whoever they are, others are served.

The figures (`bench/attacks.py`) are measured; here is what holds at any speed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from daemon_process import DaemonProcess
from raw_http2 import RawClient
from sound_daemon import sound_daemon
from typer.testing import CliRunner
from waiting import until

from sage_fed.cli import top
from sage_fed.cli.app import build_app
from sage_fed.client import Client
from sage_fed.core import StopReason, Tier
from sage_fed.service.calls import UNREAD_OF_CONNECTION
from sage_fed.v1 import budget_pb2, inference_pb2, types_pb2

SETTINGS = (
    # As many jobs as the daemon may have, of one client.
    *("--set", "tactical.max_waiting=1024", "--set", "limits.max_jobs=512"),
    *("--set", "limits.write_timeout_s=3600"),
)
STREAM = "/sage_fed.v1.InferenceService/GenerateStream"
ENTRIES = "/sage_fed.v1.BudgetService/ListEntries"
SAMPLING = types_pb2.SamplingParams(max_new_tokens=1, ignore_eos=True)
JOB = types_pb2.JobSpec(text="hello", tier=types_pb2.TIER_TACTICAL, sampling=SAMPLING)
ONE_TOKEN = inference_pb2.GenerateStreamRequest(job=JOB).SerializeToString()
MIB = 2**20


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


def rss(daemon: DaemonProcess) -> int:
    return int(psutil.Process(daemon.process.pid).memory_info().rss)


def series(daemon: DaemonProcess, name: str) -> float:
    page = top.fetch(daemon.metrics_url)
    (value,) = [line.split()[-1] for line in page.splitlines() if line.startswith(name)]
    return float(value)


def serves(daemon: DaemonProcess, token: str) -> bool:
    with Client(daemon.address, token) as other:
        answer = other.generate("2+3=", tier=Tier.TACTICAL, max_new_tokens=2)
    return answer.finished.stop_reason in (StopReason.LENGTH, StopReason.END_OF_TEXT)


def test_answers_that_nobody_reads_refuse_nobody_else(daemon: DaemonProcess, token: str) -> None:
    """On one connection, with windows of zero, as many as the daemon may have jobs.

    They are seen while they are unread, those beyond the account's bound end without waiting for
    any deadline, and with them their connection, which is all of it.
    """
    with RawClient(daemon.address, window=0) as client:
        kept = client.call("/grpc.health.v1.Health/Watch", b"")
        client.widen(kept)
        for _ in range(511):
            client.call(STREAM, ONE_TOKEN)
        with Client(daemon.address, daemon.admin_token) as operator:
            until(lambda: len(operator.load().unread) > 64)
            assert {"local"} == {reply.account for reply in operator.load().unread}
            assert serves(daemon, token)
        client.until(lambda: client.closed)
    until(lambda: series(daemon, "sage_fed_unread_replies ") == 0)
    # How many it takes depends on how many were unread at one look; the rest goes with them.
    assert series(daemon, 'sage_fed_calls_ended_total{why="unread"}') > UNREAD_OF_CONNECTION
    assert 1 == series(daemon, 'sage_fed_connections_closed_total{why="unread"}')


def test_unfinished_requests_and_unread_pages_take_little(
    daemon: DaemonProcess, token: str
) -> None:
    """200 messages without their last byte, and 2,000 pages of the books: 800 and 900 MiB once."""
    for _ in range(3):
        assert serves(daemon, token)
    before = rss(daemon)
    with RawClient(daemon.address) as beginning, RawClient(daemon.address, window=0) as asking:
        streams = [beginning.open(STREAM) for _ in range(200)]
        beginning.pour(streams, 60 * 1024)
        page = budget_pb2.ListEntriesRequest(page_size=1000).SerializeToString()
        for _ in range(500):
            asking.call(ENTRIES, page)
        assert serves(daemon, token)
        assert rss(daemon) - before < 64 * MIB
