"""One calibration from beginning to end: measure, derive, write, and perhaps adopt.

Owns that there is one at a time. Whoever closes the generator ends it, at the next step of the
device, and leaves nothing behind: no KV block, no file. Balances are never touched: what a
calibration runs is nobody's job.
Fails with `CalibrationRunning`, and as `Executor.probe` and `save_card` do.
"""

from __future__ import annotations

import asyncio
import datetime as dt
from collections.abc import AsyncGenerator, Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from types import MappingProxyType

from sage_fed.calibrate.conditions import read_conditions
from sage_fed.calibrate.derive import prices, reference_point, warning_of
from sage_fed.calibrate.measure import FULL, QUICK, Measurement, Pace
from sage_fed.calibrate.plot import plot_of
from sage_fed.calibrate.report import report_of
from sage_fed.calibrate.samples import median_error, spread_of
from sage_fed.calibrate.store import delete_card, prepare_directory, save_card, stem_of
from sage_fed.cards import Fingerprint, Measured, RateCard
from sage_fed.core import (
    TIER_ROLES,
    CalibrationEvent,
    CalibrationProgress,
    CalibrationResult,
    ModelInfo,
    Tier,
    TierState,
)
from sage_fed.device import Executor
from sage_fed.errors import CalibrationRunning, TierUnavailable


@dataclass(frozen=True, slots=True)
class Site:
    """Where the daemon runs, as far as a calibration cannot read it itself.

    `cuda_index` is None on a CPU; `settings` are those of the engines, by name.
    """

    device: str
    threads: int
    version: str
    cuda_index: int | None
    read_bandwidth_bytes_per_s: float
    settings: Mapping[str, str]
    cards_dir: Path


class Calibrator:
    """Measures both tiers of one executor; `adopt` puts a card in force."""

    def __init__(self, executor: Executor, site: Site, adopt: Callable[[RateCard], None]) -> None:
        self._executor = executor
        self._site = site
        self._adopt = adopt
        self._running = False

    async def run(
        self, *, quick: bool, adopt: bool, pace: Pace | None = None
    ) -> AsyncGenerator[CalibrationEvent, None]:
        """Calibrate: progress, then the result. `pace` overrides what `quick` chooses."""
        if self._running:
            raise CalibrationRunning("a calibration runs already; wait for it or cancel it")
        self._running = True
        try:
            models = self._models()
            # Now, and not when minutes of measuring would be lost.
            await asyncio.to_thread(prepare_directory, self._site.cards_dir)
            limits = {tier: self._executor.limits(tier) for tier in TIER_ROLES}
            measurement = Measurement(
                self._executor,
                {tier: known for tier, known in limits.items() if known is not None},
                pace or (QUICK if quick else FULL),
            )
            async for progress in measurement.run():
                yield progress
            yield CalibrationProgress("writing", 0.99, "", measurement.elapsed_s)
            conditions = await asyncio.to_thread(read_conditions, cuda_index=self._site.cuda_index)
            card = _card(self._site, models, measurement, conditions)
            saving = asyncio.create_task(asyncio.to_thread(self._save, card, measurement))
            try:
                result, named = await asyncio.shield(saving)
            except asyncio.CancelledError:
                # A thread cannot be stopped: what it writes is deleted when it has.
                saving.add_done_callback(_discard)
                raise
            if adopt:
                self._adopt(named)
        finally:
            self._running = False
        yield replace(result, adopted=adopt)

    def _models(self) -> dict[Tier, ModelInfo]:
        models: dict[Tier, ModelInfo] = {}
        for tier in TIER_ROLES:
            status = self._executor.status(tier)
            if status.state is not TierState.READY or status.info is None:
                raise TierUnavailable(
                    f"the {tier.name} tier is {status.state.value}; both tiers are measured"
                )
            models[tier] = status.info
        return models

    def _save(self, card: RateCard, measurement: Measurement) -> tuple[CalibrationResult, RateCard]:
        """Write the card and its report; the card is handed back as it was read. Blocks."""
        left_out = measurement.left_out

        def extras(named: RateCard) -> dict[str, str]:
            picture = f"{named.version}.svg"
            return {".md": report_of(named, left_out, picture), ".svg": plot_of(named)}

        named, path = save_card(card, self._site.cards_dir, extras)
        assert named.measured is not None
        written = extras(named)
        result = CalibrationResult(
            version=named.version,
            path=str(path.absolute()),
            card=path.read_text(encoding="utf-8"),
            report=written[".md"],
            plot=written[".svg"],
            cost_ratio=named.cost_ratio(),
            cost_ratio_spread=named.measured.spread,
            took_s=named.measured.took_s,
            adopted=False,
            points=named.measured.points,
        )
        return result, RateCard.load(path)


def _discard(saving: asyncio.Task[tuple[CalibrationResult, RateCard]]) -> None:
    """Delete what was written for somebody who left meanwhile."""
    if not saving.cancelled() and saving.exception() is None:
        delete_card(Path(saving.result()[0].path))


def _card(
    site: Site,
    models: Mapping[Tier, ModelInfo],
    measurement: Measurement,
    conditions: Mapping[str, str],
) -> RateCard:
    """Return the card, under the version that it would like to have."""
    now = dt.datetime.now(dt.UTC).replace(microsecond=0)
    points, ratios = measurement.points, measurement.ratios
    tactical = reference_point(point for point in points if point.tier == Tier.TACTICAL)
    bandwidth = site.read_bandwidth_bytes_per_s
    kv_read_s = {tier: models[tier].kv_token_bytes / bandwidth for tier in TIER_ROLES}
    names = " and ".join(
        f"{models[tier].name} ({models[tier].precision}, {models[tier].kernels})"
        for tier in TIER_ROLES
    )
    lines = prices(points, median(ratios), kv_read_s, spread_of(ratios))
    precisions = "-".join(dict.fromkeys(models[tier].precision for tier in TIER_ROLES))
    return RateCard(
        version=stem_of(site.device, precisions, f"{now:%Y-%m-%d}"),
        title=f"{names} on {site.device}",
        created=now.date(),
        device=site.device,
        software=f"sage-fed {site.version}, torch {conditions.get('torch', 'unknown')}",
        provenance=(
            f"Measured by the daemon on its own engines in {measurement.elapsed_s:.0f} s, "
            f"{len(ratios)} rounds of both tiers in turns; spread of the ratio "
            f"{spread_of(ratios):.1%}. 1 ATP is one decode step of one tactical sequence with "
            f"{tactical.context_tokens} tokens of context; every price is marginal device time."
        ),
        lines=lines,
        fingerprint=Fingerprint.of(site.device, site.threads, site.version, models),
        measured=Measured(
            at=now,
            took_s=round(measurement.elapsed_s, 1),
            token_s=tactical.step_s,
            cost_ratio=median(ratios),
            spread=spread_of(ratios),
            error=median_error(ratios),
            rounds=len(ratios),
            read_bandwidth_bytes_per_s=bandwidth,
            load_s=MappingProxyType({tier: models[tier].load_s for tier in TIER_ROLES}),
            conditions=MappingProxyType({**site.settings, **conditions}),
            points=points,
            warning=warning_of(lines),
        ),
    )
