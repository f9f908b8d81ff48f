"""Names, labels, buckets and help texts of every series that is counted as things happen.

One class a subject, one statement a series. Each label is given with the values that are known in
advance; their combinations start at zero, for a rate over an absent series would be absent, too.
Knows no events: `Metrics` turns those into increments.
"""

from __future__ import annotations

import itertools
import time
from bisect import bisect_left
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Self, TypeVar

import prometheus_client
from prometheus_client import CollectorRegistry
from prometheus_client.metrics import MetricWrapperBase
from prometheus_client.samples import Exemplar

from sage_fed.core import Phase, StopReason, TierState
from sage_fed.steps import StepKind

PREFIX = "sage_fed"
NO_TIER = "none"

FINISHED, ABORTED, REFUSED = "finished", "aborted", "refused"
FAILED, REPLAYED = "failed", "replayed"
ABORTS = (StopReason.ABORTED, StopReason.CANCELLED, StopReason.DEADLINE)
FAULTS = (
    *("device_out_of_memory", "hold_closed", "internal"),
    *("ledger_blocked", "ledger_down", "not_finite"),
)
REFUSALS = (
    *("cannot_afford", "deadline_infeasible", "forbidden", "invalid_field", "no_such_account"),
    *("not_found", "queue_full", "request_id_conflict", "tier_unavailable", "unauthenticated"),
)
"""Reasons of errors, in lower case, that end a job as `FAILED` and as `REFUSED`."""

CONTENDED = ("false", "true")
RELOADED, RELOAD_FAILED = "done", "failed"

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
LAG = (0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536)
GROUP = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class _FastLabels(MetricWrapperBase):
    """A metric that finds a child again without the library's lock and conversions to text.

    A job asks for some twenty children.
    """

    def labels(self, *labelvalues: Any, **labelkwargs: Any) -> Self:  # noqa: ANN401 - as the base
        child = None if labelkwargs else self._metrics.get(labelvalues)
        if child is None:
            return super().labels(*labelvalues, **labelkwargs)
        return child  # type: ignore[return-value]  # the library's base does not say its own type


class Counter(_FastLabels, prometheus_client.Counter):
    """A counter."""


class Gauge(_FastLabels, prometheus_client.Gauge):
    """A gauge."""


class Histogram(_FastLabels, prometheus_client.Histogram):
    """A histogram that finds its bucket by bisection, and takes equal observations together."""

    def observe(
        self, amount: float, exemplar: Mapping[str, str] | None = None, count: int = 1
    ) -> None:
        """Observe the same amount `count` times, at the price of once.

        Args:
            amount: what was observed.
            exemplar: labels that lead to one case of it; at most 128 characters in all.
            count: how often.
        """
        self._sum.inc(amount * count)
        # The last bucket's bound is infinite.
        bucket = self._buckets[bisect_left(self._upper_bounds, amount)]
        bucket.inc(count)
        if exemplar is not None:
            bucket.set_exemplar(Exemplar(dict(exemplar), amount, time.time()))


M = TypeVar("M", bound=MetricWrapperBase)


class Factory:
    """Makes series with the prefix, in one registry, and starts what is known of them at zero."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry

    def counter(self, name: str, text: str, /, **labels: Collection[str]) -> Counter:
        return self._made(Counter, name, text, labels)

    def gauge(self, name: str, text: str, /, **labels: Collection[str]) -> Gauge:
        return self._made(Gauge, name, text, labels)

    def histogram(
        self, name: str, text: str, buckets: Sequence[float], /, **labels: Collection[str]
    ) -> Histogram:
        return self._made(Histogram, name, text, labels, buckets=buckets)

    def _made(
        self,
        kind: type[M],
        name: str,
        text: str,
        labels: Mapping[str, Collection[str]],
        **options: Any,  # noqa: ANN401 - of one kind only
    ) -> M:
        made = kind(name, text, tuple(labels), namespace=PREFIX, registry=self._registry, **options)
        if labels:
            for values in itertools.product(*labels.values()):
                made.labels(*values)
        return made


_ANY: Collection[str] = ()
"""Values of a label that are not known in advance."""


class JobSeries:
    """What became of requests, and how long it took."""

    def __init__(self, make: Factory, tiers: Sequence[str]) -> None:
        self.requests = make.counter(
            "requests_total",
            "Jobs that ended, aborted, refused and failed ones included.",
            tier=_ANY,
            outcome=_ANY,
            code=_ANY,
        )
        self.decisions = make.counter(
            "route_decisions_total",
            "Decisions of the router; chosen is none for a refusal.",
            requested=_ANY,
            chosen=_ANY,
            reason=_ANY,
        )
        self.decision_seconds = make.histogram(
            "route_decision_seconds", "Time to decide a route.", DECISION
        )
        self.first_token = make.histogram(
            "time_to_first_token_seconds",
            "From the arrival of a request until its first token; contended: the other tier had "
            "work when that came.",
            FIRST_TOKEN,
            tier=tiers,
            contended=CONTENDED,
        )
        self.inter_token = make.histogram(
            "inter_token_latency_seconds",
            "Between two tokens of one stream, as handed to the reader; contended: the other tier "
            "had work then.",
            INTER_TOKEN,
            tier=tiers,
            contended=CONTENDED,
        )
        self.queue = make.histogram(
            "queue_seconds", "From admission until the first prefill step.", DURATION, tier=tiers
        )
        self.prefill = make.histogram(
            "prefill_seconds",
            "From the first prefill step to the first token.",
            DURATION,
            tier=tiers,
        )
        self.decode = make.histogram(
            "decode_seconds", "From the first token until the last.", DURATION, tier=tiers
        )
        self.duration = make.histogram(
            "request_duration_seconds",
            "From the arrival of a request until its end, however it ended.",
            DURATION,
            tier=_ANY,
            outcome=_ANY,
        )
        self.tokens = make.counter(
            "tokens_total",
            "Tokens of jobs by how the job ended; those of failed jobs were delivered to no one.",
            tier=tiers,
            type=("prompt", "cached", "output"),
            outcome=(FINISHED, ABORTED, FAILED),
        )
        self.device_seconds = make.counter(
            "device_seconds_total",
            "Device time of jobs that ended, attributed by tokens; adds up to the steps' time.",
            tier=tiers,
            outcome=(FINISHED, ABORTED, FAILED),
        )
        self.prompt_tokens = make.histogram(
            "prompt_tokens", "Prompt tokens of a job.", TOKENS, tier=tiers
        )
        self.output_tokens = make.histogram(
            "output_tokens", "Output tokens of a job.", TOKENS, tier=tiers
        )
        endings = [(ABORTED if end in ABORTS else FINISHED, end.value) for end in StopReason]
        errors = [*((REFUSED, code) for code in REFUSALS), *((FAILED, code) for code in FAULTS)]
        for tier in (*tiers, NO_TIER):
            own = [] if tier == NO_TIER else [*endings, (REPLAYED, REPLAYED)]
            for outcome, code in (*own, *errors):
                self.requests.labels(tier, outcome, code)
                if outcome != REPLAYED:
                    self.duration.labels(tier, outcome)


class MoneySeries:
    """What was held, charged, given back and denied, and how fast the books are."""

    def __init__(self, make: Factory, tiers: Sequence[str]) -> None:
        self.reserved = make.counter(
            "atp_reserved_total", "ATP held for admitted jobs.", tier=tiers
        )
        self.charged = make.counter(
            "atp_charged_total", "ATP charged for work done (ADP).", tier=tiers
        )
        self.refunded = make.counter(
            "atp_refunded_total", "ATP held and given back at the end of a job.", tier=tiers
        )
        self.denied = make.counter(
            "atp_denied_total",
            "Worst-case ATP of jobs refused for money.",
            reason=("below_floor", "above_max_cost", "cannot_afford"),
        )
        self.balance = make.gauge(
            "atp_balance", "Balance in ATP after the account's last job.", account=_ANY
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
        self.card = make.gauge("rate_card_info", "Always 1; the rate card in force.", version=_ANY)
        self.card_stale = make.gauge(
            "rate_card_stale",
            "1 where the card in force was measured on something else than what is loaded.",
        )


class EngineSeries:
    """What the device did, and what is on it."""

    def __init__(self, make: Factory, tiers: Sequence[str]) -> None:
        self.step_seconds = make.histogram(
            "engine_step_seconds",
            "Device time of one forward pass.",
            STEP,
            tier=tiers,
            kind=[kind.value for kind in StepKind],
        )
        self.tokens = make.counter(
            "engine_tokens_total",
            "Tokens fed to the model.",
            tier=tiers,
            phase=(Phase.PREFILL.value, Phase.DECODE.value),
        )
        self.preemptions = make.counter(
            "preemptions_total",
            "Times that a running job was interrupted, to be computed again and go on later.",
            tier=tiers,
        )
        self.queried = make.counter(
            "prefix_cache_queried_tokens_total",
            "Tokens of sequences that were looked up in the prefix cache when they started.",
            tier=tiers,
        )
        self.hit = make.counter(
            "prefix_cache_hit_tokens_total",
            "Tokens that were found in the prefix cache and so not computed again.",
            tier=tiers,
        )
        self.batch_size = make.gauge("batch_size", "Sequences in the last step.", tier=tiers)
        self.oom = make.counter(
            "oom_total", "Steps that did not fit the device's memory.", tier=tiers
        )
        self.restarts = make.counter(
            "engine_restarts_total", "Times that a tier's model was loaded again.", tier=tiers
        )
        self.state = make.gauge(
            "tier_state",
            "1 for the state that the tier is in.",
            tier=tiers,
            state=[state.value for state in TierState],
        )
        self.load_progress = make.gauge(
            "model_load_progress_ratio", "How much of the model is loaded, 0 to 1.", tier=tiers
        )
        self.load_seconds = make.gauge(
            "model_load_seconds", "How long the model took to load.", tier=tiers
        )
        self.model_memory = make.gauge(
            "model_memory_bytes",
            "Memory of the model on its device.",
            tier=tiers,
            kind=("weights", "kv_cache", "graphs"),
        )
        self.fallback = make.gauge(
            "device_fallback", "1 where another device serves than the one that was wanted."
        )
        self.build = make.gauge("build_info", "Always 1; the daemon's version.", version=_ANY)
        self.model = make.gauge(
            "model_info",
            "Always 1; the model of a tier.",
            tier=_ANY,
            name=_ANY,
            revision=_ANY,
            architecture=_ANY,
            precision=_ANY,
            kernels=_ANY,
            device=_ANY,
        )


class ServiceSeries:
    """Calls and connections, credentials that were read again, and the event loop."""

    def __init__(self, make: Factory) -> None:
        self.denied = make.counter(
            "calls_denied_total",
            "Calls that were refused before anything was held for them.",
            reason=(
                *("unauthenticated", "forbidden", "requests_per_minute", "concurrent_jobs"),
                *("waiting", "open_calls", "unread_replies", "unread_bytes"),
            ),
        )
        self.reloads = make.counter(
            "reloads_total",
            "Times that a changed file was read again; after a failed one the old one holds.",
            file=("tokens", "certificate"),
            outcome=(RELOADED, RELOAD_FAILED),
        )
        self.reload_good = make.gauge(
            "last_reload_successful",
            "Whether what the file holds is what is in force: 0 after a reload that failed.",
            file=(),
        )
        for file in ("tokens", "certificate"):
            self.reload_good.labels(file).set(1)
        self.certificate_expiry = make.gauge(
            "tls_certificate_expiry_timestamp_seconds",
            "When the certificate in use expires, in seconds since 1970; 0 without one.",
        )
        self.calls_ended = make.counter(
            "calls_ended_total",
            "Calls that were ended because their peer did not send or read in time (receive, "
            "write), kept others waiting (pressure), had too much unread, or by an operator.",
            why=("receive", "write", "pressure", "unread", "operator"),
        )
        self.connections_closed = make.counter(
            "connections_closed_total",
            "Connections that were closed: too many of one address, too much unread, nothing but "
            "unauthenticated calls, or by an operator.",
            why=("per_address", "unread", "strangers", "operator"),
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
        self.loop_lag = make.histogram(
            "event_loop_lag_seconds",
            "What comes to the event loop waits for its turn, sampled twenty times a second.",
            LAG,
        )
        self.loop_cpu = make.counter(
            "event_loop_cpu_seconds_total",
            "CPU time of the event loop's thread; one a second is all.",
        )
