"""The HTTP endpoint that Prometheus scrapes, on an event loop and a thread of its own.

Owns who may scrape (`PageAccess`) and what bounds it: a deadline for a connection as a whole, from
its first byte to the last of the answer, and a number of connections, in all and of one address.
Who is slow gives way to who is new, so that sockets which only hold on cannot keep a scraper out.
Own thread, because a page takes milliseconds to write, and because a daemon whose loop stands
still must be seen to.
Does not know HTTP, which is uvicorn's and h11's, nor the series: `prometheus_client` writes the
page. What a client does wrong is no news; a scrape that fails on our side is a 500 and is logged.
"""

from __future__ import annotations

import asyncio
import logging
import re
import socket
import ssl
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, Self
from urllib.parse import urlsplit

import uvicorn
from prometheus_client import CollectorRegistry, make_asgi_app
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.protocols.utils import get_remote_addr

MAX_CONNECTIONS = 32
"""Scrapes at once."""

MAX_ADDRESS_CONNECTIONS = 16
"""Of one address."""

DEADLINE_S = 10.0
"""For a connection, handshake, request and answer together: Prometheus waits no longer."""

_TEXT = (b"content-type", b"text/plain; charset=utf-8")
_MAX_HEAD_BYTES = 16 * 1024
_BACKLOG = 64
_LAST_WORDS_S = 1

_VERSION = re.compile(r"version=([^;,]*)")
_NUMBERS = re.compile(r"\d{1,9}(\.\d{1,9}){0,9}\s*")

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PageAccess:
    """Who may read the page, and over what.

    Attributes:
        admit: from the values of the `authorization` header to OK, UNAUTHORIZED or FORBIDDEN.
            Called in the server's thread.
        tls: the context of a connection that begins now; without it, plain HTTP.
    """

    admit: Callable[[Sequence[str]], HTTPStatus] = lambda _: HTTPStatus.OK
    tls: Callable[[], ssl.SSLContext] | None = None


OPEN_PAGE = PageAccess()
"""Anyone who can connect."""


class MetricsServer:
    """Serves one registry until `close`, or as a context manager.

    Raises `OSError` where it cannot bind.
    """

    def __init__(
        self,
        registry: CollectorRegistry,
        host: str,
        port: int,
        *,
        deadline_s: float = DEADLINE_S,
        access: PageAccess = OPEN_PAGE,
    ) -> None:
        self._socket = _bound(host, port)
        self.port = int(self._socket.getsockname()[1])
        """The port, also where 0 was asked for."""
        self._places = _Places()

        def connection(**given: Any) -> _Connection:  # noqa: ANN401 - uvicorn's
            return _Connection(self._places, deadline_s, access.tls, **given)

        config = uvicorn.Config(
            _Page(registry, access),
            # It is called like the class that it stands for.
            http=connection,  # type: ignore[arg-type]
            ws="none",
            lifespan="off",
            interface="asgi3",
            log_config=None,
            log_level="critical",
            access_log=False,
            server_header=False,
            # One request a connection, so that one deadline is enough.
            headers=[("connection", "close")],
            h11_max_incomplete_event_size=_MAX_HEAD_BYTES,
            timeout_graceful_shutdown=_LAST_WORDS_S,
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._run, name="metrics", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        asyncio.run(self._serve())

    async def _serve(self) -> None:
        # Without file descriptors asyncio pauses for a second before it accepts again, and says
        # so each time; a socket that broke is no news either.
        asyncio.get_running_loop().set_exception_handler(_report)
        try:
            await self._server.serve([self._socket])
        finally:
            self._places.close()

    @property
    def num_connections(self) -> int:
        """Connections that are open now."""
        return len(self._places)

    def close(self) -> None:
        """Stops serving; returns when the thread has ended."""
        self._server.should_exit = True
        self._thread.join(timeout=5)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _bound(host: str, port: int) -> socket.socket:
    """Return a listening socket; connections wait in it until the thread takes them."""
    family, *_, address = socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    return socket.create_server((str(address[0]), int(address[1])), family=family, backlog=_BACKLOG)


def _report(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    if not isinstance(context.get("exception"), OSError):
        loop.default_exception_handler(context)


class _Places:
    """The connections there are, in the order of their arrival; each leaves by itself."""

    def __init__(self) -> None:
        self._taken: dict[_Connection, None] = {}

    def __len__(self) -> int:
        return len(self._taken)

    def enter(self, new: _Connection) -> None:
        """Take a place; if none is free, of the oldest that has not asked, or else the oldest."""
        own = [held for held in self._taken if held.address == new.address]
        if len(own) >= MAX_ADDRESS_CONNECTIONS:
            self._evict(own)
        elif len(self._taken) >= MAX_CONNECTIONS:
            self._evict(self._taken)
        self._taken[new] = None

    def leave(self, connection: _Connection) -> None:
        """Free its place; it may have none."""
        self._taken.pop(connection, None)

    def close(self) -> None:
        """Abort what there is."""
        for held in tuple(self._taken):
            held.abort()

    @staticmethod
    def _evict(held: Iterable[_Connection]) -> None:
        oldest = next(iter(held))
        next((slow for slow in held if not slow.has_asked), oldest).abort()


class _Connection(H11Protocol):
    """One connection: a place, a deadline, the handshake if there is one, then uvicorn's.

    It is encrypted here and not by the listening socket, so that one which stalls its handshake
    is one of those that are counted and have a deadline.
    """

    def __init__(
        self,
        places: _Places,
        deadline_s: float,
        tls: Callable[[], ssl.SSLContext] | None,
        **given: Any,  # noqa: ANN401 - uvicorn's
    ) -> None:
        super().__init__(**given)
        self.address: str | None = None
        self._places = places
        self._deadline_s = deadline_s
        self._tls = tls
        self._socket_transport: asyncio.Transport | None = None
        self._deadline: asyncio.TimerHandle | None = None
        self._handshake: asyncio.Task[None] | None = None
        self._early: list[bytes] = []

    @property
    def has_asked(self) -> bool:
        """Whether its request is complete."""
        return self.cycle is not None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override] # as uvicorn has it
        """Take a place and begin."""
        self._socket_transport = transport
        peer = get_remote_addr(transport)
        self.address = peer[0] if peer else None
        self._places.enter(self)
        self._deadline = self.loop.call_later(self._deadline_s, self.abort)
        if self._tls is None:
            super().connection_made(transport)
            return
        transport.pause_reading()  # the handshake is not this protocol's to read
        self._handshake = self.loop.create_task(self._encrypt(transport, self._tls()))

    async def _encrypt(self, transport: asyncio.Transport, context: ssl.SSLContext) -> None:
        try:
            encrypted = await self.loop.start_tls(
                transport,
                self,
                context,
                server_side=True,
                ssl_handshake_timeout=self._deadline_s,
                ssl_shutdown_timeout=self._deadline_s,
            )
        except OSError:  # which an SSLError is
            encrypted = None
        if encrypted is None:
            self.abort()
            return
        super().connection_made(encrypted)
        early, self._early = self._early, []
        for data in early:
            self.data_received(data)

    def data_received(self, data: bytes) -> None:
        """Pass on what arrives, once the handshake is known to be over."""
        if self.transport is None:
            self._early.append(data)
        else:
            super().data_received(data)

    def connection_lost(self, exc: Exception | None) -> None:
        """Free the place."""
        self._leave()
        if self.transport is not None:
            super().connection_lost(exc)

    def abort(self) -> None:
        """Close it now, whatever is under way."""
        self._leave()
        if self._socket_transport is not None:
            self._socket_transport.abort()

    def _leave(self) -> None:
        self._places.leave(self)
        if self._deadline is not None:
            self._deadline.cancel()


class _Page:
    """The ASGI application: the library's own, behind the access check."""

    def __init__(self, registry: CollectorRegistry, access: PageAccess) -> None:
        self._write = make_asgi_app(registry)
        self._access = access

    async def __call__(self, scope: Any, receive: Any, send: Callable[..., Any]) -> None:  # noqa: ANN401 - ASGI's
        status, headers, body = self._refusal(scope)
        if status is HTTPStatus.OK:
            try:
                await self._write(_readable(scope), receive, send)
            except Exception:  # noqa: BLE001 - ours; the page is made before the first byte is sent
                _log.exception("a scrape failed")
                status, body = HTTPStatus.INTERNAL_SERVER_ERROR, b"a scrape failed; see the log\n"
            else:
                return
        headers = [*headers, (b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    def _refusal(self, scope: Any) -> tuple[HTTPStatus, list[tuple[bytes, bytes]], bytes]:  # noqa: ANN401 - ASGI's
        """Return OK where the page is to be sent, else the answer: status, headers and body."""
        try:
            path = urlsplit(scope["path"]).path
        except ValueError:
            return HTTPStatus.BAD_REQUEST, [_TEXT], b"no such path\n"
        if path not in {"/", "/metrics"}:
            # A health probe on a path that is not served must not always pass.
            return HTTPStatus.NOT_FOUND, [_TEXT], b"the metrics are at /metrics\n"
        if scope["method"] != "GET":
            return HTTPStatus.METHOD_NOT_ALLOWED, [(b"allow", b"GET")], b""
        admitted = self._access.admit(_values(scope, b"authorization"))
        if admitted is HTTPStatus.UNAUTHORIZED:  # which has to say how to authenticate
            return admitted, [(b"www-authenticate", b'Bearer realm="sage-fed"')], b""
        return admitted, [], b""


def _readable(scope: Any) -> Any:  # noqa: ANN401 - ASGI's
    """Return a scope with the headers that the library reads, without those that it fails on."""
    headers = [
        (name, value)
        for name, value in scope["headers"]
        if name in {b"accept", b"accept-encoding"}
        and value.isascii()
        and all(map(_NUMBERS.fullmatch, _VERSION.findall(value.decode())))
    ]
    return {**scope, "headers": headers}


def _values(scope: Any, name: bytes) -> list[str]:  # noqa: ANN401 - ASGI's
    """Return the values of a header."""
    return [value.decode("latin-1") for key, value in scope["headers"] if key == name]
