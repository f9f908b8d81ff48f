"""The methods by which the daemon says what happened.

Called on the event loop; each is a few dictionary look-ups and additions. Implements what the
executor and the ledger offer to observers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping

from prometheus_client import (
    CollectorRegistry,
    GCCollector,
    PlatformCollector,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)

from sage_fed.core import (
    UATP_PER_ATP,
    Finished,
    ModelInfo,
    Phase,
    Refusal,
    Route,
    Tier,
    TierState,
    TierStatus,
    Usage,
)
from sage_fed.errors import SageFedError
from sage_fed.metrics.doors import BROKEN, DONE, DoorSeries
from sage_fed.metrics.live import LiveRates
from sage_fed.metrics.power import PowerCollector, Sensor, find_sensor
from sage_fed.metrics.scrape import ScrapeCollector, Snapshot
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
    EngineSeries,
    Factory,
    JobSeries,
    MoneySeries,
)
from sage_fed.metrics.server import OPEN_PAGE, MetricsServer, PageDoor
from sage_fed.steps import StepReport

_SLOW_WAIT_S = 0.2
"""Between two tokens: a reader notices, so the bucket leads to the job."""

Decisions = Iterable[tuple[Tier | None, Tier | None, str]]


class Metrics:
    """Every series, in one registry.

    Args:
        registry: where they go; a fresh one by default. The library's global one is not touched.
        version: of the daemon, for build_info.
        decisions: (requested, chosen, reason) that the router can make, to start at zero.
        per_account_balance: export one balance per account, and with it account names.
    """

    def __init__(
        self,
        registry: CollectorRegistry | None = None,
        *,
        version: str = "",
        decisions: Decisions = (),
        per_account_balance: bool = False,
    ) -> None:
        # A switch of the whole process: the library would double every counter otherwise.
        disable_created_metrics()  # type: ignore[no-untyped-call]  # the library's
        self.registry = registry or CollectorRegistry()
        make = Factory(self.registry)
        self._jobs = JobSeries(make)
        self._money = MoneySeries(make)
        self._engines = EngineSeries(make)
        self._doors = DoorSeries(make)
        self._model_labels: dict[Tier, tuple[str, ...]] = {}
        self._at_work = dict.fromkeys(Tier, 0)
        self._gaps = {tier: self._jobs.inter_token.labels(tier.value, "false") for tier in Tier}
        self._restarts = dict.fromkeys(Tier, 0)
        self._live = LiveRates()
        self._scrape = ScrapeCollector(self._live)
        self.registry.register(self._scrape)
        for collector in (ProcessCollector, PlatformCollector, GCCollector):
            collector(registry=self.registry)
        self._per_account_balance = per_account_balance
        self._engines.build.labels(version).set(1)
        for requested, chosen, reason in decisions:
            self._jobs.decisions.labels(_asked(requested), _name(chosen), str(reason))

    def watch(self, snapshot: Callable[[], Snapshot]) -> None:
        """Asks `snapshot` at every scrape.

        It is called in the scraping thread and returns values that nobody changes afterwards.
        """
        self._scrape.snapshot = snapshot

    @contextlib.contextmanager
    def watch_power(self, gpu_uuid: str) -> Iterator[Sensor | None]:
        """Shows what a GPU draws, while the context lasts and if a sensor says so."""
        sensor = find_sensor(gpu_uuid)
        if sensor is None:
            yield None
            return
        collector = PowerCollector(sensor)
        self.registry.register(collector)
        try:
            yield sensor
        finally:
            self.registry.unregister(collector)
            collector.close()

    def serve(self, host: str, port: int, door: PageDoor = OPEN_PAGE) -> MetricsServer:
        """Starts the HTTP endpoint; raises `OSError` where it cannot bind."""
        return MetricsServer(self.registry, host, port, door=door)

    def exposition(self) -> bytes:
        """What a scrape returns now, in the text format."""
        return generate_latest(self.registry)

    # Configuration

    def cost_ratios(self, source: str, ratios: Mapping[Phase, float]) -> None:
        """Says what a card prices; `source` is "configured" or "card" (the one in force)."""
        self._scrape.ratios = {**self._scrape.ratios, source: dict(ratios)}

    def rate_card(self, version: str, *, stale: bool = False) -> None:
        """Says which card is in force, and whether it was measured on something else."""
        self._money.card.clear()
        self._money.card.labels(version).set(1)
        self._money.card_stale.set(stale)

    def memory_bandwidth(self, bytes_per_s: float) -> None:
        """Says how fast the device reads memory; what decoding is measured against."""
        self._scrape.memory_bytes_per_s = bytes_per_s

    def device_fallback(self, *, fallen_back: bool) -> None:
        """Says whether another device serves than the one that was wanted."""
        self._engines.fallback.set(fallen_back)

    # Doors

    def call_denied(self, reason: str) -> None:
        """Counts a call that was not let in."""
        self._doors.denied.labels(reason).inc()

    def reloaded(self, file: str, *, failed: bool = False) -> None:
        """Tells that a changed file ("tokens" or "certificate") was read again, and how it went."""
        self._doors.reloads.labels(file, BROKEN if failed else DONE).inc()
        self._doors.reload_good.labels(file).set(not failed)

    def certificate_expires(self, at_s: float) -> None:
        """Shows until when the certificate in use is good, in seconds since 1970."""
        self._doors.certificate_expiry.set(at_s)

    # Jobs

    def route_decided(
        self, requested: Tier | None, decision: Route | Refusal, seconds: float
    ) -> None:
        """Counts a decision and, if it denied money, the amount."""
        chosen = decision.tier if isinstance(decision, Route) else None
        self._jobs.decisions.labels(_asked(requested), _name(chosen), decision.reason).inc()
        self._jobs.decision_seconds.observe(seconds)
        if isinstance(decision, Refusal) and decision.denied_uatp:
            self._money.denied.labels(decision.reason).inc(decision.denied_uatp / UATP_PER_ATP)

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
        for other in Tier:
            if other is not tier:
                label = CONTENDED[self.contended(other)]
                self._gaps[other] = self._jobs.inter_token.labels(other.value, label)

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

    def job_finished(
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
        series, name, timing = self._jobs, tier.value, finished.timing
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

    def job_failed(
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
        self._jobs.requests.labels(name, outcome, code if code in CODES else OTHER).inc()
        self._jobs.duration.labels(name, outcome).observe(seconds)
        if usage is not None:
            self._jobs.device_seconds.labels(name, FAILED).inc(device_s)
            self._count_tokens(name, FAILED, usage)

    def replayed(self, tier: Tier) -> None:
        """Counts a repeated request id that was answered from the books."""
        self._jobs.requests.labels(tier.value, REPLAYED, REPLAYED).inc()

    # Money

    def held(self, tier: Tier, held_uatp: int) -> None:
        """Counts a hold."""
        self._money.reserved.labels(tier.value).inc(held_uatp / UATP_PER_ATP)

    def settled(self, tier: Tier, held_uatp: int, charged_uatp: int) -> None:
        """Counts a hold that ended with a price."""
        self._money.charged.labels(tier.value).inc(charged_uatp / UATP_PER_ATP)
        self._money.refunded.labels(tier.value).inc((held_uatp - charged_uatp) / UATP_PER_ATP)

    def voided(self, tier: Tier, released_uatp: int) -> None:
        """Counts a hold that was given back whole."""
        self._money.refunded.labels(tier.value).inc(released_uatp / UATP_PER_ATP)

    def balance_changed(self, account: str, balance_uatp: int) -> None:
        """Shows an account's balance, where the operator wants account names in metrics."""
        if self._per_account_balance:
            self._money.balance.labels(account).set(balance_uatp / UATP_PER_ATP)

    def ledger_committed(self, num_operations: int, latency_s: float) -> None:
        """Counts one durable group of the ledger; what `Ledger.open(on_commit=)` calls."""
        self._money.commit_seconds.observe(latency_s)
        self._money.group_size.observe(num_operations)

    def ledger_writable(self, *, writable: bool) -> None:
        """Says whether the ledger's disk takes entries; what `Ledger.open(on_disk=)` calls."""
        self._money.writable.set(writable)

    # Engines (what the executor offers to observers)

    def step_done(self, report: StepReport) -> None:
        """Counts one step, or several of a kind."""
        series, name = self._engines, report.tier.value
        self._live.add(report)
        if report.out_of_memory:
            series.oom.labels(name).inc()
        if report.num_steps:
            step_seconds = series.step_seconds.labels(name, report.kind.value)
            step_seconds.observe_many(report.elapsed_s / report.num_steps, report.num_steps)
        counts = (
            (series.tokens.labels(name, Phase.PREFILL.value), report.num_prefill_tokens),
            (series.tokens.labels(name, Phase.DECODE.value), report.num_decode_tokens),
            (series.preemptions.labels(name), report.num_preempted),
            (series.queried.labels(name), report.num_queried_tokens),
            (series.hit.labels(name), report.num_hit_tokens),
        )
        for counter, count in counts:
            # Most steps only decode: four of the five have nothing to add.
            if count:
                counter.inc(count)
        if report.num_steps:
            series.batch_size.labels(name).set(report.num_sequences / report.num_steps)

    def tier_changed(self, status: TierStatus) -> None:
        """Shows a tier's state, its progress and, once loaded, its model."""
        name = status.tier.value
        for state in TierState:
            self._engines.state.labels(name, state.value).set(state is status.state)
        self._engines.load_progress.labels(name).set(status.load_progress)
        self._engines.restarts.labels(name).inc(status.restarts - self._restarts[status.tier])
        self._restarts[status.tier] = status.restarts
        if status.info is not None and status.state is TierState.READY:
            self._show_model(status.tier, status.info)

    def _show_model(self, tier: Tier, info: ModelInfo) -> None:
        series, name = self._engines, tier.value
        if tier in self._model_labels:
            series.model.remove(*self._model_labels[tier])
        labels = (
            *(info.name, info.revision, info.architecture),
            *(info.precision, info.kernels, info.device),
        )
        self._model_labels[tier] = (name, *labels)
        series.model.labels(name, *labels).set(1)
        series.load_seconds.labels(name).set(info.load_s)
        series.model_memory.labels(name, "weights").set(info.weight_bytes)
        series.model_memory.labels(name, "kv_cache").set(info.kv_cache_bytes)
        series.model_memory.labels(name, "graphs").set(info.graph_bytes)
        read = (info.step_bytes, info.kv_token_bytes)
        self._scrape.read_bytes = {**self._scrape.read_bytes, tier: read}

    def _count_tokens(self, tier: str, outcome: str, usage: Usage) -> None:
        tokens = self._jobs.tokens
        tokens.labels(tier, "prompt", outcome).inc(usage.prompt_tokens)
        tokens.labels(tier, "cached", outcome).inc(usage.cached_tokens)
        tokens.labels(tier, "output", outcome).inc(usage.output_tokens)


def _name(tier: Tier | None) -> str:
    return NO_TIER if tier is None else tier.value


def _asked(requested: Tier | None) -> str:
    return AUTO if requested is None else requested.value
