"""What two looks at the metrics page say together: rates, percentiles, and the state of now.

Owns: the differences between the pages, and which series stand for what in `sage-fed top`.
Does not know: HTTP, drawing.
Fails: never; what a page does not have is None.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from sage_fed.cli.scrape import Sample, samples
from sage_fed.core import TIER_ROLES

_P = "sage_fed_"


@dataclass(frozen=True, slots=True)
class Page:
    """One look at the metrics, at `at_s` on a clock that only its reader knows."""

    at_s: float
    series: Mapping[str, tuple[Sample, ...]]

    @classmethod
    def read(cls, text: str, at_s: float) -> Page:
        """Read a page's text."""
        found: dict[str, list[Sample]] = {}
        for sample in samples(text):
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

    def label(self, name: str, label: str, **labels: str) -> str:
        """Return a label of the one sample that is not 0, or nothing."""
        return next((s.labels.get(label, "") for s in self.having(name, **labels) if s.value), "")


@dataclass(frozen=True, slots=True)
class Percentiles:
    """Of what was observed between two looks, in seconds."""

    p50_s: float
    p95_s: float


@dataclass(frozen=True, slots=True)
class TierReading:
    """One tier. Rates are per second; shares are of 1; None is "nothing to say"."""

    tier: str
    state: str
    model: str
    running: float | None
    waiting: float | None
    oldest_waiting_s: float | None
    requests_per_s: float | None
    output_tokens_per_s: float | None
    prompt_tokens_per_s: float | None
    first_token: Percentiles | None
    between_tokens: Percentiles | None
    between_tokens_contended: Percentiles | None
    device_share: float | None
    bandwidth_share: float | None
    kv_used_share: float | None
    kv_cached_share: float | None
    charged_atp_per_s: float | None
    held_atp: float | None
    route_share: float | None


@dataclass(frozen=True, slots=True)
class Reading:
    """The daemon between two looks and at the second."""

    version: str
    up_s: float | None
    rate_card: str
    rate_card_stale: bool
    device_fallback: bool
    ledger_writable: bool
    tiers: tuple[TierReading, ...]
    endings_per_s: Mapping[str, float]
    cost_ratio_card: float | None
    cost_ratio_live: float | None
    denied_atp_per_s: float | None
    commit_p99_s: float | None
    loop_lag_p99_s: float | None
    loop_share: float | None
    memory_available_bytes: float | None
    daemon_bytes: float | None
    gpu_power_watts: float | None
    open_calls: float | None
    connections: float | None
    unread_replies: float | None
    unread_bytes: float | None


class Between:
    """Two pages; the counters of a daemon that restarted in between count from zero."""

    def __init__(self, before: Page, after: Page) -> None:
        self.after = after
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


def reading_of(pages: Between, now_s: float) -> Reading:
    """Read everything that `sage-fed top` shows; `now_s` is since the epoch."""
    page = pages.after
    started_s = page.total("process_start_time_seconds")
    live = page.total(f"{_P}cost_ratio", source="live", phase="decode")
    decisions = pages.rate(f"{_P}route_decisions_total")
    return Reading(
        version=page.label(f"{_P}build_info", "version"),
        up_s=None if started_s is None else now_s - started_s,
        rate_card=page.label(f"{_P}rate_card_info", "version"),
        rate_card_stale=bool(page.total(f"{_P}rate_card_stale")),
        device_fallback=bool(page.total(f"{_P}device_fallback")),
        # An older daemon does not say; it would have other troubles.
        ledger_writable=page.total(f"{_P}ledger_writable") != 0,
        tiers=tuple(_tier(pages, tier.name, decisions) for tier in TIER_ROLES),
        endings_per_s=_endings(pages),
        cost_ratio_card=page.total(f"{_P}cost_ratio", source="card", phase="decode"),
        cost_ratio_live=live,
        denied_atp_per_s=pages.rate(f"{_P}atp_denied_total"),
        commit_p99_s=pages.quantile(0.99, f"{_P}ledger_commit_seconds"),
        loop_lag_p99_s=pages.quantile(0.99, f"{_P}event_loop_lag_seconds"),
        loop_share=pages.rate(f"{_P}event_loop_cpu_seconds_total"),
        memory_available_bytes=page.total(f"{_P}memory_available_bytes"),
        daemon_bytes=page.total("process_resident_memory_bytes"),
        gpu_power_watts=page.total(f"{_P}gpu_power_watts"),
        open_calls=page.total(f"{_P}open_calls"),
        connections=page.total(f"{_P}connections"),
        unread_replies=page.total(f"{_P}unread_replies"),
        unread_bytes=page.total(f"{_P}unread_bytes"),
    )


def _tier(pages: Between, tier: str, decisions: float | None) -> TierReading:
    page = pages.after
    kv_total = page.total(f"{_P}kv_cache_tokens", tier=tier)
    routes = pages.rate(f"{_P}route_decisions_total", chosen=tier)
    return TierReading(
        tier=tier,
        state=page.label(f"{_P}tier_state", "state", tier=tier),
        model=page.label(f"{_P}model_info", "name", tier=tier),
        running=page.total(f"{_P}requests_running", tier=tier),
        waiting=page.total(f"{_P}requests_waiting", tier=tier),
        oldest_waiting_s=page.total(f"{_P}oldest_waiting_age_seconds", tier=tier),
        requests_per_s=pages.rate(f"{_P}requests_total", tier=tier),
        output_tokens_per_s=pages.rate(f"{_P}engine_tokens_total", tier=tier, phase="decode"),
        prompt_tokens_per_s=pages.rate(f"{_P}engine_tokens_total", tier=tier, phase="prefill"),
        first_token=pages.percentiles(f"{_P}time_to_first_token_seconds", tier=tier),
        between_tokens=pages.percentiles(f"{_P}inter_token_latency_seconds", tier=tier),
        between_tokens_contended=pages.percentiles(
            f"{_P}inter_token_latency_seconds", tier=tier, contended="true"
        ),
        device_share=pages.rate(f"{_P}engine_step_seconds_sum", tier=tier),
        bandwidth_share=page.total(f"{_P}decode_bandwidth_ratio", tier=tier),
        kv_used_share=_over(page.total(f"{_P}kv_cache_tokens", tier=tier, state="used"), kv_total),
        kv_cached_share=_over(
            page.total(f"{_P}kv_cache_tokens", tier=tier, state="cached"), kv_total
        ),
        charged_atp_per_s=pages.rate(f"{_P}atp_charged_total", tier=tier),
        held_atp=page.total(f"{_P}atp_held", tier=tier),
        route_share=_over(routes, decisions),
    )


def _endings(pages: Between) -> dict[str, float]:
    """Jobs that ended, per second, by outcome and code; the most frequent first."""
    name = f"{_P}requests_total"
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
