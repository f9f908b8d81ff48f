"""Clients that do not do their part: requests that never end, replies that nobody reads."""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import socket
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import grpc
import h2.events
import pytest
import waiting
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2
from raw_http2 import RawClient, framed
from service_harness import (
    DELTAS,
    FINISHED,
    STARTED,
    WAIT_S,
    Harness,
    ScriptedJobs,
    in_thread,
    serving,
)

from sage_fed.client import Client
from sage_fed.core import TIER_ROLES, Address, OpenReply, TierState, UnixSocket
from sage_fed.errors import RateLimited
from sage_fed.ledger import AccountTerms
from sage_fed.service import calls as calls_module
from sage_fed.service.calls import UNAUTHENTICATED_OF_CONNECTION, Turn, Turns
from sage_fed.service.connections import Connections, host_of
from sage_fed.service.grpc_server import OWN_FILES, WINDOW_BYTES, connections_within
from sage_fed.settings import LimitSettings
from sage_fed.v1 import budget_pb2, inference_pb2, types_pb2

ADMIN = "admin-token"
QUOTE = "/sage_fed.v1.InferenceService/Quote"
STREAM = "/sage_fed.v1.InferenceService/GenerateStream"
STATUS = "/sage_fed.v1.ModelService/GetStatus"
WATCH = "/grpc.health.v1.Health/Watch"
ABORTED, UNIMPLEMENTED, RESOURCE_EXHAUSTED, UNAUTHENTICATED = (
    code.value[0]
    for code in (
        grpc.StatusCode.ABORTED,
        grpc.StatusCode.UNIMPLEMENTED,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        grpc.StatusCode.UNAUTHENTICATED,
    )
)
JOB = inference_pb2.GenerateStreamRequest(job=types_pb2.JobSpec(text="hello")).SerializeToString()
SHORT = LimitSettings(receive_timeout_s=1.0, write_timeout_s=2.0)


async def until(done: Callable[[], object]) -> None:
    """Wait for what no event tells of; `done` is asked by another thread."""
    await asyncio.to_thread(waiting.until, lambda: bool(done()))


@contextlib.asynccontextmanager
async def raw(harness: Harness, **how: Any) -> AsyncIterator[RawClient]:  # noqa: ANN401 - RawClient's
    client = await in_thread(lambda: RawClient(harness.address, **how))
    with client:
        yield client


def unread(harness: Harness) -> tuple[OpenReply, ...]:
    return harness.bound.calls.unread()


async def test_a_caller_is_known_before_anything_of_the_request_is_received(
    tmp_path: Path,
) -> None:
    """The headers alone are answered: no byte of a body was sent, and none is waited for."""
    async with serving(tmp_path, anonymous=None) as harness, raw(harness) as client:
        stream = client.open(QUOTE)
        code, _ = await in_thread(lambda: client.status(stream))
        assert UNAUTHENTICATED == code
        assert ["unauthenticated"] == harness.denied


async def test_nobody_knows_how_much_an_unread_request_would_be(tmp_path: Path) -> None:
    """200 bodies that miss their last byte: each holds a window, as far as it has its turn."""
    limits = LimitSettings(max_receiving_bytes=2**20)
    async with serving(tmp_path, limits=limits) as harness, raw(harness) as client:
        assert WINDOW_BYTES == client.http2.remote_settings.initial_window_size
        streams = [client.open(QUOTE) for _ in range(200)]
        largest = limits.largest_message_bytes
        sent = await in_thread(lambda: client.pour(streams, largest - 1))
        assert 200 * WINDOW_BYTES <= sent < 200 * WINDOW_BYTES + 2 * largest


async def test_a_request_that_does_not_arrive_is_ended(tmp_path: Path) -> None:
    """Whoever waits for its turn behind it is told, too; both are counted and none stays open."""
    async with serving(tmp_path, limits=SHORT) as harness, raw(harness) as client:
        streams = [client.open(QUOTE) for _ in range(12)]
        for stream in streams:
            client.send(stream, framed(b"x" * 100)[:-1])
        said = [await in_thread(lambda s=stream: client.status(s)) for stream in streams]
        assert {ABORTED} == {code for code, _ in said}
        assert any("to arrive" in message for _, message in said)
        await until(lambda: harness.bound.calls.num_open == 0)
        assert [] == harness.jobs.specs


async def test_a_slow_request_makes_way_for_others(tmp_path: Path) -> None:
    """With every turn taken by bodies that drip, the next caller waits a second, not ten."""
    limits = LimitSettings(max_receiving_bytes=1024, receive_timeout_s=3600)
    async with serving(tmp_path, limits=limits) as harness, raw(harness) as client:
        stream = client.open(QUOTE)
        client.send(stream, framed(b"x" * 100)[:-1])
        await until(lambda: harness.bound.calls.num_open)
        with Client(harness.address) as other:
            assert (await in_thread(other.status)).version
        code, message = await in_thread(lambda: client.status(stream))
        assert (ABORTED, True) == (code, "others waited" in message)


@pytest.mark.parametrize("method", [QUOTE, STREAM, "/grpc.health.v1.Health/Check", WATCH])
@pytest.mark.parametrize("messages", [(), (b"", b"")], ids=["none", "two"])
async def test_a_method_of_one_request_takes_neither_none_nor_two(
    tmp_path: Path, method: str, messages: Sequence[bytes]
) -> None:
    """It says UNIMPLEMENTED, as gRPC's own servers do, and does nothing."""
    async with serving(tmp_path) as harness, raw(harness) as client:
        stream = client.call(method, *messages)
        code, _ = await in_thread(lambda: client.status(stream))
        assert UNIMPLEMENTED == code
        assert [] == harness.jobs.specs


async def test_the_largest_request_that_the_limits_allow_fits(tmp_path: Path) -> None:
    """The bound of a message follows from those of its fields, and is no smaller."""
    limits = LimitSettings(max_prompt_chars=20_000)
    sampling = types_pb2.SamplingParams(
        stop=["\U0001f600" * limits.max_stop_chars] * limits.max_stop_strings
    )
    request_id = "\U0001f600" * limits.max_request_id_chars
    turns = limits.max_messages
    share = limits.max_prompt_chars // turns
    message = types_pb2.ChatMessage(role="assistant", content="\U0001f600" * share)
    jobs = (
        types_pb2.JobSpec(
            token_ids=types_pb2.TokenIds(ids=[2**32 - 1] * limits.max_prompt_chars),
            sampling=sampling, client_request_id=request_id,
        ),
        types_pb2.JobSpec(
            chat=types_pb2.ChatMessages(messages=[message] * turns),
            sampling=sampling, client_request_id=request_id,
        ),
    )  # fmt: skip
    async with serving(tmp_path, limits=limits) as harness:
        for job in jobs:
            body = inference_pb2.QuoteRequest(job=job).SerializeToString()
            await harness.channel.unary_unary(QUOTE)(body, timeout=WAIT_S)
    assert 2 == len(harness.jobs.specs)


async def test_a_reader_that_takes_nothing_is_seen_and_ended(tmp_path: Path) -> None:
    """The job ends with its call after the write deadline; the operator has seen both before."""
    async with serving(tmp_path, limits=SHORT) as harness, raw(harness, window=0) as client:
        # Another call keeps the connection: one that carries nothing else is closed.
        other = client.call(WATCH, b"")
        client.widen(other)
        client.call(STREAM, JOB)
        await until(lambda: unread(harness))
        with Client(harness.address, token=ADMIN) as operator:
            report = await in_thread(operator.load)
        (seen,) = report.unread
        assert ("local", client.name, STARTED.job_id) == (
            seen.account, seen.connection, seen.job_id,
        )  # fmt: skip
        assert seen.method == STREAM.removeprefix("/")
        assert seen.unread_bytes > 0
        assert not seen.ended
        assert not harness.jobs.streams[0].cancelled.is_set()
        await until(harness.jobs.streams[0].cancelled.is_set)
        assert [True] == [reply.ended for reply in unread(harness)]


async def test_a_reader_that_comes_back_too_late_is_told_why(tmp_path: Path) -> None:
    """What was on its way arrives, then the status: gRPC cannot take it back."""
    async with serving(tmp_path, limits=SHORT) as harness, raw(harness, window=0) as client:
        other = client.call(WATCH, b"")
        client.widen(other)
        stream = client.call(STREAM, JOB)
        await until(lambda: any(reply.ended for reply in unread(harness)))
        client.widen(stream)
        code, message = await in_thread(lambda: client.status(stream))
        assert (ABORTED, True) == (code, "not read" in message)
        assert 1 == sum(
            isinstance(e, h2.events.DataReceived) and e.stream_id == stream for e in client.events
        )
        await until(lambda: not unread(harness))


async def test_a_connection_that_carries_nothing_but_dead_calls_is_closed(tmp_path: Path) -> None:
    """Only so gRPC lets go of what it holds."""
    async with serving(tmp_path, limits=SHORT) as harness, raw(harness, window=0) as client:
        client.call(STREAM, JOB)
        client.call(STREAM, JOB)
        await in_thread(lambda: client.until(lambda: client.closed))
        await until(lambda: harness.bound.calls.num_open == 0)


async def test_too_much_unread_ends_at_once_and_refuses_its_account_alone(tmp_path: Path) -> None:
    """Beyond its bound an account's replies have no second; others notice nothing."""
    limits = LimitSettings(max_account_unread=3, write_timeout_s=3600)
    async with serving(tmp_path, limits=limits) as harness, raw(harness, window=0) as client:
        other = client.call(WATCH, b"")
        client.widen(other)
        for _ in range(8):
            client.call(STREAM, JOB)
        await until(lambda: sum(reply.ended for reply in unread(harness)) == 5)
        with Client(harness.address) as mine, Client(harness.address, token="robot-token") as robot:
            with pytest.raises(RateLimited) as refused:
                await in_thread(mine.status)
            assert ("unread_replies", 3) == (refused.value.limit, refused.value.allowed)
            assert (await in_thread(robot.status)).version
        assert "unread_replies" in harness.denied


async def test_an_operator_ends_a_call_and_a_connection(tmp_path: Path) -> None:
    """By the names that he is shown."""
    limits = LimitSettings(write_timeout_s=3600)
    async with serving(tmp_path, limits=limits) as harness, raw(harness, window=0) as client:
        other = client.call(WATCH, b"")
        client.widen(other)
        client.call(STREAM, JOB)
        client.call(STREAM, JOB)
        await until(lambda: len(unread(harness)) == 2)
        first, second = unread(harness)
        with Client(harness.address, token=ADMIN) as operator:
            assert await in_thread(lambda: operator.end_call(first.call_id))
            assert harness.jobs.streams[0].cancelled.is_set()
            assert not harness.jobs.streams[1].cancelled.is_set()
            assert not await in_thread(lambda: operator.end_call("call-0"))
            assert not await in_thread(lambda: operator.close_connection("ipv4:127.0.0.1:1"))
            assert await in_thread(lambda: operator.close_connection(second.connection))
        await in_thread(lambda: client.until(lambda: client.closed))
        await until(harness.jobs.streams[1].cancelled.is_set)


async def test_a_watcher_that_does_not_read_holds_up_no_change(tmp_path: Path) -> None:
    """Anyone may watch health: what it says to others, and the daemon's stop, do not wait."""
    name = health_pb2.HealthCheckRequest(service="tactical").SerializeToString()
    async with serving(tmp_path) as harness, raw(harness, window=0) as client:
        client.call(WATCH, name)
        await until(lambda: unread(harness))
        harness.bound.health.update(dict.fromkeys(TIER_ROLES, TierState.READY))
        check = harness.channel.unary_unary("/grpc.health.v1.Health/Check")
        said = health_pb2.HealthCheckResponse.FromString(await check(name, timeout=WAIT_S))
        assert health_pb2.HealthCheckResponse.SERVING == said.status
        harness.bound.health.stop()


async def test_unread_pages_of_the_books_are_few(tmp_path: Path) -> None:
    """Replies are made as they are read: those that wait for their turn have not been made."""
    async with serving(tmp_path, limits=LimitSettings(write_timeout_s=3600)) as harness:
        for n in range(500):
            await harness.ledger.ensure_account(
                f"a{n}", AccountTerms(capacity_uatp=1, initial_uatp=1)
            )
        async with raw(harness, window=0) as client:
            body = budget_pb2.ListEntriesRequest(page_size=1000).SerializeToString()
            for _ in range(100):
                client.call("/sage_fed.v1.BudgetService/ListEntries", body)
            await until(lambda: unread(harness))
            at_once = calls_module.WORK_OF_CONNECTION // calls_module.COST_OF_OTHERS
            assert len(unread(harness)) <= at_once


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
async def test_one_address_has_so_many_connections_and_no_more(tmp_path: Path, host: str) -> None:
    """The newest go, further ones are not answered until one is free; the others serve on."""
    limits = LimitSettings(max_connections_per_address=3)
    async with (
        serving(tmp_path, limits=limits, listen=Address(host, 0)) as harness,
        contextlib.AsyncExitStack() as stack,
    ):
        address = f"{host}:{Address.parse(harness.address).port}"

        async def connect() -> RawClient:
            return stack.enter_context(await in_thread(lambda: RawClient(address)))

        first = [await connect() for _ in range(5)]
        await until(lambda: harness.bound.calls.num_connections == 3)
        for client in first:
            stream = client.call(STATUS, b"")
            with contextlib.suppress(AssertionError):
                await in_thread(lambda c=client, s=stream: c.status(s))
        assert 2 == sum(client.closed for client in first)
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        late = stack.enter_context(socket.socket(family))
        late.settimeout(0.3)
        with pytest.raises(TimeoutError):
            late.connect((host, Address.parse(harness.address).port))
        late.close()
        next(client for client in first if not client.closed).socket.close()
        await until(lambda: harness.bound.calls.num_connections == 2)
        again = await connect()
        stream = again.call(STATUS, b"")
        assert 0 == (await in_thread(lambda: again.status(stream)))[0]


async def test_who_only_knocks_loses_the_connection(tmp_path: Path) -> None:
    """What it had sent behind is not even refused; one that carries a caller keeps it."""
    async with serving(tmp_path, anonymous=None) as harness:
        async with raw(harness) as client:
            for _ in range(400):
                client.open(QUOTE)
            await in_thread(lambda: client.until(lambda: client.closed))
        assert UNAUTHENTICATED_OF_CONNECTION <= len(harness.denied) < 400
        async with raw(harness) as client:
            who = client.open(STREAM, headers=[("authorization", "Bearer robot-token")])
            for _ in range(400):
                client.open(QUOTE)
            client.send(who, framed(JOB), end=True)
            assert 0 == (await in_thread(lambda: client.status(who)))[0]


def test_connections_are_looked_at_without_a_descriptor_to_spare() -> None:
    """A full table is when it matters most; the look neither needs nor breaks anything."""
    with socket.create_server(("127.0.0.1", 0)) as listening, contextlib.ExitStack() as stack:
        port = listening.getsockname()[1]
        peer = stack.enter_context(socket.create_connection(("127.0.0.1", port)))
        accepted = stack.enter_context(listening.accept()[0])
        connections = Connections(max_per_address=4)
        connections.follow(Address("127.0.0.1", port))
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (accepted.fileno() + 64, hard))
        try:
            with contextlib.suppress(OSError):
                while True:
                    stack.callback(os.close, os.open("/dev/null", os.O_RDONLY))
            assert [] == list(connections.scan())
            name = f"ipv4:127.0.0.1:{peer.getsockname()[1]}"
            assert [name] == list(connections.names())
            assert not connections.close(name), "it takes a descriptor to close one"
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize(
    ("soft", "hard", "expected", "asked"),
    [
        (65536, 65536, 1024, None),
        (1024, 65536, 1024, 1024 + OWN_FILES),
        (1024, resource.RLIM_INFINITY, 1024, 1024 + OWN_FILES),
        (resource.RLIM_INFINITY, resource.RLIM_INFINITY, 1024, None),
        (1024, 1024, 1024 - OWN_FILES, 1024),
        (256, 600, 300, 600),
    ],
)
def test_connections_leave_descriptors_for_the_rest(
    monkeypatch: pytest.MonkeyPatch, soft: int, hard: int, expected: int, asked: int | None
) -> None:
    """More are asked for where the system allows it; else there are fewer connections."""
    set_to: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "getrlimit", lambda _: (soft, hard))
    monkeypatch.setattr(resource, "setrlimit", lambda _, to: set_to.append(to))
    assert expected == connections_within(LimitSettings())
    assert ([] if asked is None else [(asked, hard)]) == set_to


@pytest.mark.parametrize(
    ("listen", "connect", "host"),
    [
        ("[::1]:0", "::1", "::1"),
        ("[::]:0", "127.0.0.1", "127.0.0.1"),
        ("127.0.0.1:0", "127.0.0.1", "127.0.0.1"),
    ],
)
async def test_a_connection_is_named_as_grpc_names_it(
    tmp_path: Path, listen: str, connect: str, host: str
) -> None:
    """Whatever the address looks like, an operator's word closes it."""
    patient = LimitSettings(write_timeout_s=3600)
    async with serving(tmp_path, listen=Address.parse(listen), limits=patient) as harness:
        port = Address.parse(harness.address).port
        client = await in_thread(lambda: RawClient(f"{connect}:{port}", window=0))
        with client:
            client.call(STREAM, JOB)
            await until(lambda: unread(harness))
            (seen,) = unread(harness)
            assert host == host_of(seen.connection)
            assert harness.bound.calls.close_connection(seen.connection)
            await in_thread(lambda: client.until(lambda: client.closed))


async def test_a_unix_sockets_calls_are_ended_and_counted(tmp_path: Path) -> None:
    """Its connections have no names: what is unread ends for us, and stays its account's."""
    path = tmp_path / "daemon.sock"
    async with serving(tmp_path, listen=UnixSocket(str(path)), limits=SHORT) as harness:
        client = await in_thread(lambda: RawClient(str(path), window=0))
        with client:
            client.call(STREAM, JOB)
            await until(lambda: [True] == [reply.ended for reply in unread(harness)])
            (seen,) = unread(harness)
            assert "unix" == host_of(seen.connection)
            assert not harness.bound.calls.close_connection(seen.connection)
            assert 1 == harness.bound.calls.num_connections
            assert harness.jobs.streams[0].cancelled.is_set()


async def test_connections_are_bounded_in_all(tmp_path: Path) -> None:
    """The transport refuses one more, whoever it is from."""
    limits = LimitSettings(max_connections=2)
    async with serving(tmp_path, limits=limits) as harness, raw(harness), raw(harness):
        with pytest.raises((AssertionError, OSError)):
            await in_thread(lambda: RawClient(harness.address))


async def test_a_connection_without_a_call_is_closed(tmp_path: Path) -> None:
    """Clients make another with their next call."""
    limits = LimitSettings(idle_connection_s=1.0)
    async with serving(tmp_path, limits=limits) as harness, raw(harness) as client:
        await in_thread(lambda: client.until(lambda: client.closed))
        with Client(harness.address) as other:
            assert (await in_thread(other.status)).version


async def test_who_says_nothing_is_hung_up_on(tmp_path: Path) -> None:
    """A connection that never speaks HTTP/2 costs nothing for long."""
    async with serving(tmp_path, limits=SHORT) as harness:
        reader, writer = await asyncio.open_connection(*harness.address.split(":"))
        async with asyncio.timeout(WAIT_S):
            while await reader.read(4096):
                pass
        writer.close()


async def test_more_calls_than_an_account_may_have_are_refused(tmp_path: Path) -> None:
    """By the headers, with the limit's name; operators get in."""
    limits = LimitSettings(max_account_calls=4)
    jobs = ScriptedJobs(events=(STARTED, DELTAS[0], FINISHED), hang=True)
    async with serving(tmp_path, limits=limits, jobs=jobs) as harness, raw(harness) as client:
        for _ in range(4):
            client.call(STREAM, JOB)
        await until(lambda: len(jobs.streams) == 4)
        stream = client.open(QUOTE)
        code, _ = await in_thread(lambda: client.status(stream))
        assert RESOURCE_EXHAUSTED == code
        assert ["open_calls"] == harness.denied
        with Client(harness.address, token=ADMIN) as operator:
            assert 5 == (await in_thread(operator.load)).open_calls


async def test_a_client_that_leaves_leaves_nothing(tmp_path: Path) -> None:
    """Reset in the middle of its request, of its reply, or with the connection."""
    async with serving(tmp_path) as harness, raw(harness, window=0) as client:
        sending, reading, hanging = (client.open(QUOTE) for _ in range(3))
        client.send(sending, framed(b"x" * 100)[:-1])
        client.send(reading, framed(b""), end=True)
        stream = client.call(STREAM, JOB)
        await until(lambda: harness.jobs.streams)
        for number in (sending, reading, stream):
            client.http2.reset_stream(number)
        client.flush()
        await until(harness.jobs.streams[0].cancelled.is_set)
        await until(lambda: harness.bound.calls.num_open == 1)
        assert hanging
        client.socket.close()
        await until(lambda: harness.bound.calls.num_open == 0)


async def test_turns_go_round_the_connections() -> None:
    """A line of one connection does not stand before the first of another."""
    turns = Turns(of_connection=2, of_account=3, overall=4)
    one = [Turn("a", "1", 1) for _ in range(6)]
    two, three = [Turn("a", "2", 1) for _ in range(2)], Turn("b", "3", 1)
    assert [False] * 2 + [True] * 4 == [turns.take(peer) is not None for peer in one]
    assert [False, True] == [turns.take(peer) is not None for peer in two]
    assert turns.take(three) is None
    assert all(turns.in_the_way(peer) for peer in (one[0], two[0], three))
    turns.leave(one[0])
    # The account's three are one of each connection's and one more: its lines take turns.
    assert [True, True, False] == [one[1].held, one[2].held, two[1].held]
    turns.leave(one[1])
    assert two[1].held
    for peer in (*one, *two, three):
        turns.leave(peer)
    assert turns.take(Turn("c", "4", 1)) is None


async def test_a_free_call_takes_as_much_of_the_turns_as_two_jobs() -> None:
    """And waits until there is so much of them; what it leaves is not more than it took."""
    turns = Turns(of_connection=4, of_account=6, overall=9)
    free, jobs = Turn("a", "1", 4), [Turn("a", "1", 2) for _ in range(2)]
    other = Turn("a", "2", 4)
    assert [None, None] == [turns.take(job) for job in jobs]
    assert turns.take(free) is not None
    assert turns.take(other) is not None
    turns.leave(jobs[0])
    assert [False, True] == [free.held, other.held]
    turns.leave(other)
    turns.leave(jobs[1])
    assert free.held
    turns.leave(free)
    assert all(turns.take(Turn("a", "1", 2)) is None for _ in range(2))


async def test_a_free_calls_turn_rests_and_a_jobs_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Free calls of one account, answered as fast as they come, are not all that is done."""
    monkeypatch.setattr(calls_module, "REST_S", 3600.0)
    at_once = calls_module.WORK_OF_CONNECTION // calls_module.COST_OF_OTHERS
    async with serving(tmp_path, limits=SHORT) as harness:
        status = harness.channel.unary_unary(STATUS)
        for _ in range(at_once):
            await status(b"", timeout=WAIT_S)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await status(b"", timeout=WAIT_S)
        assert "waiting for its turn" in str(caught.value.details())
    async with serving(tmp_path, jobs=ScriptedJobs()) as harness:
        run = harness.channel.unary_stream(STREAM)
        for _ in range(2 * calls_module.WORK_OF_CONNECTION):
            assert [reply async for reply in run(JOB, timeout=WAIT_S)]


async def test_a_conversation_has_its_turn_for_a_message_and_not_for_good(tmp_path: Path) -> None:
    """A stream of requests that goes on and on leaves the only turn to others in between."""
    limits = LimitSettings(max_receiving_bytes=1)  # one message at a time, of everybody
    async with serving(tmp_path, limits=limits) as harness:
        reflection = harness.channel.stream_stream(
            "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo"
        )
        request = reflection_pb2.ServerReflectionRequest(list_services="").SerializeToString()
        talk = reflection(timeout=WAIT_S)
        await talk.write(request)
        await talk.read()
        talking = True

        async def go_on() -> None:
            while talking:
                await talk.write(request)
                await talk.read()
            await talk.done_writing()
            assert grpc.aio.EOF is await talk.read()

        going = asyncio.ensure_future(go_on())
        health = harness.channel.unary_unary("/grpc.health.v1.Health/Check")
        for _ in range(3):
            await health(b"", timeout=WAIT_S)
        talking = False
        await going


async def test_watchers_of_the_health_refuse_nobody_a_check(tmp_path: Path) -> None:
    """Both ask for nobody's name, and share an address with all behind the same proxy."""
    limits = LimitSettings(max_account_calls=3)
    async with serving(tmp_path, limits=limits) as harness:
        watch = harness.channel.unary_stream(WATCH)
        watchers = [watch(b"", timeout=WAIT_S) for _ in range(3)]
        seen = [await call.read() for call in watchers]
        assert all(isinstance(status, bytes) for status in seen)
        watchers.append(watch(b"", timeout=WAIT_S))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await watchers[3].read()
        assert grpc.StatusCode.RESOURCE_EXHAUSTED is caught.value.code()
        check = harness.channel.unary_unary("/grpc.health.v1.Health/Check")
        assert await check(b"", timeout=WAIT_S) is not None
        for call in watchers:
            call.cancel()
