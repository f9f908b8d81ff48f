"""The load on a daemon or an executor: what is asked, how many at once or how often, and by whom.

Owns: closed and open loops over any way to ask; requests as they travel; a gRPC client that costs
next to nothing, in a process of its own; the times and tokens that a stream brought.
Does not know: what is measured, nor how clients misbehave (`behaviours`, `attackers`).

gRPC and protobuf are imported where they are used: on a bare GPU machine there is only torch.

On a machine with few cores an ordinary Python client takes as much processor time as the daemon
and takes it from the daemon. `LeanClient` speaks just enough HTTP/2 for server-streamed calls: it
writes a request as prepared bytes, and of a reply it looks at frame headers and at the first
byte of each message; messages are parsed after the clock has stopped. It takes orders through a
pipe. Errors of the protocol or of a call end it loudly.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import selectors
import socket
import struct
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any, TypeVar

from sage_fed.core import Tier

if TYPE_CHECKING:
    import grpc

    from sage_fed.v1 import inference_pb2

METHOD = "/sage_fed.v1.InferenceService/GenerateStream"
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PING, GOAWAY, WINDOW, CONTINUATION = (
    0, 1, 2, 3, 4, 6, 7, 8, 9,
)  # fmt: skip
_END_STREAM, _END_HEADERS, _ACK = 1, 4, 1
_WIDE = 2**31 - 1
_FIRST_WINDOW = 65535
_DELTA = 0x12
"""First byte of a GenerateStreamResponse whose event is a delta (field 2, a message)."""

_TIMEOUT_S = 300.0
_FOREVER_S = float("inf")


Item = TypeVar("Item")
Ask = Callable[[Item], Awaitable[object]]
"""One request, from its sending to its ending."""


@dataclass(frozen=True, slots=True)
class Load:
    """`streams` closed loops of one kind of request."""

    tier: Tier
    streams: int
    prompt_tokens: int
    new_tokens: int


async def closed_loop(clients: Iterable[Ask[Item]], items: Iterator[Item]) -> None:
    """Let each client ask for the next item when its last was answered, until there is none."""

    async def one(ask: Ask[Item]) -> None:
        for item in items:
            await ask(item)

    async with asyncio.TaskGroup() as group:
        for ask in clients:
            group.create_task(one(ask))


async def open_loop(ask: Ask[int], per_s: float, seconds: float) -> None:
    """Ask at a rate, whatever becomes of the requests before; wait for all of them."""
    began_s = time.monotonic()
    async with asyncio.TaskGroup() as group:
        for number in range(int(per_s * seconds)):
            late_s = began_s + number / per_s - time.monotonic()
            if late_s > 0:
                await asyncio.sleep(late_s)
            elif number % 16 == 0:
                await asyncio.sleep(0)
            group.create_task(_ask(ask, number))


async def _ask(ask: Ask[int], number: int) -> None:
    await ask(number)


def before(until: float) -> Iterator[float]:
    """The time (monotonic), again and again, until it is `until`."""
    while (now := time.monotonic()) < until:
        yield now


def stream_request(
    prompt: str | Sequence[int],
    new_tokens: int,
    tier: Tier | None = None,
    **sampling: Any,  # noqa: ANN401 - protobuf's fields
) -> inference_pb2.GenerateStreamRequest:
    """A streamed job of exactly so many tokens; tactical where no tier is named."""
    from sage_fed.v1 import inference_pb2, types_pb2  # noqa: PLC0415

    deep = tier is Tier.STRATEGIC
    job = types_pb2.JobSpec(
        tier=types_pb2.TIER_STRATEGIC if deep else types_pb2.TIER_TACTICAL,
        sampling=types_pb2.SamplingParams(max_new_tokens=new_tokens, ignore_eos=True, **sampling),
    )
    if isinstance(prompt, str):
        job.text = prompt
    else:
        job.token_ids.ids.extend(prompt)
    return inference_pb2.GenerateStreamRequest(job=job)


async def stream_times(call: grpc.aio.UnaryStreamCall[Any, Any]) -> tuple[float, float]:
    """Read a stream to its end: seconds from now to its first delta, and to its end."""
    began, first = time.perf_counter(), 0.0
    async for response in call:
        if not first and response.WhichOneof("event") == "delta":
            first = time.perf_counter()
    return first - began, time.perf_counter() - began


def tokens_of(reply: Reply) -> int:
    """The tokens that came."""
    from sage_fed.v1 import inference_pb2  # noqa: PLC0415

    deltas = map(inference_pb2.GenerateStreamResponse.FromString, reply.messages)
    return sum(len(message.delta.token_ids) for message in deltas)


def tokens_within(reply: Reply, window: tuple[float, float]) -> float:
    """Those of them that came in a span of time, as if they had come evenly."""
    tokens = tokens_of(reply)
    if reply.last <= reply.first:
        return tokens if window[0] <= reply.first <= window[1] else 0
    overlap = min(reply.last, window[1]) - max(reply.first, window[0])
    return tokens * max(overlap, 0.0) / (reply.last - reply.first)


@dataclass
class Reply:
    """One call's times (`time.perf_counter()`, which all processes share) and messages."""

    sent: float = 0.0
    first: float = 0.0
    """When the first delta came."""

    last: float = 0.0
    """When the last delta came."""

    end: float = 0.0
    messages: list[bytes] = field(default_factory=list)


@dataclass
class Run:
    """What a run of calls took; `cpu_s` is this client's own processor time."""

    replies: list[Reply]
    cpu_s: float


class LeanClient:
    """The process; `run` makes calls of one method, a number of them at once."""

    def __init__(self, address: str) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(address, theirs), daemon=True)
        self._process.start()
        theirs.close()

    def run(
        self, method: str, requests: Sequence[bytes], at_once: int, seconds: float = _FOREVER_S
    ) -> Run:
        """Make the calls, each when one before it has ended; wait for all of them.

        After `seconds` no more of them are begun.
        """
        self._pipe.send((method, list(requests), at_once, seconds))
        answer: Any = self._pipe.recv()
        if isinstance(answer, str):
            raise RuntimeError(answer)  # noqa: TRY004 - what the process said
        assert isinstance(answer, Run)
        return answer

    def close(self) -> None:
        """End the process."""
        self._pipe.send(None)
        self._process.join(10.0)


def _serve(address: str, pipe: Connection) -> None:
    while (order := pipe.recv()) is not None:
        method, requests, at_once, seconds = order
        try:
            # One connection a run: between runs nobody would answer its pings.
            connection = _Http2(address)
            begun = time.process_time()
            replies = connection.calls(method, requests, at_once, seconds)
            connection.close()
        except (OSError, RuntimeError) as error:
            pipe.send(f"the lean client failed: {error}")
            return
        pipe.send(Run(replies, time.process_time() - begun))


class _Http2:
    """One connection; no flow control to speak of, because our windows are as wide as they get."""

    def __init__(self, address: str) -> None:
        host, _, port = address.rpartition(":")
        self._authority = address.encode()
        self._socket = socket.create_connection((host, int(port)), _TIMEOUT_S)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._socket, selectors.EVENT_READ)
        settings = struct.pack(">HIHI", 4, _WIDE, 5, 2**20)
        self._socket.sendall(
            PREFACE
            + frame(SETTINGS, 0, 0, settings)
            + frame(WINDOW, 0, 0, struct.pack(">I", _WIDE - _FIRST_WINDOW))
        )
        self._buffer = bytearray()
        self._next_stream = 1
        self._greet()

    def close(self) -> None:
        self._selector.close()
        self._socket.close()

    def _greet(self) -> None:
        """Wait for the daemon's settings and for its word on ours."""
        news = {False, True}
        while news:
            self._receive()
            for kind, flags, _, _ in self._frames():
                if kind == SETTINGS:
                    news.discard(bool(flags & _ACK))
        self._socket.sendall(frame(SETTINGS, _ACK, 0, b""))

    def calls(
        self, method: str, requests: Sequence[bytes], at_once: int, seconds: float
    ) -> list[Reply]:
        head = self._head(method)
        until = time.perf_counter() + seconds
        waiting, live, done = deque(requests), dict[int, Reply](), list[Reply]()
        parts: dict[int, bytearray] = {}

        def begin() -> bytes:
            body, stream = waiting.popleft(), self._next_stream
            self._next_stream += 2
            live[stream] = Reply(sent=time.perf_counter())
            parts[stream] = bytearray()
            message = struct.pack(">BI", 0, len(body)) + body
            return frame(HEADERS, _END_HEADERS, stream, head) + frame(
                DATA, _END_STREAM, stream, message
            )

        self._socket.sendall(b"".join(begin() for _ in range(min(at_once, len(waiting)))))
        while live:
            now = self._receive()
            out: list[bytes] = []
            for kind, flags, stream, payload in self._frames():
                if kind == DATA:
                    _take(live[stream], parts[stream], payload, now)
                elif kind == SETTINGS and not flags & _ACK:
                    out.append(frame(SETTINGS, _ACK, 0, b""))
                elif kind == PING and not flags & _ACK:
                    out.append(frame(PING, _ACK, 0, bytes(payload)))
                elif kind in (RST_STREAM, GOAWAY):
                    raise RuntimeError(f"frame {kind} of stream {stream}: {bytes(payload)!r}")
                if kind in (DATA, HEADERS) and flags & _END_STREAM:
                    reply = live.pop(stream)
                    reply.end = now
                    done.append(reply)
                    if waiting and now < until:
                        out.append(begin())
            if out:
                self._socket.sendall(b"".join(out))
        return done

    def _receive(self) -> float:
        """Wait for bytes; the time at which they were there."""
        if not self._selector.select(_TIMEOUT_S):
            raise RuntimeError("no answer in time")
        received = self._socket.recv(1 << 18)
        now = time.perf_counter()
        if not received:
            raise RuntimeError("the daemon closed the connection")
        self._buffer += received
        return now

    def _frames(self) -> Iterator[tuple[int, int, int, bytes]]:
        buffer, position = self._buffer, 0
        while len(buffer) - position >= 9:
            length = int.from_bytes(buffer[position : position + 3], "big")
            end = position + 9 + length
            if len(buffer) < end:
                break
            stream = int.from_bytes(buffer[position + 5 : position + 9], "big")
            yield (
                buffer[position + 3],
                buffer[position + 4],
                stream,
                bytes(buffer[position + 9 : end]),
            )
            position = end
        del buffer[:position]

    def _head(self, method: str) -> bytes:
        """The request's headers in HPACK's plainest form: literal, neither indexed nor packed."""
        headers = (
            (b":method", b"POST"),
            (b":scheme", b"http"),
            (b":path", method.encode()),
            (b":authority", self._authority),
            (b"content-type", b"application/grpc"),
            (b"te", b"trailers"),
        )
        return b"".join(
            b"\0" + bytes((len(name),)) + name + bytes((len(value),)) + value
            for name, value in headers
        )


def _take(reply: Reply, part: bytearray, payload: bytes, now: float) -> None:
    """Add a frame's bytes to the call's message under way; whole messages go to the reply."""
    part += payload
    while len(part) >= 5:
        end = 5 + int.from_bytes(part[1:5], "big")
        if len(part) < end:
            return
        reply.messages.append(bytes(part[5:end]))
        if end > 5 and part[5] == _DELTA:
            reply.first = reply.first or now
            reply.last = now
        del part[:end]


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    """An HTTP/2 frame."""
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload
