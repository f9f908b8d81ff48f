"""The server as a whole: its port, its limits, and what public gRPC tools see."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import socket
import subprocess
from pathlib import Path
from typing import TypeVar

import grpc
import h2.connection
import h2.events
import h2.settings
import pytest
from grpc_reflection.v1alpha import reflection_pb2
from service_harness import TOKENS, WAIT_S, ScriptedJobs, ScriptedOperations, in_thread, serving
from surroundings import require_tool

from sage_fed.auth import Authenticator
from sage_fed.client import Client
from sage_fed.core import Address
from sage_fed.errors import CallFailed, CannotConnect, ConfigError
from sage_fed.service import edge, grpc_server
from sage_fed.service.grpc_server import MAX_METADATA_BYTES, build_server
from sage_fed.settings import LimitSettings
from sage_fed.v1 import inference_pb2, types_pb2
from sage_fed.workers import Workers

E = TypeVar("E", bound=h2.events.Event)

QUOTE = "/sage_fed.v1.InferenceService/Quote"


async def test_a_taken_port_fails_the_start_by_name(tmp_path: Path) -> None:
    """A second daemon does not share the port: it says which setting to change."""
    async with serving(tmp_path) as harness:
        with (
            contextlib.closing(Workers(max_calls=1, max_size=1)) as workers,
            pytest.raises(ConfigError, match=rf"^listen: cannot bind {harness.address};"),
        ):
            await build_server(
                Address.parse(harness.address),
                authenticator=Authenticator(TOKENS, None),
                limits=LimitSettings(),
                jobs=ScriptedJobs(),
                ledger=harness.ledger,
                operations=ScriptedOperations(),
                workers=workers,
            )


async def test_a_message_beyond_the_limit_is_refused_unread(tmp_path: Path) -> None:
    """The transport refuses it; the broker never hears of it."""
    limits = LimitSettings(max_message_bytes=2048, max_prompt_chars=10_000)
    async with serving(tmp_path, limits=limits) as harness:
        job = types_pb2.JobSpec(text="x" * 4000)
        call = harness.channel.unary_unary(QUOTE)(
            inference_pb2.QuoteRequest(job=job).SerializeToString(), timeout=WAIT_S
        )
        assert grpc.StatusCode.RESOURCE_EXHAUSTED is await call.code()
        assert [] == harness.jobs.specs


async def test_headers_beyond_the_limit_are_refused(tmp_path: Path) -> None:
    """Headers cost memory before anyone is known: they are bounded."""
    async with serving(tmp_path) as harness:
        job = types_pb2.JobSpec(text="hello")
        call = harness.channel.unary_unary(QUOTE)(
            inference_pb2.QuoteRequest(job=job).SerializeToString(),
            metadata=[("x-padding", "x" * (MAX_METADATA_BYTES + 1))],
            timeout=WAIT_S,
        )
        assert grpc.StatusCode.OK is not await call.code()
        assert [] == harness.jobs.specs


class RawConnection:
    """An HTTP/2 client that answers what it must and asks for nothing."""

    def __init__(self, address: str) -> None:
        host, _, port = address.rpartition(":")
        self._socket = socket.create_connection((host, int(port)), WAIT_S)
        self._state = h2.connection.H2Connection()
        self._state.initiate_connection()
        self._socket.sendall(self._state.data_to_send())

    def next(self, kind: type[E]) -> E:
        """Wait for the server's next event of a kind; whatever else comes is answered."""
        while data := self._socket.recv(65536):
            events = self._state.receive_data(data)
            self._socket.sendall(self._state.data_to_send())
            for event in events:
                if isinstance(event, kind):
                    return event
        raise AssertionError(f"the server hung up before {kind.__name__}")

    def close(self) -> None:
        """Hang up."""
        self._socket.close()


async def test_a_connection_is_told_how_many_streams_it_may_open(tmp_path: Path) -> None:
    """Each costs memory before anyone is known: a client may not open as many as it likes."""
    async with serving(tmp_path) as harness:

        def announced() -> int:
            with contextlib.closing(RawConnection(harness.address)) as connection:
                settings = connection.next(h2.events.RemoteSettingsChanged).changed_settings
                change = settings.get(h2.settings.SettingCodes.MAX_CONCURRENT_STREAMS)
                return 2**31 if change is None else change.new_value

        assert 0 < await in_thread(announced) <= 1024


async def test_a_connection_without_calls_is_asked_whether_it_lives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client that vanished between two calls would keep its connection for ever."""
    monkeypatch.setattr(grpc_server, "KEEPALIVE_S", 1.0)
    async with serving(tmp_path) as harness:

        def pinged() -> bool:
            with contextlib.closing(RawConnection(harness.address)) as connection:
                connection.next(h2.events.PingReceived)
                # The first may measure the connection; who keeps it alive asks again.
                return bool(connection.next(h2.events.PingReceived))

        assert await in_thread(pinged)


async def test_an_unknown_method_is_unimplemented(tmp_path: Path) -> None:
    """Typos do not look like bugs of ours."""
    async with serving(tmp_path) as harness:
        call = harness.channel.unary_unary("/sage_fed.v1.InferenceService/Generat")(b"")
        assert grpc.StatusCode.UNIMPLEMENTED is await call.code()


async def test_nobody_at_the_address_is_said_so(tmp_path: Path) -> None:
    """The client names the address that it tried."""
    async with serving(tmp_path) as harness:
        address = harness.address

    def ask() -> None:
        with Client(address) as client:
            client.status()

    with pytest.raises(CannotConnect, match=f"cannot connect to {address}"):
        await in_thread(ask)


async def failure_at(server: grpc.aio.Server) -> CallFailed:
    """How a call of ours fails at a server that is not ours."""
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()

    def ask() -> None:
        with Client(f"127.0.0.1:{port}") as client:
            client.status()

    try:
        with pytest.raises(CallFailed) as raised:
            await in_thread(ask)
    finally:
        await server.stop(None)
    return raised.value


async def test_a_server_of_something_else_is_a_failed_call() -> None:
    """A status without our details keeps its name."""
    assert "UNIMPLEMENTED" == (await failure_at(grpc.aio.server())).status


async def test_leaving_a_stream_early_cancels_its_job(tmp_path: Path) -> None:
    """A `break` in the client's loop ends the job on the daemon."""
    jobs = ScriptedJobs(hang=True)
    async with serving(tmp_path, jobs=jobs) as harness:

        def ask() -> None:
            with Client(harness.address) as client:
                events = client.stream("hello")
                next(events)
                events.close()

        await in_thread(ask)
        await asyncio.wait_for(jobs.streams[0].cancelled.wait(), WAIT_S)


@pytest.mark.parametrize("version", ["v1", "v1alpha"])
async def test_reflection_describes_every_service(tmp_path: Path, version: str) -> None:
    """Each listed service can be looked up, reflection itself included."""
    async with serving(tmp_path) as harness:
        method = f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo"
        call = harness.channel.stream_stream(method)(timeout=WAIT_S)

        async def ask(
            request: reflection_pb2.ServerReflectionRequest,
        ) -> reflection_pb2.ServerReflectionResponse:
            await call.write(request.SerializeToString())
            return reflection_pb2.ServerReflectionResponse.FromString(await call.read())

        listed = await ask(reflection_pb2.ServerReflectionRequest(list_services=""))
        services = [service.name for service in listed.list_services_response.service]
        described = [
            bool(
                (
                    await ask(reflection_pb2.ServerReflectionRequest(file_containing_symbol=name))
                ).file_descriptor_response.file_descriptor_proto
            )
            for name in services
        ]
        await call.done_writing()
    expected = {
        *edge.SERVICES,
        "grpc.health.v1.Health",
        "grpc.reflection.v1.ServerReflection",
        "grpc.reflection.v1alpha.ServerReflection",
    }
    assert expected == set(services)
    assert [True] * len(services) == described


@pytest.mark.parametrize(
    "method",
    [
        "grpc.health.v1.Health/Check",
        "grpc.health.v1.Health/Watch",
        "grpc.health.v1.Health/List",
        "grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
        "grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
    ],
)
async def test_bytes_that_are_no_message_are_no_error_of_the_open_services(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, method: str
) -> None:
    """Garbage to health and reflection is the client's fault, and nothing that we log."""
    caplog.set_level(logging.WARNING)
    async with serving(tmp_path) as harness:
        call = harness.channel.stream_stream(f"/{method}")(iter([b"\xff\xff"]), timeout=WAIT_S)
        assert grpc.StatusCode.INVALID_ARGUMENT is await call.code()
        assert (await call.details()).startswith("request: not a grpc.")
    assert [] == caplog.records


async def test_a_public_client_streams_by_reflection_alone(tmp_path: Path) -> None:
    """`buf curl`, as the README shows it: no schema of ours, no code of ours."""
    buf = require_tool("buf")
    async with serving(tmp_path) as harness:
        url = f"http://{harness.address}/sage_fed.v1.InferenceService/GenerateStream"

        def ask() -> subprocess.CompletedProcess[str]:
            return subprocess.run(
                [
                    buf, "curl", "--protocol", "grpc", "--http2-prior-knowledge",
                    "-d", '{"job": {"text": "What is 12 plus 30?", "tier": "TIER_TACTICAL"}}', url,
                ],
                capture_output=True,
                text=True,
                timeout=WAIT_S,
                check=False,
            )  # fmt: skip

        done = await in_thread(ask)
        assert (0, "") == (done.returncode, done.stderr)
    decoder, events, rest = json.JSONDecoder(), [], done.stdout.strip()
    while rest:
        event, end = decoder.raw_decode(rest)
        events.append(event)
        rest = rest[end:].strip()
    assert ["started", "delta", "delta", "delta", "finished"] == [next(iter(e)) for e in events]
    assert "Grüß" == events[1]["delta"]["text"]


@pytest.mark.parametrize("details", [b"\xff\xff", b"", b"\x08\x03\x12\x03bad"])
async def test_details_that_cannot_be_read_leave_the_status(details: bytes) -> None:
    """Another server's broken details are no crash of the client: the status keeps its name."""

    async def refuse(_: bytes, context: grpc.aio.ServicerContext[bytes, bytes]) -> bytes:
        trailers = (("grpc-status-details-bin", details),)
        await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "bad", trailers)

    server = grpc.aio.server()
    handler = grpc.unary_unary_rpc_method_handler(refuse)
    methods = {"GetStatus": handler}
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler("sage_fed.v1.ModelService", methods),)
    )
    failure = await failure_at(server)
    assert ("INVALID_ARGUMENT", "bad") == (failure.status, failure.message)
