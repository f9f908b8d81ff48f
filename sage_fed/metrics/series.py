"""Prometheus metrics that find a labelled child again without building its key anew.

Owns the children by the label values as they were given. A job asks for some twenty children,
and each `labels` of the library turns every value into a string and takes a lock.

Names, labels, buckets and help texts of every series that is counted as things happen.

What is known in advance starts at zero: a rate over an absent series would be absent, too.
Knows no events: the recorders beside it turn those into increments.
"""

from __future__ import annotations

import itertools
import time
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from typing import Any, Self

import prometheus_client
from prometheus_client import CollectorRegistry
from prometheus_client.metrics import MetricWrapperBase
from prometheus_client.samples import Exemplar

from sage_fed.core import TIER_ROLES, Phase, StopReason, TierState
from sage_fed.errors import (
    CannotAfford,
    DeadlineInfeasible,
    DeviceOutOfMemory,
    Forbidden,
    HoldClosed,
    Internal,
    InvalidField,
    LedgerBlocked,
    LedgerDown,
    NoSuchAccount,
    NotFinite,
    NotFound,
    QueueFull,
    RequestIdConflict,
    TierUnavailable,
    Unauthenticated,
)
from sage_fed.steps import StepKind


class _Kept(MetricWrapperBase):
    """Remembers what `labels` returned for values that are given by position."""

    def labels(self, *labelvalues: Any, **labelkwargs: Any) -> Self:  # noqa: ANN401 - as the base
        if labelkwargs:
            return super().labels(*labelvalues, **labelkwargs)
        children: dict[tuple[Any, ...], Self] = self.__dict__.setdefault("_children", {})
        child = children.get(labelvalues)
        if child is None:
            child = children[labelvalues] = super().labels(*labelvalues)
        return child

    def remove(self, *labelvalues: Any) -> None:  # noqa: ANN401 - as the base
        self.__dict__.pop("_children", None)
        super().remove(*labelvalues)

    def clear(self) -> None:
        # A child of before would go on being set, and never be scraped again.
        self.__dict__.pop("_children", None)
        super().clear()


class Counter(_Kept, prometheus_client.Counter):
    """A counter."""


class Gauge(_Kept, prometheus_client.Gauge):
    """A gauge."""


class Histogram(_Kept, prometheus_client.Histogram):
    """A histogram that finds its bucket by bisection, and takes equal observations together."""

    def observe(self, amount: float, exemplar: dict[str, str] | None = None) -> None:
        """Observe an amount; the library's own way looks at every bucket below it."""
        if exemplar is None:
            self.observe_many(amount, 1)
        else:
            super().observe(amount, exemplar)

    def observe_many(
        self, amount: float, count: int, exemplar: Mapping[str, str] | None = None
    ) -> None:
        """Observe the same amount `count` times, at the price of once.

        Args:
            amount: what was observed.
            count: how often.
            exemplar: labels that lead to one case of it; at most 128 characters in all.
        """
        self._sum.inc(amount * count)
        # The last bucket's bound is infinite.
        bucket = self._buckets[bisect_left(self._upper_bounds, amount)]
        bucket.inc(count)
        if exemplar is not None:
            bucket.set_exemplar(Exemplar(dict(exemplar), amount, time.time()))


PREFIX = "sage_fed"
NO_TIER = "none"
AUTO = "auto"
OTHER = "other"
TIERS = tuple(tier.name for tier in TIER_ROLES)

FINISHED, ABORTED, REFUSED, FAILED, REPLAYED = (
    "finished",
    "aborted",
    "refused",
    "failed",
    "replayed",
)
ABORTS = (StopReason.ABORTED, StopReason.CANCELLED, StopReason.DEADLINE)
FAULTS = (DeviceOutOfMemory, HoldClosed, Internal, LedgerBlocked, LedgerDown, NotFinite)
REFUSALS = (
    CannotAfford,
    DeadlineInfeasible,
    Forbidden,
    InvalidField,
    NoSuchAccount,
    NotFound,
    QueueFull,
    RequestIdConflict,
    TierUnavailable,
    Unauthenticated,
)
CODES = frozenset(error.reason.lower() for error in (*REFUSALS, *FAULTS))
CONTENDED = ("false", "true")
TOKEN_TYPES = ("prompt", "cached", "output")
TOKEN_OUTCOMES = (FINISHED, ABORTED, FAILED)
MONEY_REASONS = ("below_floor", "above_max_cost", "cannot_afford")

# Seconds. A 0.5B model decodes in single milliseconds; service-level bounds (0.05 and 0.2 between
# tokens; 0.2, 0.5, 1 and 2 to the first) are bucket bounds, so their shares are exact.
INTER_TOKEN = (
    *(0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.025, 0.03, 0.04, 0.05, 0.075),
    *(0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1, 2, 5),
)
FIRST_TOKEN = (
    *(0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.75),
    *(1, 1.5, 2, 3, 5, 7.5, 10, 15, 20, 40, 80),
)
DURATION = (0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 40, 80, 160, 320, 640)
STEP = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)
COMMIT = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1)
DECISION = (0.00001, 0.000025, 0.00005, 0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01)
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536)
GROUP = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Factory:
    """Makes series with the prefix, in one registry."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry

    def counter(self, name: str, text: str, *labels: str) -> Counter:
        """A sum that only grows."""
        return Counter(name, text, labels, namespace=PREFIX, registry=self._registry)

    def gauge(self, name: str, text: str, *labels: str) -> Gauge:
        """A value of this instant."""
        return Gauge(name, text, labels, namespace=PREFIX, registry=self._registry)

    def histogram(self, name: str, text: str, buckets: Sequence[float], *labels: str) -> Histogram:
        """A distribution; `buckets` are upper bounds."""
        return Histogram(
            name, text, labels, namespace=PREFIX, registry=self._registry, buckets=buckets
        )


class JobSeries:
    """What became of requests, and how long it took."""

    def __init__(self, make: Factory) -> None:
        self.requests = make.counter(
            "requests_total",
            "Jobs that ended, aborted, refused and failed ones included.",
            *("tier", "outcome", "code"),
        )
        self.decisions = make.counter(
            "route_decisions_total",
            "Decisions of the router; chosen is none for a refusal.",
            *("requested", "chosen", "reason"),
        )
        self.decision_seconds = make.histogram(
            "route_decision_seconds", "Time to decide a route.", DECISION
        )
        self.first_token = make.histogram(
            "time_to_first_token_seconds",
            "From the arrival of a request until its first token; contended: the other tier had "
            "work when that came.",
            FIRST_TOKEN,
            *("tier", "contended"),
        )
        self.inter_token = make.histogram(
            "inter_token_latency_seconds",
            "Between two tokens of one stream, as handed to the reader; contended: the other tier "
            "had work then.",
            INTER_TOKEN,
            *("tier", "contended"),
        )
        self.queue = make.histogram(
            "queue_seconds", "From admission until the first prefill step.", DURATION, "tier"
        )
        self.prefill = make.histogram(
            "prefill_seconds", "From the first prefill step to the first token.", DURATION, "tier"
        )
        self.decode = make.histogram(
            "decode_seconds", "From the first token until the last.", DURATION, "tier"
        )
        self.duration = make.histogram(
            "request_duration_seconds",
            "From the arrival of a request until its end, however it ended.",
            DURATION,
            *("tier", "outcome"),
        )
        self.tokens = make.counter(
            "tokens_total",
            "Tokens of jobs by how the job ended; those of failed jobs were computed for nobody.",
            *("tier", "type", "outcome"),
        )
        self.device_seconds = make.counter(
            "device_seconds_total",
            "Device time of jobs that ended, attributed by tokens; adds up to the steps' time.",
            *("tier", "outcome"),
        )
        self.prompt_tokens = make.histogram(
            "prompt_tokens", "Prompt tokens of a job.", TOKENS, "tier"
        )
        self.output_tokens = make.histogram(
            "output_tokens", "Output tokens of a job.", TOKENS, "tier"
        )
        self._start_at_zero()

    def _start_at_zero(self) -> None:
        by_tier = (self.queue, self.prefill, self.decode)
        for tier in TIERS:
            for contended in CONTENDED:
                self.first_token.labels(tier, contended)
                self.inter_token.labels(tier, contended)
            for metric in (*by_tier, self.prompt_tokens, self.output_tokens):
                metric.labels(tier)
            for kind, outcome in itertools.product(TOKEN_TYPES, TOKEN_OUTCOMES):
                self.tokens.labels(tier, kind, outcome)
            for outcome in TOKEN_OUTCOMES:
                self.device_seconds.labels(tier, outcome)
            for reason in StopReason:
                self.requests.labels(tier, ABORTED if reason in ABORTS else FINISHED, reason.value)
            self.requests.labels(tier, REPLAYED, REPLAYED)
            for outcome in (FINISHED, ABORTED):
                self.duration.labels(tier, outcome)
        endings = [(REFUSED, error) for error in REFUSALS] + [(FAILED, error) for error in FAULTS]
        for tier, (outcome, error) in itertools.product((*TIERS, NO_TIER), endings):
            self.duration.labels(tier, outcome)
            self.requests.labels(tier, outcome, error.reason.lower())


class MoneySeries:
    """What was held, charged, given back and denied, and how fast the books are."""

    def __init__(self, make: Factory) -> None:
        self.reserved = make.counter("atp_reserved_total", "ATP held for admitted jobs.", "tier")
        self.charged = make.counter("atp_charged_total", "ATP charged for work done (ADP).", "tier")
        self.refunded = make.counter(
            "atp_refunded_total", "ATP held and given back at the end of a job.", "tier"
        )
        self.denied = make.counter(
            "atp_denied_total", "Worst-case ATP of jobs refused for money.", "reason"
        )
        self.balance = make.gauge(
            "atp_balance", "Balance in ATP after the account's last job.", "account"
        )
        self.commit_seconds = make.histogram(
            "ledger_commit_seconds", "Time until a group of ledger operations is durable.", COMMIT
        )
        self.group_size = make.histogram(
            "ledger_group_size", "Ledger operations made durable by one commit.", GROUP
        )
        self.read_seconds = make.histogram(
            "ledger_read_seconds", "Time until a caller's read of the books is answered.", COMMIT
        )
        self.folded = make.counter(
            "ledger_entries_folded_total", "Old entries folded into one row per account and day."
        )
        self.writable = make.gauge(
            "ledger_writable", "1 where the ledger takes entries in time; else jobs are refused."
        )
        self.writable.set(1)
        self.recovered_jobs = make.gauge(
            "ledger_recovered_jobs",
            "Jobs that the daemon before this one did not end; the start gave back their holds.",
        )
        self.recovered_atp = make.gauge(
            "ledger_recovered_atp", "ATP that the start gave back for those jobs."
        )
        self.card = make.gauge("rate_card_info", "Always 1; the rate card in force.", "version")
        self.card_stale = make.gauge(
            "rate_card_stale",
            "1 where the card in force was measured on something else than what is loaded.",
        )
        for tier in TIERS:
            for metric in (self.reserved, self.charged, self.refunded):
                metric.labels(tier)
        for reason in MONEY_REASONS:
            self.denied.labels(reason)


class EngineSeries:
    """What the device did, and what is on it."""

    def __init__(self, make: Factory) -> None:
        self.step_seconds = make.histogram(
            "engine_step_seconds", "Device time of one forward pass.", STEP, "tier", "kind"
        )
        self.tokens = make.counter(
            "engine_tokens_total", "Tokens fed to the model.", "tier", "phase"
        )
        self.preemptions = make.counter(
            "preemptions_total",
            "Times that a running job was interrupted, to be computed again and go on later.",
            "tier",
        )
        self.queried = make.counter(
            "prefix_cache_queried_tokens_total",
            "Tokens of sequences that were looked up in the prefix cache when they started.",
            "tier",
        )
        self.hit = make.counter(
            "prefix_cache_hit_tokens_total",
            "Tokens that were found in the prefix cache and so not computed again.",
            "tier",
        )
        self.batch_size = make.gauge("batch_size", "Sequences in the last step.", "tier")
        self.oom = make.counter("oom_total", "Steps that did not fit the device's memory.", "tier")
        self.restarts = make.counter(
            "engine_restarts_total", "Times that a tier's model was loaded again.", "tier"
        )
        self.state = make.gauge(
            "tier_state", "1 for the state that the tier is in.", "tier", "state"
        )
        self.load_progress = make.gauge(
            "model_load_progress_ratio", "How much of the model is loaded, 0 to 1.", "tier"
        )
        self.load_seconds = make.gauge(
            "model_load_seconds", "How long the model took to load.", "tier"
        )
        self.model_memory = make.gauge(
            "model_memory_bytes", "Memory of the model on its device.", "tier", "kind"
        )
        self.fallback = make.gauge(
            "device_fallback", "1 where another device serves than the one that was wanted."
        )
        self.build = make.gauge("build_info", "Always 1; the daemon's version.", "version")
        self.model = make.gauge(
            "model_info",
            "Always 1; the model of a tier.",
            *("tier", "name", "revision", "architecture", "precision", "kernels", "device"),
        )
        self._start_at_zero()

    def _start_at_zero(self) -> None:
        for tier in TIERS:
            counters = (self.oom, self.restarts, self.preemptions, self.queried, self.hit)
            for metric in (self.batch_size, *counters):
                metric.labels(tier)
            for metric in (self.load_progress, self.load_seconds):
                metric.labels(tier)
            for kind in StepKind:
                self.step_seconds.labels(tier, kind.value)
            for phase in (Phase.PREFILL, Phase.DECODE):
                self.tokens.labels(tier, phase.value)
            for state in TierState:
                self.state.labels(tier, state.value)
            for memory in ("weights", "kv_cache", "graphs"):
                self.model_memory.labels(tier, memory)
