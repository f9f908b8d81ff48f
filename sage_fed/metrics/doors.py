"""Who was not let in or was thrown out, what is open, and which tokens and certificate hold.

Called on the event loop.
"""

from __future__ import annotations

from sage_fed.metrics.series import Factory

DENIALS = (
    "unauthenticated",
    "forbidden",
    "requests_per_minute",
    "concurrent_jobs",
    "waiting",
    "open_calls",
    "unread_replies",
    "unread_bytes",
)
CALLS_ENDED = ("receive", "write", "pressure", "unread", "operator")
CONNECTIONS_CLOSED = ("per_address", "unread", "strangers", "operator")
WATCHED = ("tokens", "certificate")
DONE, BROKEN = "done", "failed"


class DoorSeries:
    """What happened at the doors; account names stay out of it."""

    def __init__(self, make: Factory) -> None:
        self.denied = make.counter(
            "calls_denied_total", "Calls that were not let in, before anything was held.", "reason"
        )
        self.reloads = make.counter(
            "reloads_total",
            "Times that a changed file was read again; after a failed one the old one holds.",
            *("file", "outcome"),
        )
        self.reload_good = make.gauge(
            "last_reload_successful",
            "Whether what the file holds is what is in force: 0 after a reload that failed.",
            "file",
        )
        self.certificate_expiry = make.gauge(
            "tls_certificate_expiry_timestamp_seconds",
            "When the certificate in use expires, in seconds since 1970; 0 without one.",
        )
        self.calls_ended = make.counter(
            "calls_ended_total",
            "Calls that were ended because their peer did not send or read in time (receive, "
            "write), kept others waiting (pressure), had too much unread, or by an operator.",
            "why",
        )
        self.connections_closed = make.counter(
            "connections_closed_total",
            "Connections that were closed: too many of one address, too much unread, nothing but "
            "calls of nobody who may call, or by an operator.",
            "why",
        )
        self.open_calls = make.gauge("open_calls", "Calls in progress.")
        self.connections = make.gauge("connections", "Connections to the gRPC port.")
        self.full_addresses = make.gauge(
            "full_addresses",
            "Addresses that have as many connections as they may; further ones are not answered.",
        )
        self.unread_replies = make.gauge(
            "unread_replies", "Replies that have waited for their readers for a second or longer."
        )
        self.unread_bytes = make.gauge("unread_bytes", "What is kept for those readers, about.")
        for why in CALLS_ENDED:
            self.calls_ended.labels(why)
        for why in CONNECTIONS_CLOSED:
            self.connections_closed.labels(why)
        for reason in DENIALS:
            self.denied.labels(reason)
        for file in WATCHED:
            self.reload_good.labels(file).set(1)
            for outcome in (DONE, BROKEN):
                self.reloads.labels(file, outcome)


class DoorMetrics:
    """Counts refused calls and reloads."""

    def __init__(self, make: Factory) -> None:
        self._series = DoorSeries(make)

    def call_denied(self, reason: str) -> None:
        """Counts a call that was not let in."""
        self._series.denied.labels(reason).inc()

    def call_ended(self, why: str) -> None:
        """Counts a call that its peer was too slow for, or that an operator ended."""
        self._series.calls_ended.labels(why).inc()

    def connection_closed(self, why: str) -> None:
        """Counts a connection that was closed."""
        self._series.connections_closed.labels(why).inc()

    def calls_seen(
        self, *, calls: int, unread: int, unread_bytes: int, connections: int, full_addresses: int
    ) -> None:
        """Shows what is open now."""
        self._series.open_calls.set(calls)
        self._series.unread_replies.set(unread)
        self._series.unread_bytes.set(unread_bytes)
        self._series.connections.set(connections)
        self._series.full_addresses.set(full_addresses)

    def reloaded(self, file: str, *, failed: bool = False) -> None:
        """Tells that a changed file ("tokens" or "certificate") was read again, and how it went."""
        self._series.reloads.labels(file, BROKEN if failed else DONE).inc()
        self._series.reload_good.labels(file).set(not failed)

    def certificate_expires(self, at_s: float) -> None:
        """Shows until when the certificate in use is good, in seconds since 1970."""
        self._series.certificate_expiry.set(at_s)
