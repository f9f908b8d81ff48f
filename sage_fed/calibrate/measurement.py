"""Which steps a calibration times: the points of each tier, as far as its pools allow them.

Pure. Speed does not depend on what the tokens say, so a context is blocks that nobody filled.

What was timed so far: one figure a round and point, their medians and their spread.

Pure. A round's figure is a median already, so one step that was disturbed changes nothing.

Times the points of both tiers through the executor, round by round.

Owns the order and the budget of time. Every point is timed once at least (the pilot, which is
also its warm-up), one that sets a price `_PRICE_ROUNDS` times, whatever the budget; then rounds
go A B A B over both tiers' points. After each of them goes one round of the pair of reference
points, so that the ratio is sampled all through the measurement and a slow minute of the machine
meets both tiers and all points alike. What is left of the budget is the ratio's.
Fails as `Executor.probe` does; a point that the device has no memory for is left out.

From measured times to prices: a pure function, and the one place that says what a price means.

The unit is the tactical output token: 1 ATP is the device's time of one decode step of one
sequence with a short context. A price is marginal device time, in that unit
(docs/decisions/0006-measured-prices.md). Rounded up to whole uATP, here, once.
"""

from __future__ import annotations

import itertools
import logging
import math
import time
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from statistics import mean, median, quantiles
from types import MappingProxyType

from sage_fed.cards import Basis, Rate
from sage_fed.core import (
    TIER_ROLES,
    UATP_PER_ATP,
    CalibrationProgress,
    MeasuredPoint,
    Phase,
    Sampling,
    Tier,
)
from sage_fed.device import Executor, TierLimits, blocks_for
from sage_fed.errors import DeviceBusy, DeviceOutOfMemory
from sage_fed.steps import BLOCK_SIZE, Chunk, Draw, Step

SHORT_TOKENS = 40
"""The reference context: short, and in the middle of a block, as most positions are."""

LONG_TOKENS = 1032
LONG_BATCH = 8
SHORT_PREFILL_TOKENS = 32
LONG_PREFILL_TOKENS = 512
CACHED_CHUNK_TOKENS = 32
VERIFY_TOKENS = (4, 8)
MAX_BATCH = 64


@dataclass(frozen=True, slots=True)
class Point:
    """One kind of step: `batch` sequences with `context_tokens` in the cache, fed `tokens` each."""

    tier: Tier
    phase: Phase
    batch: int
    context_tokens: int
    tokens: int

    @property
    def label(self) -> str:
        """For a person: `tactical decode x8, context 40`."""
        fed = f"x{self.batch}" if self.tokens == 1 else f"{self.tokens} tokens"
        return f"{self.tier.name} {self.phase.value} {fed}, context {self.context_tokens}"

    @property
    def num_blocks(self) -> int:
        """KV blocks that its step needs."""
        return self.batch * blocks_for(self.context_tokens + self.tokens)

    @property
    def sets_a_price(self) -> bool:
        """Whether a price hangs on it; the reference's does too, and has rounds of its own."""
        return self.phase is not Phase.DECODE

    def step(self) -> Step:
        """Return the step; its blocks are numbered from 0, sequence after sequence."""
        each = blocks_for(self.context_tokens + self.tokens)
        draw = Draw(Sampling(), 0)
        return Step(
            self.tier,
            tuple(
                Chunk(
                    seq_id=-1 - index,
                    start=self.context_tokens,
                    # Ids below 256 are in every vocabulary.
                    token_ids=tuple((index + 7 * i) % 256 for i in range(self.tokens)),
                    blocks=tuple(range(index * each, (index + 1) * each)),
                    draw=draw,
                )
                for index in range(self.batch)
            ),
        )


def reference_of(tier: Tier, limits: TierLimits) -> Point:
    """Return the point whose token is a tier's output token: decode, alone, short context."""
    return Point(tier, Phase.DECODE, 1, min(SHORT_TOKENS, _longest(limits) // 2), 1)


def points_of(tier: Tier, limits: TierLimits) -> tuple[Point, ...]:
    """Return a tier's points, the reference first; only those that its limits allow."""
    short = reference_of(tier, limits).context_tokens
    long = _long_context(limits)
    points = [Point(tier, Phase.DECODE, batch, short, 1) for batch in _batches(limits.max_batch)]
    if long:
        batches = {1, min(LONG_BATCH, limits.max_batch)}
        points += [Point(tier, Phase.DECODE, batch, long, 1) for batch in sorted(batches)]
    lengths = _prompts(min(LONG_PREFILL_TOKENS, limits.prefill_chunk_tokens, _longest(limits)))
    points += [Point(tier, Phase.PREFILL, 1, 0, length) for length in lengths]
    if long and lengths:
        points.append(Point(tier, Phase.CACHED, 1, long, lengths[0]))
    points += [Point(tier, Phase.VERIFY, 1, short, length) for length in VERIFY_TOKENS]
    return tuple(
        point
        for point in points
        if point.num_blocks <= limits.num_blocks
        and point.context_tokens + point.tokens <= limits.max_context_tokens
    )


def interleaved(tiers: Iterable[tuple[Point, ...]]) -> tuple[Point, ...]:
    """Return A B A B: what slows the machine down for a while meets both tiers alike."""
    return tuple(point for pair in zip_longest(*tiers) for point in pair if point is not None)


def _batches(max_batch: int) -> list[int]:
    largest = min(max_batch, MAX_BATCH)
    powers = [2**i for i in range(largest.bit_length()) if 2**i <= largest]
    return powers if powers[-1] == largest else [*powers, largest]


def _prompts(longest: int) -> list[int]:
    """Lengths of prompts: enough of them that a slope through all can do without any one."""
    lengths = {min(SHORT_PREFILL_TOKENS, longest), *(longest // part for part in (4, 2, 1))}
    return sorted(length for length in lengths if length > 1)


def _longest(limits: TierLimits) -> int:
    return min(limits.max_context_tokens, limits.kv_tokens)


def _long_context(limits: TierLimits) -> int:
    """A context that is clearly longer than the short one; 0 where there is no room for it."""
    room = _longest(limits) - CACHED_CHUNK_TOKENS
    long = min(LONG_TOKENS, room - room % BLOCK_SIZE - BLOCK_SIZE // 2)
    return long if long >= 4 * SHORT_TOKENS else 0


@dataclass(slots=True)
class Samples:
    """A point's rounds, in device seconds of one step."""

    alone_s: list[float] = field(default_factory=list)
    co_resident_s: list[float] = field(default_factory=list)

    def measured(self, point: Point) -> MeasuredPoint:
        """Return the point's figures; there has been a round."""
        return MeasuredPoint(
            tier=point.tier,
            phase=point.phase,
            batch=point.batch,
            context_tokens=point.context_tokens,
            tokens=point.tokens,
            step_s=median(self.alone_s),
            spread=spread_of(self.alone_s) if len(self.alone_s) > 1 else None,
            rounds=len(self.alone_s),
            co_resident_s=median(self.co_resident_s) if self.co_resident_s else None,
        )


def spread_of(values: Sequence[float]) -> float:
    """Half of the interquartile range over the median; of the whole range below four values."""
    if len(values) < 4:
        low, high = min(values), max(values)
    else:
        low, _, high = quantiles(values, n=4)
    return (high - low) / 2 / median(values)


def median_error(values: Sequence[float]) -> float:
    """Standard error of the median over the median, by way of a normal's quartiles.

    1.2533 is sqrt(pi / 2), the median's error over the mean's; 1.349 standard deviations lie
    between a normal's quartiles.
    """
    return 1.2533 * (2 * spread_of(values) / 1.349) / math.sqrt(len(values))


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


NOISY = 0.03
"""A relative spread above which the machine was not quiet enough for the price."""


@dataclass(frozen=True, slots=True)
class Cost:
    """Marginal device seconds of one token, how known, and their spread relative to them."""

    seconds: float
    basis: Basis
    source: str
    spread: float | None


def prices(
    points: Iterable[MeasuredPoint],
    cost_ratio: float,
    kv_read_s: Mapping[Tier, float],
    ratio_spread: float,
) -> Mapping[Tier, Mapping[Phase, Rate]]:
    """Return a card's lines.

    Args:
        points: of both tiers; each tier's first decode point of batch 1 is its reference.
        cost_ratio: strategic over tactical reference, from rounds in which both were timed.
        kv_read_s: seconds to read one token's keys and values once: no cached token costs less.
        ratio_spread: of the ratio, relative: that of the strategic decode price.
    """
    points = tuple(points)
    units = {Tier.TACTICAL: 1.0, Tier.STRATEGIC: cost_ratio}
    lines: dict[Tier, Mapping[Phase, Rate]] = {}
    for tier in TIER_ROLES:
        costs = dict(costs_of([p for p in points if p.tier is tier], kv_read_s[tier]))
        if tier == Tier.STRATEGIC:
            for phase in (Phase.DECODE, Phase.DRAFT):
                costs[phase] = replace(costs[phase], spread=ratio_spread)
        # Within a tier by its own reference, so that the ratio is the paired one, exactly.
        atp_per_s = units[tier] / costs[Phase.DECODE].seconds
        lines[tier] = MappingProxyType(
            {
                phase: Rate(_uatp(cost.seconds * atp_per_s), cost.basis, cost.source, cost.spread)
                for phase, cost in costs.items()
            }
        )
    return MappingProxyType(lines)


def warning_of(lines: Mapping[Tier, Mapping[Phase, Rate]]) -> str:
    """Return which measured prices are not to be relied on, and why; "" where all are."""
    rates = [
        (f"{tier.name} {phase.value}", rate.spread)
        for tier in TIER_ROLES
        for phase, rate in lines[tier].items()
        # A drafted token's price is the decoded one's.
        if rate.basis is Basis.MEASURED and phase is not Phase.DRAFT
    ]
    noisy = [f"{name} ±{spread:.1%}" for name, spread in rates if (spread or 0.0) > NOISY]
    single = [name for name, spread in rates if spread is None]
    parts = [f"spread above {NOISY:.0%}: {', '.join(noisy)}"] if noisy else []
    parts += [f"one round only: {', '.join(single)}"] if single else []
    if not parts:
        return ""
    return f"not a quiet machine ({'; '.join(parts)}); measure again when it idles"


def costs_of(points: Iterable[MeasuredPoint], kv_read_s: float) -> Mapping[Phase, Cost]:
    """Return one tier's marginal costs; its reference is among the points."""
    points = tuple(points)
    reference = reference_point(points)
    decode = Cost(
        reference.step_s,
        Basis.MEASURED,
        f"One sequence, {reference.context_tokens} tokens of context: "
        f"{_ms(reference.step_s)} a step, {_rounds(reference)}.",
        reference.spread,
    )
    prefill = _prefill(points, reference, kv_read_s)
    cached = _cached(points, kv_read_s)
    return {
        Phase.PREFILL: prefill,
        # Never above prefill: finding a token is never worse than computing it.
        Phase.CACHED: replace(cached, seconds=min(cached.seconds, prefill.seconds)),
        Phase.DECODE: decode,
        Phase.DRAFT: replace(decode, source=f"A drafted token is decoded. {decode.source}"),
        Phase.VERIFY: _verify(points, reference),
    }


def reference_point(points: Iterable[MeasuredPoint]) -> MeasuredPoint:
    """Return the point whose token is the tier's output token."""
    alone = (point for point in points if point.phase is Phase.DECODE and point.batch == 1)
    return min(alone, key=lambda point: point.context_tokens)


def _prefill(points: Iterable[MeasuredPoint], reference: MeasuredPoint, kv_read_s: float) -> Cost:
    """What a prompt's token adds to a step that happens anyway: a slope, the decode step included.

    A job of n prompt and m output tokens takes one prefill step, whose first output token comes
    with it, and m - 1 decode steps. So m decode prices and n slopes pay for all of it.
    The slope is Theil's and Sen's, the median of those through any two lengths: of five lengths
    one may be wrong altogether. Its spread is the median of theirs.
    """
    prefills = [p for p in points if p.phase is Phase.PREFILL and p.context_tokens == 0]
    if not prefills:  # chunks of one token: a prompt is decoded
        text = "As a decoded token: prompts are taken one token at a time."
        return Cost(max(reference.step_s, kv_read_s), Basis.MEASURED, text, reference.spread)
    prompts = sorted((reference, *prefills), key=lambda point: point.tokens)
    pairs = list(itertools.combinations(prompts, 2))
    slope_s = median((b.step_s - a.step_s) / (b.tokens - a.tokens) for a, b in pairs)
    spreads_s = [_spread_s(a, b) for a, b in pairs]
    per_token_s = [
        spread_s / (b.tokens - a.tokens)
        for (a, b), spread_s in zip(pairs, spreads_s, strict=True)
        if spread_s is not None
    ]
    seconds = max(slope_s, kv_read_s)
    text = f"{_ms(seconds)} more for each token of a prompt: median over {len(prefills)} lengths."
    known = len(per_token_s) == len(pairs)
    return Cost(seconds, Basis.MEASURED, text, median(per_token_s) / seconds if known else None)


def _cached(points: Iterable[MeasuredPoint], kv_read_s: float) -> Cost:
    """What a token that is in the cache already adds to the step that attends to it."""
    points = tuple(points)
    behind = next((p for p in points if p.phase is Phase.CACHED), None)
    if behind is not None:
        same = (p for p in points if p.phase is Phase.PREFILL and p.tokens == behind.tokens)
        bare = next((p for p in same if p.context_tokens == 0), None)
        if bare is not None:
            added_s = (behind.step_s - bare.step_s) / behind.context_tokens
            if added_s > kv_read_s:
                text = f"{_ms(added_s)} more of a prompt's step for each cached token before it."
                spread_s = _spread_s(behind, bare)
                spread = None if spread_s is None else spread_s / behind.context_tokens / added_s
                return Cost(added_s, Basis.MEASURED, text, spread)
    text = f"{_ms(kv_read_s)}: its keys and values are read once, at the device's bandwidth."
    return Cost(kv_read_s, Basis.DECLARED, text, None)


def _verify(points: Iterable[MeasuredPoint], reference: MeasuredPoint) -> Cost:
    verify = min(
        (point for point in points if point.phase is Phase.VERIFY),
        key=lambda point: point.tokens,
        default=None,
    )
    if verify is None:
        text = "As a decoded token: the context is too short to measure it."
        return Cost(reference.step_s, Basis.DECLARED, text, None)
    text = f"One step over {verify.tokens} tokens: {_ms(verify.step_s)}."
    return Cost(verify.token_s, Basis.MEASURED, text, verify.spread)


def _spread_s(a: MeasuredPoint, b: MeasuredPoint) -> float | None:
    """Seconds that the difference of two steps is uncertain by; None where one had one round."""
    if a.spread is None or b.spread is None:
        return None
    return math.hypot(a.spread * a.step_s, b.spread * b.step_s)


def _rounds(point: MeasuredPoint) -> str:
    if point.spread is None:
        return "one round"
    return f"{point.rounds} rounds, spread {point.spread:.1%}"


def _uatp(atp: float) -> int:
    # Beyond a float's last digits, which must not make 1 ATP cost 1.000001.
    return max(1, math.ceil(round(atp * UATP_PER_ATP, 6)))


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.4g} ms"
