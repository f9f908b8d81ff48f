"""Every series in one registry: the recorders by which the daemon says what happened, and the page.

Owns what belongs to none of them alone: what is computed at the scrape, and where it is served.

What became of jobs: decided, delivered, ended, and whether the tiers got in each other's way.

Owns which tier has work now: the latencies are told apart by the other tier's. Called on the event
loop; each method is a few dictionary look-ups and additions.

What was held, charged, given back and denied, how fast the books are, and which card prices.

Called on the event loop, and by the ledger's observers. Account names appear only where the
operator wants them in metrics.

What the device did and what is on it; implements what the executor offers to observers.

Called on the event loop; a step costs a few dictionary look-ups and additions.

Who was not let in or was thrown out, what is open, and which tokens and certificate hold.

Called on the event loop.

How late the event loop is: what everything that comes to it has to wait.

A timer, twenty times a second, and how much later than it was due it ran. A turn of the loop that
takes long, or a thread that keeps the interpreter's lock or the processor from it, all look the
same here, and to a client; the loop's own processor time tells them apart.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping

from prometheus_client import (
    CollectorRegistry,
    GCCollector,
    PlatformCollector,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)

from sage_fed.core import (
    TIER_ROLES,
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
from sage_fed.metrics.collectors import (
    LiveRates,
    PowerCollector,
    ScrapeCollector,
    Sensor,
    Snapshot,
    find_sensor,
)
from sage_fed.metrics.page import OPEN_PAGE, MetricsServer, PageDoor
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
from sage_fed.steps import StepReport


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
        live = LiveRates()
        self._scrape = ScrapeCollector(live)
        make = Factory(self.registry)
        self.money = MoneyMetrics(make, per_account_balance=per_account_balance)
        self.jobs = JobMetrics(make, self.money, decisions)
        self.engines = EngineMetrics(make, live, self._scrape, version)
        self.doors = DoorMetrics(make)
        self.loop = LoopMetrics(make)
        self.registry.register(self._scrape)
        for collector in (ProcessCollector, PlatformCollector, GCCollector):
            collector(registry=self.registry)

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

    def cost_ratios(self, source: str, ratios: Mapping[Phase, float]) -> None:
        """Says what a card prices; `source` is "configured" or "card" (the one in force)."""
        self._scrape.ratios = {**self._scrape.ratios, source: dict(ratios)}

    def memory_bandwidth(self, bytes_per_s: float) -> None:
        """Says how fast the device reads memory; what decoding is measured against."""
        self._scrape.memory_bytes_per_s = bytes_per_s


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


class MoneyMetrics:
    """Counts ATP; with `per_account_balance`, shows each account's balance under its name."""

    def __init__(self, make: Factory, *, per_account_balance: bool) -> None:
        self._series = MoneySeries(make)
        self._per_account_balance = per_account_balance

    def denied(self, reason: str, denied_uatp: int) -> None:
        """Counts what a job would have cost that was refused for money."""
        self._series.denied.labels(reason).inc(denied_uatp / UATP_PER_ATP)

    def held(self, tier: Tier, held_uatp: int) -> None:
        """Counts a hold."""
        self._series.reserved.labels(tier.name).inc(held_uatp / UATP_PER_ATP)

    def settled(self, tier: Tier, held_uatp: int, charged_uatp: int) -> None:
        """Counts a hold that ended with a price."""
        self._series.charged.labels(tier.name).inc(charged_uatp / UATP_PER_ATP)
        self._series.refunded.labels(tier.name).inc((held_uatp - charged_uatp) / UATP_PER_ATP)

    def voided(self, tier: Tier, released_uatp: int) -> None:
        """Counts a hold that was given back whole."""
        self._series.refunded.labels(tier.name).inc(released_uatp / UATP_PER_ATP)

    def balance_changed(self, account: str, balance_uatp: int) -> None:
        """Shows an account's balance, where the operator wants account names in metrics."""
        if self._per_account_balance:
            self._series.balance.labels(account).set(balance_uatp / UATP_PER_ATP)

    def ledger_committed(self, num_operations: int, latency_s: float) -> None:
        """Counts one durable group of the ledger; what `Ledger.open(on_commit=)` calls."""
        self._series.commit_seconds.observe(latency_s)
        self._series.group_size.observe(num_operations)

    def ledger_read(self, latency_s: float) -> None:
        """Counts one read of the books for a caller; what `Ledger.open(on_read=)` calls."""
        self._series.read_seconds.observe(latency_s)

    def ledger_folded(self, num_entries: int) -> None:
        """Counts entries that days stand for now; what `Ledger.open(on_fold=)` calls."""
        self._series.folded.inc(num_entries)

    def ledger_writable(self, *, writable: bool) -> None:
        """Says whether the ledger's disk takes entries; what `Ledger.open(on_disk=)` calls."""
        self._series.writable.set(writable)

    def ledger_recovered(self, voided_jobs: int, voided_uatp: int) -> None:
        """Says which holds of the daemon before this one the start had to give back."""
        self._series.recovered_jobs.set(voided_jobs)
        self._series.recovered_atp.set(voided_uatp / UATP_PER_ATP)

    def rate_card(self, version: str, *, stale: bool = False) -> None:
        """Says which card is in force, and whether it was measured on something else."""
        self._series.card.clear()
        self._series.card.labels(version).set(1)
        self._series.card_stale.set(stale)


class EngineMetrics:
    """Counts steps and shows tiers; `live` and `scrape` get what a scrape computes with.

    `version` is the daemon's.
    """

    def __init__(
        self, make: Factory, live: LiveRates, scrape: ScrapeCollector, version: str
    ) -> None:
        self._series = EngineSeries(make)
        self._series.build.labels(version).set(1)
        self._live = live
        self._scrape = scrape
        self._model_labels: dict[Tier, tuple[str, ...]] = {}
        self._restarts = dict.fromkeys(TIER_ROLES, 0)

    def step_done(self, report: StepReport) -> None:
        """Counts one step, or several of a kind."""
        series, name = self._series, report.tier.name
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
        name = status.tier.name
        for state in TierState:
            self._series.state.labels(name, state.value).set(state is status.state)
        self._series.load_progress.labels(name).set(status.load_progress)
        self._series.restarts.labels(name).inc(status.restarts - self._restarts[status.tier])
        self._restarts[status.tier] = status.restarts
        if status.info is not None and status.state is TierState.READY:
            self._show_model(status.tier, status.info)

    def _show_model(self, tier: Tier, info: ModelInfo) -> None:
        series, name = self._series, tier.name
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

    def device_fallback(self, *, fallen_back: bool) -> None:
        """Says whether another device serves than the one that was wanted."""
        self._series.fallback.set(fallen_back)


DENIALS = (
    "unauthenticated",
    "forbidden",
    "requests_per_minute",
    "concurrent_jobs",
    "waiting",
    "open_calls",
    "unread_replies",
    "unread_bytes",
)
CALLS_ENDED = ("receive", "write", "pressure", "unread", "operator")
CONNECTIONS_CLOSED = ("per_address", "unread", "strangers", "operator")
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
        self.calls_ended = make.counter(
            "calls_ended_total",
            "Calls that were ended because their peer did not send or read in time (receive, "
            "write), kept others waiting (pressure), had too much unread, or by an operator.",
            "why",
        )
        self.connections_closed = make.counter(
            "connections_closed_total",
            "Connections that were closed: too many of one address, too much unread, nothing but "
            "calls of nobody who may call, or by an operator.",
            "why",
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
        for why in CALLS_ENDED:
            self.calls_ended.labels(why)
        for why in CONNECTIONS_CLOSED:
            self.connections_closed.labels(why)
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

    def call_ended(self, why: str) -> None:
        """Counts a call that its peer was too slow for, or that an operator ended."""
        self._series.calls_ended.labels(why).inc()

    def connection_closed(self, why: str) -> None:
        """Counts a connection that was closed."""
        self._series.connections_closed.labels(why).inc()

    def calls_seen(
        self, *, calls: int, unread: int, unread_bytes: int, connections: int, full_addresses: int
    ) -> None:
        """Shows what is open now."""
        self._series.open_calls.set(calls)
        self._series.unread_replies.set(unread)
        self._series.unread_bytes.set(unread_bytes)
        self._series.connections.set(connections)
        self._series.full_addresses.set(full_addresses)

    def reloaded(self, file: str, *, failed: bool = False) -> None:
        """Tells that a changed file ("tokens" or "certificate") was read again, and how it went."""
        self._series.reloads.labels(file, BROKEN if failed else DONE).inc()
        self._series.reload_good.labels(file).set(not failed)

    def certificate_expires(self, at_s: float) -> None:
        """Shows until when the certificate in use is good, in seconds since 1970."""
        self._series.certificate_expiry.set(at_s)


INTERVAL_S = 0.05

LAG = (0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)

_MAX_SAMPLES = 1000
"""Of one delay: 50 s of it."""


class LoopMetrics:
    """Samples the loop that it runs on.

    Args:
        make: makes the series.
        sleep: seconds that the loop is asked to wait.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        make: Factory,
        *,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._sleep = sleep
        self._clock = clock
        self._lag = make.histogram(
            "event_loop_lag_seconds",
            "What comes to the event loop waits for its turn, sampled twenty times a second.",
            LAG,
        )
        self._cpu = make.counter(
            "event_loop_cpu_seconds_total",
            "CPU time of the event loop's thread; one a second is all.",
        )

    async def watch(self) -> None:
        """Sample until cancelled."""
        cpu_s = time.thread_time()
        while True:
            due_s = self._clock() + INTERVAL_S
            await self._sleep(INTERVAL_S)
            lag_s = max(self._clock() - due_s, 0.0)
            # Those samples count, too, that were due while it was late: one of a second's delay
            # would else be one of twenty a second, and not all of them.
            for _ in range(_MAX_SAMPLES):
                self._lag.observe(lag_s)
                lag_s -= INTERVAL_S
                if lag_s <= 0:
                    break
            before_s, cpu_s = cpu_s, time.thread_time()
            self._cpu.inc(cpu_s - before_s)
