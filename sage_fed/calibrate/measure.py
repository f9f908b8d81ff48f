"""Times the points of both tiers through the executor, round by round.

Owns the order and the budget of time. Every point is timed once at least (the pilot, which is
also its warm-up), one that sets a price `_PRICE_ROUNDS` times, whatever the budget; then rounds
go A B A B over both tiers' points. After each of them goes one round of the pair of reference
points, so that the ratio is sampled all through the measurement and a slow minute of the machine
meets both tiers and all points alike. What is left of the budget is the ratio's.
Fails as `Executor.probe` does; a point that the device has no memory for is left out.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from dataclasses import dataclass
from statistics import mean, median

from sage_fed.calibrate.plan import Point, interleaved, points_of, reference_of
from sage_fed.calibrate.samples import Samples
from sage_fed.core import TIER_ROLES, CalibrationProgress, MeasuredPoint, Tier
from sage_fed.device import Executor, TierLimits
from sage_fed.errors import DeviceBusy, DeviceOutOfMemory
from sage_fed.steps import Step

_log = logging.getLogger(__name__)

_MIN_RATIOS = 9
"""Rounds of the reference pair below which there is no ratio to speak of."""

_PRICE_ROUNDS = 3
"""Rounds of a point below which no price is made of it: of three, one may be disturbed."""

_POINTS_SHARE = 0.7
"""Of the budget; the rest is the ratio's, which is what the prices of both tiers hang on."""

_PATIENCE_S = 180.0
"""How long one measurement may take, with the live jobs that go before it."""

_LONGEST_S = 900.0
"""And how long a calibration lasts at most, however often it is interrupted."""

_WARM_STEPS = 2
_LONG_STEP_S = 0.25
"""A step of this length reads far more than any cache holds, and needs no warm-up of its own."""


@dataclass(frozen=True, slots=True)
class Pace:
    """How long to measure: `sample_s` of one point in a round, `rounds` and `budget_s` of all.

    `ratios` are rounds of the reference pair, made while the budget lasts; those that go with
    the points' rounds count.
    """

    budget_s: float
    rounds: int
    ratios: int
    sample_s: float
    max_repeats: int = 400


FULL = Pace(budget_s=120.0, rounds=8, ratios=100, sample_s=0.06)
QUICK = Pace(budget_s=15.0, rounds=2, ratios=30, sample_s=0.03)


class Measurement:
    """One run over both tiers; `run` first, then the figures."""

    def __init__(
        self,
        executor: Executor,
        limits: Mapping[Tier, TierLimits],
        pace: Pace,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._executor = executor
        self._pace = pace
        self._clock = clock
        self._begun_s = clock()
        self._references = {tier: reference_of(tier, limits[tier]) for tier in TIER_ROLES}
        self._points = interleaved(points_of(tier, limits[tier]) for tier in TIER_ROLES)
        self._steps: dict[Point, Step] = {point: point.step() for point in self._points}
        self._pilot_s: dict[Point, float] = {}
        self._samples: dict[Point, Samples] = {}
        self._changed: dict[Point, None] = {}
        self._done = 0
        self.ratios: list[float] = []
        self.left_out: list[str] = []

    @property
    def points(self) -> tuple[MeasuredPoint, ...]:
        """What was measured, tier by tier, in the plan's order."""
        return tuple(
            self._samples[point].measured(point)
            for tier in TIER_ROLES
            for point in self._points
            if point.tier is tier and point in self._samples
        )

    @property
    def elapsed_s(self) -> float:
        """Seconds since the beginning."""
        return self._clock() - self._begun_s

    async def run(self) -> AsyncGenerator[CalibrationProgress, None]:
        """Measure; what is yielded is for whoever waits."""
        for point in self._points:
            yield self._progress("warm-up", point)
            await self._pilot(point)
        while len(self.ratios) < _MIN_RATIOS:
            yield self._progress("ratio", self._references[Tier.STRATEGIC])
            await self._pair()
        try:
            for number in range(2, _PRICE_ROUNDS + 1):
                for point in self._priced:
                    yield self._progress(f"prices, round {number} of {_PRICE_ROUNDS}", point)
                    await self._alone(point)
                    await self._pair()
            for number in range(self._pace.rounds):
                for point in self._points:
                    if not self._has_time_for(point):
                        continue
                    yield self._progress(f"round {number + 1} of {self._pace.rounds}", point)
                    await self._round(point)
                    await self._pair()
            while len(self.ratios) < self._pace.ratios and self._affordable(self._pair_cost_s):
                yield self._progress("ratio", self._references[Tier.STRATEGIC])
                await self._pair()
        except DeviceBusy:
            _log.warning("live jobs took over: calibrating with the rounds that were done")

    async def _pilot(self, point: Point) -> None:
        """Warm a point up and see how long it takes; its first sample, if there is no other."""
        step = self._steps[point]
        try:
            (first_s,) = await self._probe([step])
            times = [first_s] if first_s > _LONG_STEP_S else await self._probe([step] * 3)
        except DeviceOutOfMemory:
            if point in self._references.values():
                raise
            self.left_out.append(point.label)
            _log.warning("calibration: the device has no memory for %s", point.label)
            return
        self._pilot_s[point] = min(times)
        self._samples[point] = Samples([median(times)])
        self._changed[point] = None

    async def _pair(self) -> None:
        """Time both references, the tactical one on both sides, and note this round's ratio.

        What drifts while a round lasts (clocks, neighbours on the memory bus) drifts by as much
        before the strategic steps as behind them, and leaves their ratio alone.
        """
        steps: list[Step] = []
        spans: dict[Tier, list[slice]] = {tier: [] for tier in TIER_ROLES}
        for tier in (Tier.TACTICAL, Tier.STRATEGIC, Tier.TACTICAL):
            warm, repeats = self._paired(tier)
            begin = len(steps) + warm
            steps += [self._steps[self._references[tier]]] * (warm + repeats)
            spans[tier].append(slice(begin, len(steps)))
        times = await self._probe(steps)
        figures = {
            tier: mean(median(times[part]) for part in parts) for tier, parts in spans.items()
        }
        for tier, figure in figures.items():
            self._samples[self._references[tier]].alone_s.append(figure)
            self._changed[self._references[tier]] = None
        self.ratios.append(figures[Tier.STRATEGIC] / figures[Tier.TACTICAL])

    @property
    def _priced(self) -> list[Point]:
        return [point for point in self._points if point.sets_a_price and point in self._samples]

    async def _alone(self, point: Point) -> None:
        """Time a point alone: all that a price is made of."""
        warm, repeats = self._repeats(point)
        times = await self._probe([self._steps[point]] * (warm + repeats))
        self._samples[point].alone_s.append(median(times[warm:]))
        self._changed[point] = None

    async def _round(self, point: Point) -> None:
        """Time a point alone, then with the other tier's reference before each step."""
        other = self._other(point)
        warm, repeats = self._repeats(point)
        turns = self._turns(point)
        step = self._steps[point]
        steps = [step] * (warm + repeats) + [self._steps[other], step] * turns
        times = await self._probe(steps)
        samples = self._samples[point]
        samples.alone_s.append(median(times[warm : warm + repeats]))
        samples.co_resident_s.append(median(times[warm + repeats + 1 :: 2]))
        self._changed[point] = None
        self._done += 1

    async def _probe(self, steps: list[Step]) -> tuple[float, ...]:
        patience_s = min(_PATIENCE_S, _LONGEST_S - self.elapsed_s)
        return await self._executor.probe(steps, max(patience_s, 0.0))

    def _repeats(self, point: Point) -> tuple[int, int]:
        """How many steps warm it up, and how many are its sample of a round."""
        step_s = self._pilot_s[point]
        wanted = math.ceil(self._pace.sample_s / step_s)
        # Odd: the median is one of them, not between a fast and a slow one.
        repeats = min(max(wanted, 1), self._pace.max_repeats) | 1
        return (0, 1) if step_s > _LONG_STEP_S else (_WARM_STEPS, repeats)

    def _paired(self, tier: Tier) -> tuple[int, int]:
        """Likewise for one side of a pair: as long in the tactical tier as in the strategic."""
        reference = self._references[tier]
        warm, repeats = self._repeats(reference)
        if tier == Tier.TACTICAL:
            other = self._references[Tier.STRATEGIC]
            side_s = sum(self._repeats(other)) * self._pilot_s[other] / 2
            wanted = math.ceil(side_s / self._pilot_s[reference])
            repeats = max(repeats, min(wanted, self._pace.max_repeats) | 1)
        return warm, repeats

    def _turns(self, point: Point) -> int:
        turn_s = self._pilot_s[point] + self._pilot_s[self._other(point)]
        return min(max(math.ceil(self._pace.sample_s / turn_s), 1), self._pace.max_repeats) | 1

    def _other(self, point: Point) -> Point:
        other = Tier.STRATEGIC if point.tier == Tier.TACTICAL else Tier.TACTICAL
        return self._references[other]

    def _round_cost_s(self, point: Point) -> float:
        turn_s = self._pilot_s[point] + self._pilot_s[self._other(point)]
        return sum(self._repeats(point)) * self._pilot_s[point] + self._turns(point) * turn_s

    @property
    def _pair_cost_s(self) -> float:
        return sum(
            sides * sum(self._paired(tier)) * self._pilot_s[self._references[tier]]
            for tier, sides in ((Tier.TACTICAL, 2), (Tier.STRATEGIC, 1))
        )

    def _has_time_for(self, point: Point) -> bool:
        """Whether a point's round fits into what is not kept for the ratio."""
        if point not in self._samples:
            return False
        cost_s = self._round_cost_s(point) + self._pair_cost_s
        return self._affordable(cost_s, _POINTS_SHARE)

    def _affordable(self, cost_s: float, share: float = 1.0) -> bool:
        return self.elapsed_s + cost_s <= share * self._pace.budget_s

    def _progress(self, phase: str, point: Point) -> CalibrationProgress:
        total = len(self._points) * self._pace.rounds
        fraction = max(self._done / total, self.elapsed_s / self._pace.budget_s)
        changed, self._changed = self._changed, {}
        return CalibrationProgress(
            phase=phase,
            fraction=min(fraction, 0.99),
            point=point.label,
            elapsed_s=self.elapsed_s,
            cost_ratio=median(self.ratios) if self.ratios else None,
            measured=tuple(self._samples[one].measured(one) for one in changed),
        )
