"""Names, labels and help texts of the series of who was let in, and with which certificate."""

from __future__ import annotations

from sage_fed.metrics.series import Factory

DENIALS = ("unauthenticated", "forbidden", "requests_per_minute", "concurrent_jobs")
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
