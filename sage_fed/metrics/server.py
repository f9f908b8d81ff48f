"""The HTTP endpoint that Prometheus scrapes, in threads of its own.

Owns who may scrape (`PageDoor`) and what bounds it: the number of connections, how long each may
stall, and a pause where none can be accepted, so that whoever connects here costs the daemon
neither threads nor file descriptors nor a busy core. What a client does wrong is no news; a scrape
that fails on our side is a 500 and is logged. Does not know the series: `prometheus_client` writes
the page.
"""

from __future__ import annotations

import contextlib
import logging
import re
import socket
import socketserver
import ssl
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, Self
from urllib.parse import urlsplit

from prometheus_client import CollectorRegistry, MetricsHandler

MAX_CONNECTIONS = 8
"""Scrapes at once; a client beyond them is disconnected and comes again at its next interval."""

TIMEOUT_S = 5.0
"""A connection that neither sends nor takes anything for so long is closed."""

_ACCEPT_PAUSE_S = 0.5
"""After a connection that could not be accepted: it stays at the head of the queue."""

_VERSION = re.compile(r"version=([^;,]*)")
_NUMBERS = re.compile(r"\d{1,9}(\.\d{1,9}){0,9}\s*")

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PageDoor:
    """Who may read the page, and over what.

    Attributes:
        admit: from the values of the `authorization` header to OK, UNAUTHORIZED or FORBIDDEN.
            Called in threads.
        tls: the context of a connection that begins now; without it, plain HTTP.
    """

    admit: Callable[[Sequence[str]], HTTPStatus] = lambda _: HTTPStatus.OK
    tls: Callable[[], ssl.SSLContext] | None = None


OPEN_PAGE = PageDoor()
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
        timeout_s: float = TIMEOUT_S,
        door: PageDoor = OPEN_PAGE,
    ) -> None:
        self._server = ScrapeServer(registry, host, port, timeout_s=timeout_s, door=door)
        self._thread = threading.Thread(
            target=self._server.serve_forever, name="metrics", daemon=True
        )
        self._thread.start()

    @property
    def port(self) -> int:
        """The port, also where 0 was asked for."""
        return int(self._server.server_address[1])

    def close(self) -> None:
        """Stops serving; returns when the thread has ended."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(timeout=5)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class ScrapeServer(socketserver.ThreadingTCPServer):
    """One thread a connection, and at most `MAX_CONNECTIONS` of them."""

    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 64

    def __init__(
        self,
        registry: CollectorRegistry,
        host: str,
        port: int,
        *,
        timeout_s: float,
        pause: Callable[[float], None] = time.sleep,
        door: PageDoor = OPEN_PAGE,
    ) -> None:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        self.address_family, *_, address = found[0]
        self._places = threading.BoundedSemaphore(MAX_CONNECTIONS)
        self._pause = pause
        self._timeout_s = timeout_s
        self._door = door
        own = {"registry": registry, "timeout": timeout_s, "door": door}
        handler = type("Handler", (_Handler,), own)
        super().__init__((str(address[0]), int(address[1])), handler)

    def get_request(self) -> Any:  # noqa: ANN401 - the base class does not type it
        """Accept a connection."""
        try:
            return super().get_request()
        except OSError:
            # Out of file descriptors: asking again at once would keep a core busy.
            self._pause(_ACCEPT_PAUSE_S)
            raise

    def verify_request(self, request: Any, client_address: Any) -> bool:  # noqa: ANN401, ARG002
        """Whether a place is free; where none is, the connection is closed."""
        return self._places.acquire(blocking=False)

    def process_request(self, request: Any, client_address: Any) -> None:  # noqa: ANN401
        """Begin a thread for a connection."""
        try:
            super().process_request(request, client_address)
        except BaseException:  # no thread began that would free the place
            self._places.release()
            raise

    def finish_request(self, request: Any, client_address: Any) -> None:  # noqa: ANN401
        """Answer; in the connection's thread, before the connection is closed."""
        try:
            if self._door.tls is None:
                super().finish_request(request, client_address)
                return
            # Here and not where connections are accepted: a client that stalls its handshake
            # holds one place, and not the door.
            request.settimeout(self._timeout_s)
            with contextlib.closing(
                self._door.tls().wrap_socket(request, server_side=True)
            ) as encrypted:
                super().finish_request(encrypted, client_address)
        finally:
            self._places.release()

    def handle_error(self, request: Any, client_address: Any) -> None:  # noqa: ANN401, ARG002
        """Log what went wrong, unless it is that the client broke off."""
        if not isinstance(sys.exception(), OSError):
            _log.exception("a scrape failed")


_PATHS = ("/", "/metrics")


class _Handler(MetricsHandler):
    """The library's handler, which fails on requests that it does not expect."""

    door: PageDoor

    def do_GET(self) -> None:  # noqa: N802 - the base class names it
        """Answer with the page, in a format that the client takes or in plain text."""
        versions = _VERSION.findall(self.headers.get("Accept", ""))
        if not all(_NUMBERS.fullmatch(version) for version in versions):
            del self.headers["Accept"]
        try:
            path = urlsplit(self.path).path
        except ValueError:
            self.send_error(400)
            return
        if path not in _PATHS:
            # A health probe on a path that nobody serves must not always pass.
            self.send_error(404, "the metrics are at /metrics")
            return
        admitted = self.door.admit(self.headers.get_all("Authorization", []))
        if admitted is not HTTPStatus.OK:
            self._refuse(admitted)
            return
        try:
            super().do_GET()
        except OSError:
            raise
        except Exception:  # noqa: BLE001 - ours; the page is made before the first byte is sent
            _log.exception("a scrape failed")
            self.send_error(500)

    def _refuse(self, status: HTTPStatus) -> None:
        """Answer without the page; a 401 has to say how to be let in."""
        self.send_response(status)
        if status is HTTPStatus.UNAUTHORIZED:
            self.send_header("WWW-Authenticate", 'Bearer realm="sage-fed"')
        self.send_header("Content-Length", "0")
        self.end_headers()
