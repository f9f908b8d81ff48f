"""Names, labels, buckets and help texts of every series that is counted as things happen.

One table a kind, one entry a series. Where all values of a series' labels are known in advance,
their combinations start at zero: a rate over an absent series would be absent, too.
Knows no events: `Metrics` turns those into increments.
"""

from __future__ import annotations

import itertools
import time
from bisect import bisect_left
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self, TypeVar

import prometheus_client
from prometheus_client import CollectorRegistry
from prometheus_client.metrics import MetricWrapperBase
from prometheus_client.samples import Exemplar

from sage_fed.core import CascadeOutcome, DraftOrigin, Mode, Phase, StopReason, TierState
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
ORIGINS = tuple(origin.value for origin in DraftOrigin)
DRAFTED, ACCEPTED, REJECTED = "drafted", "accepted", "rejected"
MODES = tuple(mode.value for mode in Mode)
TWO_TIER_MODES = tuple(mode.value for mode in Mode if mode is not Mode.SINGLE)
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
DRAFT = (0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
DOUBT = (0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1)
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


@dataclass(frozen=True, slots=True)
class Spec:
    """A series: its help text, label names, and label values known beside those of `_KNOWN`."""

    text: str
    labels: str = ""
    buckets: Sequence[float] = ()
    known: Mapping[str, Collection[str]] = field(default_factory=dict)


_COMPUTED = {"outcome": (FINISHED, ABORTED, FAILED)}

COUNTERS = {
    # Jobs
    "requests_total": Spec(
        "Jobs that ended, aborted, refused and failed ones included.", "tier outcome code"
    ),
    "route_decisions_total": Spec(
        "Decisions of the router; chosen is none for a refusal.", "requested chosen reason"
    ),
    "cascade_total": Spec(
        "Cascades by what became of the lower tier's answer.",
        "outcome",
        known={"outcome": [outcome.value for outcome in CascadeOutcome]},
    ),
    "tokens_total": Spec(
        "Tokens of jobs by how the job ended; those of failed jobs were not delivered.",
        "tier type outcome",
        known={"type": ("prompt", "cached", "output"), **_COMPUTED},
    ),
    "device_seconds_total": Spec(
        "Device time of jobs that ended, attributed by tokens; adds up to the steps' time.",
        "tier outcome",
        known=_COMPUTED,
    ),
    # Money
    "atp_reserved_total": Spec("ATP held for admitted jobs.", "tier"),
    "atp_charged_total": Spec("ATP charged for work done (ADP).", "tier"),
    "atp_refunded_total": Spec("ATP held and given back at the end of a job.", "tier"),
    "atp_denied_total": Spec(
        "Worst-case ATP of jobs refused for money.",
        "reason",
        known={"reason": ("below_floor", "above_max_cost", "cannot_afford")},
    ),
    "atp_saved_total": Spec(
        "What one tier without drafts would have charged for the same output, less the charge, of "
        "jobs that cost less than that.",
        "mode",
        known={"mode": MODES},
    ),
    "atp_extra_total": Spec(
        "The charge less what one tier would have charged for the same output, of jobs that cost "
        "more than that: cascades that had to escalate.",
        "mode",
        known={"mode": TWO_TIER_MODES},
    ),
    "ledger_entries_folded_total": Spec("Old entries folded into one row per account and day."),
    # The device
    "engine_tokens_total": Spec(
        "Tokens fed to the model.",
        "tier phase",
        known={
            "phase": [phase.value for phase in Phase if phase is not Phase.CACHED],
        },
    ),
    "speculative_tokens_total": Spec(
        "Draft tokens for the tier by what proposed them: drafted, and of those that were "
        "verified accepted or rejected; a drafter's may be dropped unverified.",
        "tier origin outcome",
        known={
            "origin": ORIGINS,
            "outcome": (DRAFTED, ACCEPTED, REJECTED),
        },
    ),
    "preemptions_total": Spec(
        "Times that a running job was interrupted, to be computed again and go on later.", "tier"
    ),
    "prefix_cache_queried_tokens_total": Spec(
        "Tokens of sequences that were looked up in the prefix cache when they started.", "tier"
    ),
    "prefix_cache_hit_tokens_total": Spec(
        "Tokens that were found in the prefix cache and so not computed again.", "tier"
    ),
    "oom_total": Spec("Steps that did not fit the device's memory.", "tier"),
    "engine_restarts_total": Spec("Times that a tier's model was loaded again.", "tier"),
    # Calls, credentials and the event loop
    "calls_denied_total": Spec(
        "Calls that were refused before anything was held for them.",
        "reason",
        known={
            "reason": (
                *("unauthenticated", "forbidden", "requests_per_minute", "concurrent_jobs"),
                *("waiting", "open_calls", "unread_replies", "unread_bytes"),
            )
        },
    ),
    "calls_ended_total": Spec(
        "Calls that were ended because their peer did not send or read in time (receive, write), "
        "kept others waiting (pressure), had too much unread, or by an operator.",
        "why",
        known={"why": ("receive", "write", "pressure", "unread", "operator")},
    ),
    "connections_closed_total": Spec(
        "Connections that were closed: too many of one address, too much unread, nothing but "
        "unauthenticated calls, or by an operator.",
        "why",
        known={"why": ("per_address", "unread", "strangers", "operator")},
    ),
    "reloads_total": Spec(
        "Times that a changed file was read again; after a failed one the old one holds.",
        "file outcome",
        known={"outcome": (RELOADED, RELOAD_FAILED)},
    ),
    "event_loop_cpu_seconds_total": Spec(
        "CPU time of the event loop's thread; one a second is all."
    ),
}

GAUGES = {
    # Money
    "atp_balance": Spec("Balance in ATP after the account's last job.", "account"),
    "ledger_writable": Spec("1 where the ledger takes entries in time; else jobs are refused."),
    "ledger_recovered_jobs": Spec(
        "Jobs that the daemon before this one did not end; the start gave back their holds."
    ),
    "ledger_recovered_atp": Spec("ATP that the start gave back for those jobs."),
    "rate_card_info": Spec("Always 1; the rate card in force.", "version"),
    "rate_card_stale": Spec(
        "1 where the card in force was measured on something else than what is loaded."
    ),
    "quality_card_info": Spec("Always 1; the quality card in force, none is empty.", "version"),
    "quality_card_stale": Spec(
        "1 where the quality card that is wanted is dropped: it is of other models."
    ),
    "quality_card_timestamp_seconds": Spec(
        "When the quality card in force was made, in seconds since 1970; 0 without one."
    ),
    # The device
    "batch_size": Spec("Sequences in the last step.", "tier"),
    "tier_state": Spec(
        "1 for the state that the tier is in.",
        "tier state",
        known={"state": [state.value for state in TierState]},
    ),
    "model_load_progress_ratio": Spec("How much of the model is loaded, 0 to 1.", "tier"),
    "model_load_seconds": Spec("How long the model took to load.", "tier"),
    "model_memory_bytes": Spec(
        "Memory of the model on its device.",
        "tier kind",
        known={"kind": ("weights", "kv_cache", "graphs")},
    ),
    "device_fallback": Spec("1 where another device serves than the one that was wanted."),
    "build_info": Spec("Always 1; the daemon's version.", "version"),
    "model_info": Spec(
        "Always 1; the model of a tier.",
        "tier name revision architecture precision kernels device",
    ),
    # Calls and credentials
    "last_reload_successful": Spec(
        "Whether what the file holds is what is in force: 0 after a reload that failed.", "file"
    ),
    "tls_certificate_expiry_timestamp_seconds": Spec(
        "When the certificate in use expires, in seconds since 1970; 0 without one."
    ),
    "open_calls": Spec("Calls in progress."),
    "connections": Spec("Connections to the gRPC port."),
    "full_addresses": Spec(
        "Addresses that have as many connections as they may; further ones are not answered."
    ),
    "unread_replies": Spec("Replies that have waited for their readers for a second or longer."),
    "unread_bytes": Spec("What is kept for those readers, about."),
}

HISTOGRAMS = {
    # Jobs
    "route_decision_seconds": Spec("Time to decide a route.", buckets=DECISION),
    "time_to_first_token_seconds": Spec(
        "From the arrival of a request until its first token; contended: the other tier had work "
        "when that came.",
        "tier contended",
        FIRST_TOKEN,
    ),
    "inter_token_latency_seconds": Spec(
        "Between two tokens of one stream, as handed to the reader; contended: the other tier had "
        "work then.",
        "tier contended",
        INTER_TOKEN,
    ),
    "queue_seconds": Spec("From admission until the first prefill step.", "tier", DURATION),
    "prefill_seconds": Spec("From the first prefill step to the first token.", "tier", DURATION),
    "decode_seconds": Spec("From the first token until the last.", "tier", DURATION),
    "request_duration_seconds": Spec(
        "From the arrival of a request until its end, however it ended.", "tier outcome", DURATION
    ),
    "prompt_tokens": Spec("Prompt tokens of a job.", "tier", TOKENS),
    "output_tokens": Spec("Output tokens of a job.", "tier", TOKENS),
    "accepted_draft_tokens": Spec(
        "Tokens of a draft that were accepted, for each draft that was verified.",
        "tier origin",
        DRAFT,
        known={"origin": ORIGINS},
    ),
    "answer_error_probability": Spec(
        "How likely a cascade's first answer is wrong, by the quality card.", buckets=DOUBT
    ),
    # Money
    "ledger_commit_seconds": Spec(
        "Time until a group of ledger operations is durable.", buckets=COMMIT
    ),
    "ledger_group_size": Spec("Ledger operations made durable by one commit.", buckets=GROUP),
    "ledger_read_seconds": Spec(
        "Time until a caller's read of the books is answered.", buckets=COMMIT
    ),
    # The device and the event loop
    "engine_step_seconds": Spec(
        "Device time of one forward pass.",
        "tier kind",
        STEP,
        known={"kind": [kind.value for kind in StepKind]},
    ),
    "event_loop_lag_seconds": Spec(
        "What comes to the event loop waits for its turn, sampled twenty times a second.",
        buckets=LAG,
    ),
}


M = TypeVar("M", bound=MetricWrapperBase)


class Series:
    """Every series of the tables, in one registry, under its name without the prefix."""

    def __init__(self, registry: CollectorRegistry, tiers: Sequence[str]) -> None:
        self._registry = registry
        self._known = {"tier": tiers, "contended": CONTENDED, "file": ("tokens", "certificate")}
        self._counters = {name: self._made(Counter, name, spec) for name, spec in COUNTERS.items()}
        self.gauges = {name: self._made(Gauge, name, spec) for name, spec in GAUGES.items()}
        self.histograms = {
            name: self._made(Histogram, name, spec, buckets=spec.buckets)
            for name, spec in HISTOGRAMS.items()
        }
        self._start_endings(tiers)

    def count(self, name: str, amount: float, *labels: str) -> None:
        """Add to a counter."""
        counter = self._counters[name]
        (counter.labels(*labels) if labels else counter).inc(amount)

    def show(self, name: str, value: float, *labels: str) -> None:
        """Set a gauge."""
        gauge = self.gauges[name]
        (gauge.labels(*labels) if labels else gauge).set(value)

    def observe(
        self,
        name: str,
        amount: float,
        *labels: str,
        exemplar: Mapping[str, str] | None = None,
        count: int = 1,
    ) -> None:
        """Observe the same amount `count` times in a histogram."""
        histogram = self.histograms[name]
        (histogram.labels(*labels) if labels else histogram).observe(amount, exemplar, count)

    def _made(self, kind: type[M], name: str, spec: Spec, **options: Any) -> M:  # noqa: ANN401 - the kind's own
        labels = spec.labels.split()
        made = kind(name, spec.text, labels, namespace=PREFIX, registry=self._registry, **options)
        known = {**self._known, **spec.known}
        if labels:
            for values in itertools.product(*(known.get(label, ()) for label in labels)):
                made.labels(*values)
        return made

    def _start_endings(self, tiers: Sequence[str]) -> None:
        """Start how jobs can end, whose codes depend on the outcome, at zero."""
        endings = [(ABORTED if end in ABORTS else FINISHED, end.value) for end in StopReason]
        errors = [*((REFUSED, code) for code in REFUSALS), *((FAILED, code) for code in FAULTS)]
        for tier in (*tiers, NO_TIER):
            own = [] if tier == NO_TIER else [*endings, (REPLAYED, REPLAYED)]
            for outcome, code in (*own, *errors):
                self.count("requests_total", 0, tier, outcome, code)
                if outcome != REPLAYED:
                    self.histograms["request_duration_seconds"].labels(tier, outcome)
