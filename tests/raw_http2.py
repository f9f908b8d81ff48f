"""Clients that misbehave frame by frame: windows of their choice, bodies that never end.

gRPC's own client reads what comes and closes what it opens; these do as a test or an attack says.
`RawConnection` is a socket and its HTTP/2; `RawClient` reads and writes on it with deadlines, for
tests; the attackers of `bench/attackers.py` never wait on it.
"""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType, TracebackType
from typing import Self

import h2.config
import h2.connection
import h2.errors
import h2.events
import h2.exceptions
import h2.settings

WAIT_S = 20.0
"""A deadline that only a hung test meets."""


class RawConnection:
    """One HTTP/2 connection; `window` is what each stream may send unread, until it is widened."""

    def __init__(
        self,
        connected: socket.socket,
        window: int,
        config: h2.config.H2Configuration,
        authority: str = "daemon",
        settings: Mapping[h2.settings.SettingCodes, int] = MappingProxyType({}),
    ) -> None:
        self.socket = connected
        self.http2 = h2.connection.H2Connection(config)
        codes = h2.settings.SettingCodes
        self.http2.local_settings = h2.settings.Settings(
            client=True, initial_values={codes.INITIAL_WINDOW_SIZE: window, **settings}
        )
        self._authority = authority
        self.http2.initiate_connection()

    def send_headers(
        self, method: str, token: str | None, headers: Iterable[tuple[str, str]] = ()
    ) -> int:
        """Begin a call in the connection's state, nothing is written yet; returns its stream."""
        stream = self.http2.get_next_available_stream_id()
        sent = [
            (":method", "POST"),
            (":scheme", "http"),
            (":path", method),
            (":authority", self._authority),
            ("content-type", "application/grpc"),
            ("te", "trailers"),
            *headers,
        ]
        if token is not None:
            sent.append(("authorization", f"Bearer {token}"))
        self.http2.send_headers(stream, sent)
        return stream


class RawClient(RawConnection):
    """A connection that reads and writes with deadlines, and keeps every event."""

    def __init__(self, address: str, *, window: int = 65_535, token: str | None = None) -> None:
        if address.startswith("/"):
            connected = socket.socket(socket.AF_UNIX)
            connected.connect(address)
        else:
            host, _, port = address.rpartition(":")
            connected = socket.create_connection((host, int(port)), timeout=WAIT_S)
        super().__init__(
            connected,
            window,
            h2.config.H2Configuration(client_side=True, header_encoding="utf-8"),
            settings={h2.settings.SettingCodes.ENABLE_PUSH: 0},
        )
        self.events: list[h2.events.Event] = []
        self.closed = False
        self._token = token
        self.flush()
        try:
            # The server's window and limits are known before anything is sent.
            self.until(lambda: self.count(h2.events.RemoteSettingsChanged) > 0)
        except BaseException:
            self.socket.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self.socket.close()

    @property
    def name(self) -> str:
        """The connection's name at the server."""
        host, port = self.socket.getsockname()[:2]
        return f"ipv4:{host}:{port}"

    def open(self, method: str, *, headers: Iterable[tuple[str, str]] = ()) -> int:
        """Send a call's headers; returns its stream."""
        stream = self.send_headers(method, self._token, headers)
        self.flush()
        return stream

    def send(self, stream: int, body: bytes, *, end: bool = False) -> None:
        """Send bytes of a stream, which its window has to take."""
        self.http2.send_data(stream, body, end_stream=end)
        self.flush()

    def call(self, method: str, *messages: bytes) -> int:
        """Open a call, send its messages, and close it from this side."""
        stream = self.open(method)
        self.send(stream, b"".join(map(framed, messages)), end=True)
        return stream

    def pour(self, streams: Iterable[int], num_bytes: int) -> int:
        """Send a message's start on every stream, as far as the server lets it; what was sent."""
        left = dict.fromkeys(streams, num_bytes)
        first = dict.fromkeys(left, True)
        sent = 0
        while True:
            progress = 0
            for stream, rest in left.items():
                try:
                    room = self.http2.local_flow_control_window(stream)
                except h2.exceptions.StreamClosedError:
                    continue
                size = min(room, rest, self.http2.max_outbound_frame_size)
                if size < 5:
                    continue
                start = struct.pack(">BI", 0, num_bytes) if first[stream] else b""
                first[stream] = False
                try:
                    self.http2.send_data(stream, (start + bytes(size))[:size])
                except h2.exceptions.StreamClosedError:
                    continue
                left[stream] -= size
                progress += size
            self.flush()
            sent += progress
            # A moment without a wider window is the end: there is nothing else to wait on.
            if not self.pump(0.01 if progress else 0.3) and not progress:
                return sent

    def flush(self) -> None:
        """Write what HTTP/2 has to say."""
        self.socket.settimeout(WAIT_S)
        try:
            self.socket.sendall(self.http2.data_to_send())
        except OSError:
            self.closed = True

    def pump(self, timeout_s: float = 0.05) -> list[h2.events.Event]:
        """Read once; returns what came."""
        self.socket.settimeout(timeout_s)
        try:
            data = self.socket.recv(65_536)
        except TimeoutError:
            return []
        except OSError:
            data = b""
        if not data:
            self.closed = True
            return []
        events = self.http2.receive_data(data)
        self.events += events
        self.flush()
        return events

    def until(self, done: Callable[[], bool]) -> None:
        """Read until it is true."""
        deadline = time.monotonic() + WAIT_S
        while not done():
            assert time.monotonic() < deadline, "this never came"
            if self.closed:
                assert done(), "the connection closed before this came"
                return
            self.pump()

    def status(self, stream: int) -> tuple[int, str]:
        """Wait for a call's status: its code and message."""
        ends = (h2.events.TrailersReceived, h2.events.ResponseReceived)

        def found() -> dict[str, str]:
            for event in self.events:
                if isinstance(event, ends) and event.stream_id == stream:
                    headers = {str(k): str(v) for k, v in event.headers or ()}
                    if "grpc-status" in headers:
                        return headers
            return {}

        self.until(lambda: bool(found()))
        return int(found()["grpc-status"]), found().get("grpc-message", "")

    def count(self, kind: type[h2.events.Event]) -> int:
        """How many events of a kind came."""
        return sum(isinstance(event, kind) for event in self.events)

    def widen(self, stream: int, num_bytes: int = 65_535) -> None:
        """Let a stream send more."""
        self.http2.increment_flow_control_window(num_bytes, stream)
        self.flush()


def framed(message: bytes) -> bytes:
    """A message as gRPC sends it."""
    return struct.pack(">BI", 0, len(message)) + message
