"""What the daemon reports as it happens, turned into series of one registry.

The event loop calls every method when the event happens; each is a few dictionary look-ups and
additions, and cannot fail. Account names appear only where the operator asks for them; no label
holds a prompt, a token or a path.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType

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
    DraftOrigin,
    Finished,
    Mode,
    ModelInfo,
    Phase,
    Price,
    Refusal,
    Route,
    StageTiming,
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
    processor_sensor,
)
from sage_fed.metrics.page import OPEN_PAGE, MetricsServer, PageAccess
from sage_fed.metrics.series import (
    ABORTED,
    ABORTS,
    ACCEPTED,
    CONTENDED,
    DRAFTED,
    FAILED,
    FAULTS,
    FINISHED,
    NO_TIER,
    REFUSALS,
    REFUSED,
    REJECTED,
    RELOAD_FAILED,
    RELOADED,
    REPLAYED,
    Series,
)
from sage_fed.steps import StepReport

_SLOW_WAIT_S = 0.2
"""Between two tokens: a reader notices, so the bucket leads to the job."""

_LOOP_INTERVAL_S = 0.05
_MAX_LOOP_SAMPLES = 1000
"""Of one delay of the event loop: 50 s of it."""


_TOKEN_TYPES: Mapping[Phase, tuple[str, ...]] = MappingProxyType(
    {
        Phase.PREFILL: ("prompt",),
        Phase.CACHED: ("prompt", "cached"),
        Phase.DECODE: ("output",),
        Phase.DRAFT: ("draft",),
        Phase.VERIFY: ("verify",),
    }
)
"""The values of the label `type` that count a token of a phase."""


class Metrics:
    """Every series, in one registry.

    Args:
        registry: where they go; a fresh one by default. The library's global one is not touched.
        tiers: of the daemon.
        version: of the daemon, for build_info.
        decisions: (requested, chosen, reason) that the router can make, to start at zero.
        per_account_balance: export one balance per account, and with it account names.
    """

    def __init__(
        self,
        registry: CollectorRegistry | None = None,
        *,
        tiers: Sequence[Tier] = TIER_ROLES,
        version: str = "",
        decisions: Iterable[tuple[Tier | None, Tier | None, str]] = (),
        per_account_balance: bool = False,
    ) -> None:
        # A switch of the whole process: the library would double every counter otherwise.
        disable_created_metrics()  # type: ignore[no-untyped-call]  # the library's
        self.registry = registry or CollectorRegistry()
        self._series = Series(self.registry, [tier.name for tier in tiers])
        self._live = LiveRates(tiers)
        self._scrape = ScrapeCollector(self._live, tiers)
        self.registry.register(self._scrape)
        for collector in (ProcessCollector, PlatformCollector, GCCollector):
            collector(registry=self.registry)
        self._per_account_balance = per_account_balance
        self._at_work = dict.fromkeys(tiers, 0)
        self._waits = self._series.histograms["inter_token_latency_seconds"]
        self._wait_of = {tier: self._waits.labels(tier.name, "false") for tier in tiers}
        self._model_labels: dict[Tier, tuple[str, ...]] = {}
        self._restarts = dict.fromkeys(tiers, 0)
        self._busy_s = 0.0
        """Of the device, since the start."""
        self._power: PowerCollector | None = None
        self._series.show("build_info", 1, version)
        self._series.show("ledger_writable", 1)
        for file in ("tokens", "certificate"):
            self._series.show("last_reload_successful", 1, file)
        for requested, chosen, reason in decisions:
            labels = (_name(requested, "auto"), _name(chosen), str(reason))
            self._series.count("route_decisions_total", 0, *labels)

    # Jobs

    def route_decided(
        self, requested: Tier | None, decision: Route | Refusal, seconds: float
    ) -> None:
        """Count a decision and, if it denied money, what the job would have cost."""
        chosen = decision.tier if isinstance(decision, Route) else None
        reason = decision.reason
        labels = (_name(requested, "auto"), _name(chosen), reason)
        self._series.count("route_decisions_total", 1, *labels)
        self._series.observe("route_decision_seconds", seconds)
        if isinstance(decision, Refusal) and decision.denied_uatp:
            self._series.count("atp_denied_total", decision.denied_uatp / UATP_PER_ATP, reason)

    @contextlib.contextmanager
    def at_work(self, tier: Tier) -> Iterator[None]:
        """Count a job as work of its tier, which contends with the others', while it lasts.

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
        for other in self._at_work:
            if other != tier:
                label = CONTENDED[self.contended(other)]
                self._wait_of[other] = self._waits.labels(other.name, label)

    def contended(self, tier: Tier) -> bool:
        """Return whether another tier has work now."""
        return any(jobs for other, jobs in self._at_work.items() if other != tier)

    def tokens_delivered(
        self, tier: Tier, num_tokens: int, gap_s: float, exemplar: Mapping[str, str] | None = None
    ) -> None:
        """Count the wait for `num_tokens` that came `gap_s` after the ones before them."""
        if num_tokens:
            wait_s = gap_s / num_tokens
            slow = exemplar if wait_s > _SLOW_WAIT_S else None
            self._wait_of[tier].observe(wait_s, slow, num_tokens)

    def job_finished(
        self,
        tier: Tier,
        finished: Finished,
        *,
        contended: bool = False,
        exemplar: Mapping[str, str] | None = None,
    ) -> None:
        """Count a job that delivered an ending, aborted ones included.

        Args:
            tier: where it ran.
            finished: its ending.
            contended: whether another tier had work when its first token came.
            exemplar: labels that lead from the buckets of its times to the job.
        """
        series, name, timing, usage = self._series, tier.name, finished.timing, finished.usage
        outcome = ABORTED if finished.stop_reason in ABORTS else FINISHED
        series.count("requests_total", 1, name, outcome, finished.stop_reason.value)
        series.observe("request_duration_seconds", timing.total_s, name, outcome, exemplar=exemplar)
        if usage.output_tokens:
            labels, first_s = (name, CONTENDED[contended]), timing.time_to_first_token_s
            series.observe("time_to_first_token_seconds", first_s, *labels, exemplar=exemplar)
        series.observe("prompt_tokens", usage.prompt_tokens, name)
        series.observe("output_tokens", usage.output_tokens, name)
        for stage in timing.stages:
            series.observe("queue_seconds", stage.queue_s, stage.tier.name)
            if stage.prefill_s:  # it came to its first token
                series.observe("prefill_seconds", stage.prefill_s, stage.tier.name)
                series.observe("decode_seconds", stage.decode_s, stage.tier.name)
        self._count_work(outcome, usage, timing.stages)
        if finished.cascade is not None:
            series.count("cascade_total", 1, finished.cascade.value)
        if finished.error_probability is not None:
            series.observe(
                "answer_error_probability", finished.error_probability, exemplar=exemplar
            )

    def job_failed(
        self,
        tier: Tier | None,
        error: SageFedError,
        seconds: float,
        usage: Usage | None = None,
        stages: Sequence[StageTiming] = (),
    ) -> None:
        """Count a job that ended with an error.

        `usage` is what its `stages` computed, which was not delivered.
        """
        code, name = error.reason.lower(), _name(tier)
        outcome = FAILED if code in FAULTS or usage is not None else REFUSED
        known = code if code in FAULTS or code in REFUSALS else "other"
        self._series.count("requests_total", 1, name, outcome, known)
        self._series.observe("request_duration_seconds", seconds, name, outcome)
        if usage is not None:
            self._count_work(FAILED, usage, stages)

    def job_replayed(self, tier: Tier) -> None:
        """Count a repeated request id that was answered from the books."""
        self._series.count("requests_total", 1, tier.name, REPLAYED, REPLAYED)

    def _count_work(self, outcome: str, usage: Usage, stages: Sequence[StageTiming]) -> None:
        count = self._series.count
        verifier = next((done.tier for done in usage.by_phase if done.phase is Phase.VERIFY), None)
        if verifier is not None:  # whose output is what it accepted, too
            count("tokens_total", usage.output_tokens, verifier.name, "output", outcome)
        for done in usage.by_phase:
            if done.phase is Phase.DECODE and done.tier == verifier:
                continue
            for kind in _TOKEN_TYPES[done.phase]:
                count("tokens_total", done.tokens, done.tier.name, kind, outcome)
        for stage in stages:
            count("device_seconds_total", stage.device_s, stage.tier.name, outcome)
            if stage.drafter is not None:
                count("device_seconds_total", stage.draft_s, stage.drafter.name, outcome)

    # Money

    def hold_placed(self, held_uatp: Mapping[Tier, int]) -> None:
        """Count what was held for the worst case, by the tiers that may do the work."""
        for tier, held in held_uatp.items():
            self._series.count("atp_reserved_total", held / UATP_PER_ATP, tier.name)

    def hold_settled(self, held_uatp: Mapping[Tier, int], charged_uatp: Mapping[Tier, int]) -> None:
        """Count a hold that ended with a price; a tier without one gives its part back whole."""
        for tier, held in held_uatp.items():
            charged = charged_uatp.get(tier, 0)
            self._series.count("atp_charged_total", charged / UATP_PER_ATP, tier.name)
            self._series.count("atp_refunded_total", (held - charged) / UATP_PER_ATP, tier.name)

    def price_compared(self, mode: Mode, price: Price) -> None:
        """Count what a job has cost less, or more, than one tier alone without drafts."""
        saved_atp = (price.single_uatp - price.charged_uatp) / UATP_PER_ATP
        if saved_atp > 0:
            self._series.count("atp_saved_total", saved_atp, mode.value)
        elif saved_atp < 0 and mode is not Mode.SINGLE:
            self._series.count("atp_extra_total", -saved_atp, mode.value)

    def balance_changed(self, account: str, balance_uatp: int) -> None:
        """Show an account's balance, where the operator wants account names in metrics."""
        if self._per_account_balance:
            self._series.show("atp_balance", balance_uatp / UATP_PER_ATP, account)

    def ledger_committed(self, num_operations: int, latency_s: float) -> None:
        """Count one durable group of the ledger; what `Ledger(on_commit=)` calls."""
        self._series.observe("ledger_commit_seconds", latency_s)
        self._series.observe("ledger_group_size", num_operations)

    def ledger_read(self, latency_s: float) -> None:
        """Count one read of the books for a caller; what `Ledger(on_read=)` calls."""
        self._series.observe("ledger_read_seconds", latency_s)

    def ledger_folded(self, num_entries: int) -> None:
        """Count entries that days stand for now; what `Ledger(on_fold=)` calls."""
        self._series.count("ledger_entries_folded_total", num_entries)

    def ledger_writable(self, *, writable: bool) -> None:
        """Show whether the ledger's disk takes entries; what `Ledger(on_disk=)` calls."""
        self._series.show("ledger_writable", writable)

    def ledger_recovered(self, voided_jobs: int, voided_uatp: int) -> None:
        """Show which holds of the daemon before this one the start had to give back."""
        self._series.show("ledger_recovered_jobs", voided_jobs)
        self._series.show("ledger_recovered_atp", voided_uatp / UATP_PER_ATP)

    def rate_card(self, version: str, *, stale: bool = False) -> None:
        """Show which card is in force, and whether it was measured on something else."""
        self._series.gauges["rate_card_info"].clear()
        self._series.show("rate_card_info", 1, version)
        self._series.show("rate_card_stale", stale)

    def quality_card(self, version: str, *, stale: bool = False, made_s: float = 0.0) -> None:
        """Show which quality card is in force, "" for none, and whether one had to be dropped.

        `made_s` is when it was made, in seconds since 1970.
        """
        self._series.show("quality_card_timestamp_seconds", made_s)
        self._series.gauges["quality_card_info"].clear()
        self._series.show("quality_card_info", 1, version)
        self._series.show("quality_card_stale", stale)

    def cost_ratios(self, source: str, ratios: Mapping[Phase, float]) -> None:
        """Show what a card prices; `source` is "configured" or "card" (the one in force)."""
        self._scrape.ratios = {**self._scrape.ratios, source: dict(ratios)}

    # The device; `step_done` and `tier_changed` make this an observer of the executor

    def step_done(self, report: StepReport) -> None:
        """Count one step, or several of a kind."""
        series, name, steps = self._series, report.tier.name, report.num_steps
        self._live.add(report)
        self._busy_s += report.elapsed_s
        if steps:
            kind, mean_s = report.kind.value, report.elapsed_s / steps
            series.observe("engine_step_seconds", mean_s, name, kind, count=steps)
            series.show("batch_size", report.num_sequences / steps, name)
        counts: list[tuple[int, str, *tuple[str, ...]]] = [
            (report.out_of_memory, "oom_total", name),
            (report.num_prefill_tokens, "engine_tokens_total", name, Phase.PREFILL.value),
            (report.num_decode_tokens, "engine_tokens_total", name, Phase.DECODE.value),
            (report.num_draft_tokens, "engine_tokens_total", name, Phase.DRAFT.value),
            (report.num_verify_tokens, "engine_tokens_total", name, Phase.VERIFY.value),
            (report.num_preempted, "preemptions_total", name),
            (report.num_queried_tokens, "prefix_cache_queried_tokens_total", name),
            (report.num_hit_tokens, "prefix_cache_hit_tokens_total", name),
        ]
        drafts_total = "speculative_tokens_total"
        if report.drafts_for is not None:
            labels = (report.drafts_for.name, DraftOrigin.DRAFTER.value)
            counts.append((report.num_draft_tokens, drafts_total, *labels, DRAFTED))
        for drafts in report.verified:
            labels = (name, drafts.origin.value)
            accepted = drafts.num_accepted * drafts.num_drafts
            if drafts.origin is not DraftOrigin.DRAFTER:  # whose own steps have told of its drafts
                counts.append((drafts.num_tokens, drafts_total, *labels, DRAFTED))
            counts.append((accepted, drafts_total, *labels, ACCEPTED))
            counts.append((drafts.num_tokens - accepted, drafts_total, *labels, REJECTED))
            accepted_each, times = drafts.num_accepted, drafts.num_drafts
            series.observe("accepted_draft_tokens", accepted_each, *labels, count=times)
        for number, counter, *of in counts:
            # Most steps only decode: the others have nothing to add.
            if number:
                series.count(counter, number, *of)

    def tier_changed(self, status: TierStatus) -> None:
        """Show a tier's state, its progress and, once loaded, its model."""
        name = status.tier.name
        for state in TierState:
            self._series.show("tier_state", state is status.state, name, state.value)
        self._series.show("model_load_progress_ratio", status.load_progress, name)
        restarts = status.restarts - self._restarts[status.tier]
        self._series.count("engine_restarts_total", restarts, name)
        self._restarts[status.tier] = status.restarts
        if status.info is not None and status.state is TierState.READY:
            self._show_model(status.tier, status.info)

    def _show_model(self, tier: Tier, info: ModelInfo) -> None:
        series, name = self._series, tier.name
        if tier in self._model_labels:
            series.gauges["model_info"].remove(*self._model_labels[tier])
        self._model_labels[tier] = (
            *(name, info.name, info.revision, info.architecture),
            *(info.precision, info.kernels, info.device),
        )
        series.show("model_info", 1, *self._model_labels[tier])
        series.show("model_load_seconds", info.load_s, name)
        series.show("model_memory_bytes", info.weight_bytes, name, "weights")
        series.show("model_memory_bytes", info.kv_cache_bytes, name, "kv_cache")
        series.show("model_memory_bytes", info.graph_bytes, name, "graphs")
        read = (info.step_bytes, info.kv_token_bytes)
        self._scrape.read_bytes = {**self._scrape.read_bytes, tier: read}

    def device_fallback(self, *, fallen_back: bool) -> None:
        """Show whether another device serves than the one that was wanted."""
        self._series.show("device_fallback", fallen_back)

    def memory_bandwidth(self, bytes_per_s: float) -> None:
        """Show how fast the device reads memory; what decoding is measured against."""
        self._scrape.memory_bytes_per_s = bytes_per_s

    @contextlib.contextmanager
    def watch_power(self, gpu_uuid: str) -> Iterator[Sensor | None]:
        """Read what the device draws, while the context lasts and if a sensor says so.

        Without a GPU ("") that is the processors; the series are of GPUs only.
        """
        sensor = find_sensor(gpu_uuid) if gpu_uuid else processor_sensor()
        if sensor is None:
            yield None
            return
        self._power = collector = PowerCollector(sensor, lambda: self._busy_s)
        if gpu_uuid:
            self.registry.register(collector)
        try:
            yield sensor
        finally:
            self._power = None
            if gpu_uuid:
                self.registry.unregister(collector)
            collector.close()

    @property
    def power_at_work(self) -> tuple[float | None, str]:
        """The device's mean power while it worked, and where that was read or why it is None."""
        if self._power is None:
            return None, "no sensor of this device's power can be read"
        watts, name = self._power.watts_at_work, self._power.sensor_name
        if watts is None:
            return None, f"{name} can be read, and the device has not worked for a second yet"
        return watts, f"mean of {name} while the device worked"

    # Calls, credentials and the event loop

    def call_denied(self, reason: str) -> None:
        """Count a call that was refused before anything was held for it."""
        self._series.count("calls_denied_total", 1, reason)

    def call_ended(self, why: str) -> None:
        """Count a call that its peer was too slow for, or that an operator ended."""
        self._series.count("calls_ended_total", 1, why)

    def connection_closed(self, why: str) -> None:
        self._series.count("connections_closed_total", 1, why)

    def calls_seen(
        self, *, calls: int, unread: int, unread_bytes: int, connections: int, full_addresses: int
    ) -> None:
        self._series.show("open_calls", calls)
        self._series.show("unread_replies", unread)
        self._series.show("unread_bytes", unread_bytes)
        self._series.show("connections", connections)
        self._series.show("full_addresses", full_addresses)

    def reloaded(self, file: str, *, failed: bool = False) -> None:
        """Count that a changed file ("tokens" or "certificate") was read again, and how it went."""
        self._series.count("reloads_total", 1, file, RELOAD_FAILED if failed else RELOADED)
        self._series.show("last_reload_successful", not failed, file)

    def certificate_expires(self, at_s: float) -> None:
        """Show until when the certificate in use is good, in seconds since 1970."""
        self._series.show("tls_certificate_expiry_timestamp_seconds", at_s)

    async def watch_loop(
        self,
        *,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Sample how late the event loop is, until cancelled: what all that comes to it waits.

        A turn of the loop that takes long, or a thread that keeps the interpreter's lock or the
        processor from it, look the same here, and to a client; the loop's CPU time tells them
        apart.
        """
        cpu_s = time.thread_time()
        while True:
            due_s = clock() + _LOOP_INTERVAL_S
            await sleep(_LOOP_INTERVAL_S)
            lag_s = max(clock() - due_s, 0.0)
            # Those samples count, too, that were due while it was late: one of a second's delay
            # would else be one of twenty a second, and not all of them.
            for _ in range(_MAX_LOOP_SAMPLES):
                self._series.observe("event_loop_lag_seconds", lag_s)
                lag_s -= _LOOP_INTERVAL_S
                if lag_s <= 0:
                    break
            before_s, cpu_s = cpu_s, time.thread_time()
            self._series.count("event_loop_cpu_seconds_total", cpu_s - before_s)

    # The page

    def watch(self, snapshot: Callable[[], Snapshot]) -> None:
        """Ask `snapshot` at every scrape.

        It is called in the scraping thread and returns values that do not change afterwards.
        """
        self._scrape.snapshot = snapshot

    def serve(self, host: str, port: int, access: PageAccess = OPEN_PAGE) -> MetricsServer:
        """Start the HTTP endpoint; raises `OSError` where it cannot bind."""
        return MetricsServer(self.registry, host, port, access=access)

    def exposition(self) -> bytes:
        """Return what a scrape returns now, in the text format."""
        return generate_latest(self.registry)


def _name(tier: Tier | None, none: str = NO_TIER) -> str:
    return none if tier is None else tier.name
