"""What the device did and what is on it; implements what the executor offers to observers.

Called on the event loop; a step costs a few dictionary look-ups and additions.
"""

from __future__ import annotations

from sage_fed.core import TIER_ROLES, ModelInfo, Phase, Tier, TierState, TierStatus
from sage_fed.metrics.live import LiveRates
from sage_fed.metrics.scrape import ScrapeCollector
from sage_fed.metrics.series import EngineSeries, Factory
from sage_fed.steps import StepReport


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
