"""`sage-fed top`: the daemon as it is now, again and again, from its own metrics.

Owns: when to look, and what a daemon that is away looks like; it is looked for until it is back.
Does not know: what the series mean (`readings`), how it is drawn (`top_view`).
Fails: a single look at a daemon that is not there ends with exit code 4.
"""

from __future__ import annotations

import functools
import http.client
import time
from collections.abc import Callable
from typing import Annotated

import typer

from sage_fed.cli import options
from sage_fed.cli.connection import Connection
from sage_fed.cli.exits import reported
from sage_fed.cli.readings import Between, Page, Reading, reading_of
from sage_fed.cli.render import print_json
from sage_fed.cli.scrape import NotAdmitted, fetch
from sage_fed.errors import CannotConnect, Unauthenticated

DEFAULT_METRICS = "127.0.0.1:9659"

MetricsAddress = Annotated[
    str,
    typer.Option(
        "--metrics",
        metavar="ADDRESS",
        envvar="SAGE_FED_METRICS_LISTEN",
        help="HOST:PORT of the daemon's metrics, or their URL.",
    ),
]
Interval = Annotated[
    float,
    typer.Option("--interval", min=0.2, max=3600, metavar="SECONDS", help="Between two looks."),
]
Once = Annotated[bool, typer.Option("--once", help="One reading, over one interval.")]


def top(
    *,
    metrics: MetricsAddress = DEFAULT_METRICS,
    interval: Interval = 2.0,
    once: Once = False,
    as_json: options.AsJson = False,
    token: options.Token = None,
    token_file: options.TokenFile = None,
    tls_ca: options.TlsCa = None,
) -> None:
    """Watch the daemon live.

    In a pipe it is one plain reading; with --json one object a reading, and a line for each.
    """
    with reported(as_json=as_json):
        secret = Connection(token=token, token_file=token_file).read_token()
        watch = Watch(metrics, read=functools.partial(fetch, token=secret, tls_ca=tls_ca))
        if as_json and not once:
            _print_on(watch, interval)
        from sage_fed.cli.tables import stdout_console  # noqa: PLC0415 - as in every table
        from sage_fed.cli.top_view import drawn, show_live  # noqa: PLC0415

        console = stdout_console()
        if not once and console.is_terminal:
            show_live(console, watch, interval)
            return
        reading = watch.one_reading(interval)
        if as_json:
            print_json(reading)
        else:
            console.print(drawn(reading, metrics, width=console.width))


def _print_on(watch: Watch, interval_s: float) -> None:
    """Print an object a reading until interrupted; while the daemon is away, one that says so."""
    while True:
        reading = watch.look()
        if reading is not None:
            print_json(reading)
        elif watch.away:
            print_json({"away": watch.away})
        watch.wait(interval_s)


class Watch:
    """Looks at one daemon's metrics page; `away` says why the last look saw nothing."""

    def __init__(
        self,
        address: str,
        *,
        read: Callable[[str], str] = fetch,
        wait: Callable[[float], None] = time.sleep,
    ) -> None:
        self.address = address
        self.away = ""
        self.admitted = True
        self.wait = wait
        self._read = read
        self._last: Page | None = None

    def look(self) -> Reading | None:
        """Return what has been since the last look; None at the first, and while it is away."""
        before, self._last = self._last, None
        try:
            scheme = "" if "://" in self.address else "http://"
            place = self.address.rstrip("/").removesuffix("/metrics")
            text = self._read(f"{scheme}{place}/metrics")
        except (OSError, http.client.HTTPException, ValueError) as error:
            self.away, self.admitted = _why(error), not isinstance(error, NotAdmitted)
            return None
        self.away = ""
        self._last = Page.read(text, time.monotonic())
        return None if before is None else reading_of(Between(before, self._last), time.time())

    def one_reading(self, interval_s: float) -> Reading:
        """Look twice.

        Raises:
            CannotConnect: there is no daemon, or it left in between.
            Unauthenticated: it shows its metrics to others only.
        """
        self.look()
        if not self.away:
            self.wait(interval_s)
        reading = None if self.away else self.look()
        if not self.admitted:
            raise Unauthenticated(self.away)
        if reading is None:
            raise CannotConnect(self.address, f"no metrics at {self.address}: {self.away}")
        return reading


def _why(error: Exception) -> str:
    strerror = getattr(error, "strerror", None)
    why = str(strerror or error or type(error).__name__)
    return why[:1].lower() + why[1:]
