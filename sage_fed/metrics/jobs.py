"""What became of jobs: decided, delivered, ended, and whether the tiers got in each other's way.

Owns which tier has work now: the latencies are told apart by the other tier's. Called on the event
loop; each method is a few dictionary look-ups and additions.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping

from sage_fed.core import TIER_ROLES, Finished, Refusal, Route, Tier, Usage
from sage_fed.errors import SageFedError
from sage_fed.metrics.money import MoneyMetrics
from sage_fed.metrics.series import (
    ABORTED,
    ABORTS,
    AUTO,
    CODES,
    CONTENDED,
    FAILED,
    FAULTS,
    FINISHED,
    NO_TIER,
    OTHER,
    REFUSED,
    REPLAYED,
    Factory,
    JobSeries,
)

_SLOW_WAIT_S = 0.2
"""Between two tokens: a reader notices, so the bucket leads to the job."""

Decisions = Iterable[tuple[Tier | None, Tier | None, str]]


class JobMetrics:
    """Counts jobs; `decisions` are those that the router can make, which start at zero."""

    def __init__(self, make: Factory, money: MoneyMetrics, decisions: Decisions) -> None:
        self._series = JobSeries(make)
        self._money = money
        self._at_work = dict.fromkeys(TIER_ROLES, 0)
        self._gaps = {
            tier: self._series.inter_token.labels(tier.name, "false") for tier in TIER_ROLES
        }
        for requested, chosen, reason in decisions:
            self._series.decisions.labels(_asked(requested), _name(chosen), str(reason))

    def route_decided(
        self, requested: Tier | None, decision: Route | Refusal, seconds: float
    ) -> None:
        """Counts a decision and, if it denied money, the amount."""
        chosen = decision.tier if isinstance(decision, Route) else None
        self._series.decisions.labels(_asked(requested), _name(chosen), decision.reason).inc()
        self._series.decision_seconds.observe(seconds)
        if isinstance(decision, Refusal) and decision.denied_uatp:
            self._money.denied(decision.reason, decision.denied_uatp)

    @contextlib.contextmanager
    def at_work(self, tier: Tier) -> Iterator[None]:
        """Counts a job as work of its tier, which contends with the other tier's, while it lasts.

        A token's contention is looked up when that changes, not when the token comes.
        """
        self._change_work(tier, 1)
        try:
            yield
        finally:
            self._change_work(tier, -1)

    def _change_work(self, tier: Tier, change: int) -> None:
        before, after = self._at_work[tier], self._at_work[tier] + change
        self._at_work[tier] = after
        if before and after:
            return
        for other in TIER_ROLES:
            if other is not tier:
                label = CONTENDED[self.contended(other)]
                self._gaps[other] = self._series.inter_token.labels(other.name, label)

    def contended(self, tier: Tier) -> bool:
        """Says whether another tier has work now."""
        return any(jobs for other, jobs in self._at_work.items() if other is not tier)

    def tokens_delivered(
        self, tier: Tier, num_tokens: int, gap_s: float, exemplar: Mapping[str, str] | None = None
    ) -> None:
        """Counts the wait for `num_tokens` that came `gap_s` after the ones before them."""
        if num_tokens:
            wait_s = gap_s / num_tokens
            slow = exemplar if wait_s > _SLOW_WAIT_S else None
            self._gaps[tier].observe_many(wait_s, num_tokens, slow)

    def finished(
        self,
        tier: Tier,
        finished: Finished,
        *,
        contended: bool = False,
        exemplar: Mapping[str, str] | None = None,
    ) -> None:
        """Counts a job that delivered an ending, aborted ones included.

        Args:
            tier: where it ran.
            finished: its ending.
            contended: whether the other tier had work when its first token came.
            exemplar: labels that lead from the buckets of its times to the job.
        """
        series, name, timing = self._series, tier.name, finished.timing
        outcome = ABORTED if finished.stop_reason in ABORTS else FINISHED
        series.requests.labels(name, outcome, finished.stop_reason.value).inc()
        series.duration.labels(name, outcome).observe_many(timing.total_s, 1, exemplar)
        series.queue.labels(name).observe(timing.queue_s)
        if finished.usage.output_tokens:
            first_token = series.first_token.labels(name, CONTENDED[contended])
            first_token.observe_many(timing.time_to_first_token_s, 1, exemplar)
            series.prefill.labels(name).observe(timing.prefill_s)
            series.decode.labels(name).observe(timing.decode_s)
        series.prompt_tokens.labels(name).observe(finished.usage.prompt_tokens)
        series.output_tokens.labels(name).observe(finished.usage.output_tokens)
        series.device_seconds.labels(name, outcome).inc(timing.device_s)
        self._count_tokens(name, outcome, finished.usage)

    def failed(
        self,
        tier: Tier | None,
        error: SageFedError,
        seconds: float,
        usage: Usage | None = None,
        device_s: float = 0.0,
    ) -> None:
        """Counts a job that ended with an error; `usage` is what was computed for nobody."""
        fault = isinstance(error, FAULTS) or usage is not None
        outcome, name = FAILED if fault else REFUSED, _name(tier)
        code = error.reason.lower()
        self._series.requests.labels(name, outcome, code if code in CODES else OTHER).inc()
        self._series.duration.labels(name, outcome).observe(seconds)
        if usage is not None:
            self._series.device_seconds.labels(name, FAILED).inc(device_s)
            self._count_tokens(name, FAILED, usage)

    def replayed(self, tier: Tier) -> None:
        """Counts a repeated request id that was answered from the books."""
        self._series.requests.labels(tier.name, REPLAYED, REPLAYED).inc()

    def _count_tokens(self, tier: str, outcome: str, usage: Usage) -> None:
        tokens = self._series.tokens
        tokens.labels(tier, "prompt", outcome).inc(usage.prompt_tokens)
        tokens.labels(tier, "cached", outcome).inc(usage.cached_tokens)
        tokens.labels(tier, "output", outcome).inc(usage.output_tokens)


def _name(tier: Tier | None) -> str:
    return NO_TIER if tier is None else tier.name


def _asked(requested: Tier | None) -> str:
    return AUTO if requested is None else requested.name
