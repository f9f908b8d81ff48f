"""A gRPC client that costs next to nothing, so that it does not slow down what it measures.

On a machine with few cores an ordinary Python client takes as much processor time as the daemon
and takes it from the daemon. This one speaks just enough HTTP/2 for server-streamed calls: it
writes a request as prepared bytes, and of a reply it looks at frame headers and at the first
byte of each message; messages are parsed after the clock has stopped. It runs in a process of
its own and takes orders through a pipe. Errors of the protocol or of a call end it loudly.
"""

from __future__ import annotations

import multiprocessing
import selectors
import socket
import struct
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_DATA, _HEADERS, _RST_STREAM, _SETTINGS, _PING, _GOAWAY, _WINDOW = 0, 1, 3, 4, 6, 7, 8
_END_STREAM, _END_HEADERS, _ACK = 1, 4, 1
_WIDE = 2**31 - 1
_FIRST_WINDOW = 65535
_DELTA = 0x12
"""First byte of a GenerateStreamResponse whose event is a delta (field 2, a message)."""

_TIMEOUT_S = 300.0
_FOREVER_S = float("inf")


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
            _PREFACE
            + _frame(_SETTINGS, 0, 0, settings)
            + _frame(_WINDOW, 0, 0, struct.pack(">I", _WIDE - _FIRST_WINDOW))
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
                if kind == _SETTINGS:
                    news.discard(bool(flags & _ACK))
        self._socket.sendall(_frame(_SETTINGS, _ACK, 0, b""))

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
            return _frame(_HEADERS, _END_HEADERS, stream, head) + _frame(
                _DATA, _END_STREAM, stream, message
            )

        self._socket.sendall(b"".join(begin() for _ in range(min(at_once, len(waiting)))))
        while live:
            now = self._receive()
            out: list[bytes] = []
            for kind, flags, stream, payload in self._frames():
                if kind == _DATA:
                    _take(live[stream], parts[stream], payload, now)
                elif kind == _SETTINGS and not flags & _ACK:
                    out.append(_frame(_SETTINGS, _ACK, 0, b""))
                elif kind == _PING and not flags & _ACK:
                    out.append(_frame(_PING, _ACK, 0, bytes(payload)))
                elif kind in (_RST_STREAM, _GOAWAY):
                    raise RuntimeError(f"frame {kind} of stream {stream}: {bytes(payload)!r}")
                if kind in (_DATA, _HEADERS) and flags & _END_STREAM:
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


def _frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload
