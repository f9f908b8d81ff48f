"""Who was not let in, and which tokens and certificate hold: the series and how they change.

Called on the event loop.
"""

from __future__ import annotations

from sage_fed.metrics.series import Factory

DENIALS = ("unauthenticated", "forbidden", "requests_per_minute", "concurrent_jobs", "waiting")
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

    def reloaded(self, file: str, *, failed: bool = False) -> None:
        """Tells that a changed file ("tokens" or "certificate") was read again, and how it went."""
        self._series.reloads.labels(file, BROKEN if failed else DONE).inc()
        self._series.reload_good.labels(file).set(not failed)

    def certificate_expires(self, at_s: float) -> None:
        """Shows until when the certificate in use is good, in seconds since 1970."""
        self._series.certificate_expiry.set(at_s)
