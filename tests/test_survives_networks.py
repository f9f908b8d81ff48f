"""Readers that do not read, connections that freeze, peers that vanish: others do not notice."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import grpc
import psutil
import pytest
from daemon_process import DaemonProcess
from forked_daemon import ForkedProcess
from sound_daemon import sound_daemon
from stalling_proxy import StallingProxy
from waiting import WAIT_S, until

from sage_fed.client import Client
from sage_fed.core import TIER_ROLES, StopReason
from sage_fed.service import grpc_server
from sage_fed.v1 import inference_pb2 as pb
from sage_fed.v1 import inference_pb2_grpc as rpc
from sage_fed.v1 import types_pb2 as types

SETTINGS = (
    *("--set", "budget.initial_atp=100000000", "--set", "budget.capacity_atp=100000000"),
    *("--set", "budget.refill_atp_per_s=0", "--set", "limits.max_new_tokens=900"),
)
NUM_TOKENS = 900
MIB = 2**20

ALONE = (
    ("grpc.use_local_subchannel_pool", 1),
    # What a client that does not read lets in all the same.
    ("grpc.http2.lookahead_bytes", 1),
    ("grpc.http2.bdp_probe", 0),
)


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[DaemonProcess]:
    with sound_daemon(tmp_path / "state", *SETTINGS) as daemon:
        yield daemon


class Stream:
    """A stream on a connection of its own, which is read only when a test says so."""

    def __init__(self, address: str, num_tokens: int = NUM_TOKENS) -> None:
        self._channel = grpc.insecure_channel(address, options=ALONE)
        sampling = types.SamplingParams(max_new_tokens=num_tokens, ignore_eos=True, top_logprobs=20)
        job = types.JobSpec(text="count", tier=types.TIER_TACTICAL, sampling=sampling)
        stub = rpc.InferenceServiceStub(self._channel)
        self._call = stub.GenerateStream(pb.GenerateStreamRequest(job=job), timeout=2 * WAIT_S)

    def begin(self) -> None:
        """Read until the job runs."""
        assert "started" == next(self._call).WhichOneof("event")

    def rest(self) -> int:
        """Read to the end; returns the tokens."""
        return sum(len(event.delta.token_ids) for event in self._call)

    def close(self) -> None:
        """Break the connection off."""
        self._channel.close()


def nobody_runs(daemon: DaemonProcess) -> bool:
    """No job, no hold, no KV block in use."""
    with Client(daemon.address, daemon.admin_token) as client:
        load = client.load()
    tiers = [(tier.running, tier.waiting, tier.kv_tokens_used) for tier in load.tiers]
    return ((), 0, [(0, 0, 0)] * 2) == (load.jobs, load.held_uatp, tiers)


def answers_everyone(daemon: DaemonProcess) -> None:
    """Both tiers answer a client that reads."""
    with Client(daemon.address) as client:
        for tier in TIER_ROLES:
            answer = client.generate("count", tier=tier, max_new_tokens=20, ignore_eos=True)
            assert StopReason.LENGTH is answer.finished.stop_reason


def test_readers_that_do_not_read_hold_nobody_up(daemon: DaemonProcess) -> None:
    """Their jobs run to the end and are settled; what waits for them is bounded and given back."""
    process = psutil.Process(daemon.process.pid)
    rounds: list[int] = []
    for _ in range(4):
        streams = [Stream(daemon.address) for _ in range(16)]
        for stream in streams:
            stream.begin()
        answers_everyone(daemon)
        until(lambda: nobody_runs(daemon), "jobs wait for their readers")
        rounds.append(process.memory_info().rss)
        assert NUM_TOKENS == streams[0].rest()
        for stream in streams:
            stream.close()
        answers_everyone(daemon)
    # Each round's output is as large: had one been kept, every round would add it.
    kept = 16 * NUM_TOKENS * 20 * 2 * 32
    assert rounds[-1] - rounds[1] < 2 * kept, [round(rss / MIB, 1) for rss in rounds]


def test_connections_that_freeze_hold_nobody_up(daemon: DaemonProcess) -> None:
    """Jobs behind them end and are settled; those that thaw get every token after all."""
    with StallingProxy(daemon.address) as proxy, ThreadPoolExecutor(8) as threads:
        streams = [Stream(proxy.address) for _ in range(8)]
        for stream in streams:
            stream.begin()
        proxy.freeze()
        answers_everyone(daemon)
        until(lambda: nobody_runs(daemon), "jobs wait for a frozen connection")
        answers_everyone(daemon)
        proxy.thaw()
        assert [NUM_TOKENS] * 8 == list(threads.map(Stream.rest, streams))
        for stream in streams:
            stream.close()


def impatient() -> None:
    """In the daemon's process: ask silent peers for a sign of life after 2 s instead of 30."""
    grpc_server.KEEPALIVE_S = 2.0


def test_a_peer_that_vanished_is_noticed(tmp_path: Path) -> None:
    """Half-open connections in the middle of a stream are closed by keepalive.

    Beside them are some that never said what they want: those hold nobody up either, and gRPC's
    own patience with a handshake, a minute, ends them.
    """
    launch = partial(ForkedProcess, prepare=impatient)
    daemon = DaemonProcess.start(tmp_path / "state", *SETTINGS, launch=launch)
    process = psutil.Process(daemon.process.pid)
    answers_everyone(daemon)
    host, _, port = daemon.address.rpartition(":")
    before = process.num_fds()
    silent = [socket.create_connection((host, int(port))) for _ in range(20)]
    for connection in silent[:10]:
        connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0\0")
    with StallingProxy(daemon.address) as proxy:
        streams = [Stream(proxy.address) for _ in range(8)]
        for stream in streams:
            stream.begin()
        proxy.freeze()
        until(lambda: nobody_runs(daemon), "jobs wait for a peer that vanished")
        answers_everyone(daemon)
        until(lambda: process.num_fds() <= before + len(silent), "half-open connections stay")
        answers_everyone(daemon)
        for stream in streams:
            stream.close()
    for connection in silent:
        connection.close()
    assert 0 == daemon.stop(WAIT_S)
