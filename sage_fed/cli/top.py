"""`sage-fed top`: the daemon as it is now, again and again, from its own metrics.

Owns: reading the metrics page, when to look, and what two looks say together: rates, percentiles,
and which series stand for what. A daemon that is away is looked for until it is back.
Does not know: how a reading is drawn (`drawing.py`).
Fails: a single look at a daemon that is not there ends with exit code 4; what a page does not have
is None; `OSError` or `http.client.HTTPException` where a page cannot be read.
"""

from __future__ import annotations

import functools
import http.client
import math
import ssl
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar
from urllib.parse import urlsplit

import typer

from sage_fed.cli import options
from sage_fed.cli.exits import reported
from sage_fed.cli.render import print_json
from sage_fed.errors import CannotConnect, Unauthenticated

if TYPE_CHECKING:
    from prometheus_client.samples import Sample

R = TypeVar("R")
DEFAULT_METRICS = "127.0.0.1:9659"
_TIMEOUT_S = 10.0


def top(
    *,
    metrics: Annotated[
        str,
        typer.Option(
            "--metrics",
            metavar="ADDRESS",
            envvar="SAGE_FED_METRICS_LISTEN",
            help="HOST:PORT of the daemon's metrics, or their URL.",
        ),
    ] = DEFAULT_METRICS,
    interval: Annotated[
        float,
        typer.Option("--interval", min=0.2, max=3600, metavar="SECONDS", help="Between two looks."),
    ] = 2.0,
    once: Annotated[bool, typer.Option("--once", help="One reading, over one interval.")] = False,
    as_json: options.AsJson = False,
    token: options.Token = None,
    token_file: options.TokenFile = None,
    tls_ca: options.TlsCa = None,
) -> None:
    """Watch the daemon live.

    In a pipe it is one plain reading; with --json one object a reading, and a line for each.
    """
    with reported(as_json=as_json):
        secret = options.read_token(token, token_file)
        watch = Watch(metrics, read=functools.partial(fetch, token=secret, tls_ca=tls_ca))
        if as_json and not once:
            _print_on(watch, interval)
        from sage_fed.cli.drawing import drawn, show_live, stdout_console  # noqa: PLC0415 - rich

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


class NotAdmitted(http.client.HTTPException):
    """The page is there, and not for this caller."""


def fetch(url: str, token: str | None = None, tls_ca: Path | None = None) -> str:
    """The text of a metrics page such as `http://127.0.0.1:9659/metrics`.

    Over https the daemon is trusted by `tls_ca`, or without it by this system's certificates.
    """
    parts = urlsplit(url)
    connection: http.client.HTTPConnection
    if parts.scheme == "https":
        trust = ssl.create_default_context(cafile=tls_ca)
        connection = http.client.HTTPSConnection(parts.netloc, timeout=_TIMEOUT_S, context=trust)
    else:
        connection = http.client.HTTPConnection(parts.netloc, timeout=_TIMEOUT_S)
    try:
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        connection.request("GET", parts.path or "/metrics", headers=headers)
        response = connection.getresponse()
        body = response.read().decode()
        if response.status in {http.client.UNAUTHORIZED, http.client.FORBIDDEN}:
            raise NotAdmitted(f"{url} wants the token of a monitor or an admin")
        if response.status != http.client.OK:
            raise http.client.HTTPException(
                f"{url} answered {response.status} {response.reason}".rstrip()
            )
        return body
    finally:
        connection.close()


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
            page = Page.read(self._read(f"{scheme}{place}/metrics"), time.monotonic())
        except (OSError, http.client.HTTPException, ValueError) as error:
            self.away, self.admitted = _why(error), not isinstance(error, NotAdmitted)
            return None
        self.away, self._last = "", page
        return None if before is None else reading_of(Between(before, page, time.time()))

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


@dataclass(frozen=True, slots=True)
class Page:
    """One look at the metrics, at `at_s` on a clock that only its reader knows."""

    at_s: float
    series: Mapping[str, tuple[Sample, ...]]

    @classmethod
    def read(cls, text: str, at_s: float) -> Page:
        """Read a page's text.

        Raises:
            ValueError: it is not in Prometheus's text format.
        """
        from prometheus_client.parser import text_string_to_metric_families  # noqa: PLC0415 - 30 ms

        found: dict[str, list[Sample]] = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                found.setdefault(sample.name, []).append(sample)
        return cls(at_s, {name: tuple(of) for name, of in found.items()})

    def having(self, name: str, **labels: str) -> Iterator[Sample]:
        """Yield the series' samples with these labels."""
        for sample in self.series.get(name, ()):
            if labels.items() <= sample.labels.items():
                yield sample

    def total(self, name: str, **labels: str) -> float | None:
        """Return the sum of the samples; None where there are none."""
        values = [sample.value for sample in self.having(name, **labels)]
        return sum(values) if values else None

    def values(self, name: str, label: str) -> tuple[str, ...]:
        """Return the label's values, each once, in the page's order."""
        return tuple(dict.fromkeys(sample.labels[label] for sample in self.having(name)))

    def label(self, name: str, label: str, **labels: str) -> str:
        """Return a label of the one sample that is not 0, or nothing."""
        return next((s.labels.get(label, "") for s in self.having(name, **labels) if s.value), "")


@dataclass(frozen=True, slots=True)
class Percentiles:
    """Of what was observed between two looks, in seconds."""

    p50_s: float
    p95_s: float


class Between:
    """Two pages; the counters of a daemon that restarted in between count from zero."""

    def __init__(self, before: Page, after: Page, now_s: float = 0.0) -> None:
        self.after = after
        self.now_s = now_s
        """Of the second look, since the epoch."""
        self._before = before
        self._seconds = after.at_s - before.at_s
        started = "process_start_time_seconds"
        self._restarted = before.total(started) != after.total(started)

    def rate(self, name: str, **labels: str) -> float | None:
        """Return a counter's increase per second."""
        increase = self._increase(name, **labels)
        return None if increase is None or self._seconds <= 0 else increase / self._seconds

    def quantile(self, share: float, name: str, **labels: str) -> float | None:
        """Return a quantile of a histogram's new observations; None without any.

        Linear within a bucket, as Prometheus estimates it; of the open last one, its lower bound.
        """
        buckets = sorted(
            (float(bound), self._increase(f"{name}_bucket", le=bound, **labels) or 0.0)
            for bound in {s.labels["le"] for s in self.after.having(f"{name}_bucket", **labels)}
        )
        if not buckets or buckets[-1][1] <= 0:
            return None
        rank = share * buckets[-1][1]
        low_bound = low_count = 0.0
        for bound, count in buckets:
            if count >= rank and count > low_count:
                if math.isinf(bound):
                    return low_bound
                return low_bound + (bound - low_bound) * (rank - low_count) / (count - low_count)
            low_bound, low_count = bound, count
        return low_bound

    def percentiles(self, name: str, **labels: str) -> Percentiles | None:
        """Return the median and the 95th percentile; None without observations."""
        p50, p95 = (self.quantile(share, name, **labels) for share in (0.5, 0.95))
        return None if p50 is None or p95 is None else Percentiles(p50, p95)

    def _increase(self, name: str, **labels: str) -> float | None:
        now = self.after.total(name, **labels)
        if now is None or self._restarted:
            return now
        return now - (self._before.total(name, **labels) or 0.0)


def read(how: Callable[[Between, Mapping[str, str]], object]) -> Any:  # noqa: ANN401 - a field of any type
    """Return a reading's field that is read so, from two pages and the labels of its tier."""
    return field(metadata={"read": how})


def now(series: str, **labels: str) -> Any:  # noqa: ANN401
    """Return the field of a gauge, summed over the other labels."""
    return read(lambda pages, tier: pages.after.total(_name(series), **labels, **tier))


def rate(series: str, **labels: str) -> Any:  # noqa: ANN401
    """Return the field of a counter's increase per second."""
    return read(lambda pages, tier: pages.rate(_name(series), **labels, **tier))


def label(series: str, name: str) -> Any:  # noqa: ANN401
    """Return the field of a label."""
    return read(lambda pages, tier: pages.after.label(_name(series), name, **tier))


def flag(series: str) -> Any:  # noqa: ANN401
    """Return the field of a gauge that is 1 or 0."""
    return read(lambda pages, _: bool(pages.after.total(_name(series))))


def latencies(series: str, **labels: str) -> Any:  # noqa: ANN401
    """Return the field of a histogram's `Percentiles`."""
    return read(lambda pages, tier: pages.percentiles(_name(series), **labels, **tier))


def _output_rate(pages: Between, tier: Mapping[str, str]) -> float | None:
    """Return the tier's own tokens and the draft tokens that it accepted, per second."""
    own = pages.rate(_name("engine_tokens_total"), phase="decode", **tier)
    accepted = pages.rate(_name("speculative_tokens_total"), outcome="accepted", **tier)
    return None if own is None else own + (accepted or 0.0)


def _accepted_share(pages: Between, tier: Mapping[str, str]) -> float | None:
    series = _name("speculative_tokens_total")
    accepted = pages.rate(series, outcome="accepted", **tier)
    rejected = pages.rate(series, outcome="rejected", **tier)
    return _over(accepted, (accepted or 0.0) + (rejected or 0.0))


def _accepted_per_draft(pages: Between, tier: Mapping[str, str]) -> float | None:
    series = _name("accepted_draft_tokens")
    return _over(pages.rate(f"{series}_sum", **tier), pages.rate(f"{series}_count", **tier))


@dataclass(frozen=True, slots=True)
class TierReading:
    """One tier. Rates are per second; shares are of 1; None is "nothing to say"."""

    tier: str = read(lambda _, tier: tier["tier"])
    state: str = label("tier_state", "state")
    model: str = label("model_info", "name")
    running: float | None = now("requests_running")
    waiting: float | None = now("requests_waiting")
    oldest_waiting_s: float | None = now("oldest_waiting_age_seconds")
    requests_per_s: float | None = rate("requests_total")
    output_tokens_per_s: float | None = read(_output_rate)
    prompt_tokens_per_s: float | None = rate("engine_tokens_total", phase="prefill")
    first_token: Percentiles | None = latencies("time_to_first_token_seconds")
    between_tokens: Percentiles | None = latencies("inter_token_latency_seconds")
    between_tokens_contended: Percentiles | None = latencies(
        "inter_token_latency_seconds", contended="true"
    )
    speculating: float | None = now("speculation_active")
    accepted_share: float | None = read(_accepted_share)
    accepted_per_draft: float | None = read(_accepted_per_draft)
    device_share: float | None = rate("engine_step_seconds_sum")
    bandwidth_share: float | None = now("decode_bandwidth_ratio")
    kv_used_share: float | None = read(lambda pages, tier: _kv_share(pages, tier, "used"))
    kv_cached_share: float | None = read(lambda pages, tier: _kv_share(pages, tier, "cached"))
    charged_atp_per_s: float | None = rate("atp_charged_total")
    held_atp: float | None = now("atp_held")
    route_share: float | None = read(lambda pages, tier: _route_share(pages, tier["tier"]))


@dataclass(frozen=True, slots=True)
class Reading:
    """The daemon between two looks and at the second."""

    version: str = label("build_info", "version")
    up_s: float | None = read(lambda pages, _: _up_s(pages))
    rate_card: str = label("rate_card_info", "version")
    rate_card_stale: bool = flag("rate_card_stale")
    device_fallback: bool = flag("device_fallback")
    # An older daemon does not say; it would have other troubles.
    ledger_writable: bool = read(lambda pages, _: pages.after.total(_name("ledger_writable")) != 0)
    tiers: tuple[TierReading, ...] = read(
        lambda pages, _: tuple(
            _filled(TierReading, pages, tier=tier)
            for tier in pages.after.values(_name("tier_state"), "tier")
        )
    )
    endings_per_s: Mapping[str, float] = read(lambda pages, _: _endings(pages))
    cost_ratio_card: float | None = now("cost_ratio", source="card", phase="decode")
    cost_ratio_live: float | None = now("cost_ratio", source="live", phase="decode")
    denied_atp_per_s: float | None = rate("atp_denied_total")
    saved_atp_per_s: float | None = rate("atp_saved_total")
    extra_atp_per_s: float | None = rate("atp_extra_total")
    cascades_per_s: Mapping[str, float] = read(lambda pages, _: _cascades(pages))
    commit_p99_s: float | None = read(lambda pages, _: _p99(pages, "ledger_commit_seconds"))
    loop_lag_p99_s: float | None = read(lambda pages, _: _p99(pages, "event_loop_lag_seconds"))
    loop_share: float | None = rate("event_loop_cpu_seconds_total")
    memory_available_bytes: float | None = now("memory_available_bytes")
    daemon_bytes: float | None = now("process_resident_memory_bytes")
    gpu_power_watts: float | None = now("gpu_power_watts")
    open_calls: float | None = now("open_calls")
    connections: float | None = now("connections")
    unread_replies: float | None = now("unread_replies")
    unread_bytes: float | None = now("unread_bytes")


def reading_of(pages: Between) -> Reading:
    """Read everything that `sage-fed top` shows."""
    return _filled(Reading, pages)


def _filled(kind: type[R], pages: Between, **tier: str) -> R:
    return kind(**{each.name: each.metadata["read"](pages, tier) for each in fields(kind)})  # type: ignore[arg-type] # both are dataclasses


def _name(series: str) -> str:
    return series if series.startswith("process_") else f"sage_fed_{series}"


def _up_s(pages: Between) -> float | None:
    started_s = pages.after.total("process_start_time_seconds")
    return None if started_s is None else pages.now_s - started_s


def _p99(pages: Between, series: str) -> float | None:
    return pages.quantile(0.99, _name(series))


def _kv_share(pages: Between, tier: Mapping[str, str], state: str) -> float | None:
    series = _name("kv_cache_tokens")
    return _over(pages.after.total(series, state=state, **tier), pages.after.total(series, **tier))


def _route_share(pages: Between, tier: str) -> float | None:
    series = _name("route_decisions_total")
    return _over(pages.rate(series, chosen=tier), pages.rate(series))


def _cascades(pages: Between) -> dict[str, float]:
    """Return the cascades per second by what became of the first answer, those that were."""
    series = _name("cascade_total")
    rates = {
        outcome: pages.rate(series, outcome=outcome)
        for outcome in pages.after.values(series, "outcome")
    }
    return {outcome: rate for outcome, rate in rates.items() if rate}


def _endings(pages: Between) -> dict[str, float]:
    """Jobs that ended, per second, by outcome and code; the most frequent first."""
    name = _name("requests_total")
    kinds = {(s.labels["outcome"], s.labels["code"]) for s in pages.after.having(name)}
    rates = {
        f"{outcome} {code}" if outcome != code else outcome: pages.rate(
            name, outcome=outcome, code=code
        )
        for outcome, code in kinds
    }
    moving = [(kind, rate) for kind, rate in rates.items() if rate]
    return dict(sorted(moving, key=lambda item: (-item[1], item[0])))


def _over(part: float | None, whole: float | None) -> float | None:
    return None if part is None or not whole else part / whole
