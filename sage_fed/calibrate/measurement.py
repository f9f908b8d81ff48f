"""What a token costs on this device: steps timed through the executor, and the prices they make.

Owns which steps are timed, in which order and for how long, and what a price means. The unit is
the lowest tier's output token: 1 ATP is the device's time of one decode step of one sequence with
a short context. A price is marginal device time, in that unit
(docs/decisions/0006-measured-prices.md), rounded up to whole uATP, here, once.

Every point is timed once at least (the pilot, which is also its warm-up), one that sets a price
`_PRICE_ROUNDS` times, whatever the budget; then rounds go A B A B over all tiers' points. After
each point goes one round of the tiers' reference points, so that the ratios are sampled all
through the measurement and a slow minute of the machine meets all tiers and points alike. What is
left of the budget is the ratios'.
Fails as `Executor.probe` does; a point that the device has no memory for is left out.
"""

from __future__ import annotations

import itertools
import logging
import math
import time
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import mean, median, quantiles
from types import MappingProxyType

from sage_fed.cards.rate_card import Basis, Rate, measured_spreads
from sage_fed.core import UATP_PER_ATP, CalibrationProgress, MeasuredPoint, Phase, Sampling, Tier
from sage_fed.device import Executor, TierLimits, blocks_for
from sage_fed.errors import DeviceBusy, DeviceOutOfMemory
from sage_fed.steps import BLOCK_SIZE, Chunk, Draw, Step

_log = logging.getLogger(__name__)

SHORT_TOKENS = 40
"""The reference context: short, and in the middle of a block, as most positions are."""

LONG_TOKENS = 1032
LONG_BATCH = 8
SHORT_PREFILL_TOKENS = 32
LONG_PREFILL_TOKENS = 512
CACHED_CHUNK_TOKENS = 32
VERIFY_ROWS = 4
"""The row count that a verified row is priced at: one token and three drafted ones."""

ROWS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
"""Row counts whose steps the scheduler is told the time of."""

MAX_BATCH = 64

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


@dataclass(slots=True)
class _Timed:
    """A point's device seconds of one step: of the pilot, and one median a round.

    A round's figure is a median already, so one step that was disturbed changes nothing.
    """

    pilot_s: float
    alone_s: list[float]
    co_resident_s: list[float] = field(default_factory=list)

    def measured(self, point: Point) -> MeasuredPoint:
        """Return the point's figures."""
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


class Measurement:
    """One run over the tiers of `limits`; `run` first, then the figures.

    `ratios` has, for each tier above the lowest, one figure a round: its reference's device time
    over the lowest tier's. A single tier is compared with itself.
    """

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
        tiers = sorted(limits)
        self._references = [reference_of(tier, limits[tier]) for tier in tiers]
        self._points = interleaved(points_of(tier, limits[tier]) for tier in tiers)
        self._steps = {point: point.step() for point in self._points}
        self._timed: dict[Point, _Timed] = {}
        self._changed: dict[Point, None] = {}
        self._done = 0
        self.ratios: dict[Tier, list[float]] = {tier: [] for tier in tiers[1:] or tiers}
        self.left_out: list[str] = []

    @property
    def points(self) -> tuple[MeasuredPoint, ...]:
        """What was measured, tier by tier, in the plan's order."""
        by_tier = sorted(self._points, key=lambda point: point.tier)
        return tuple(self._timed[one].measured(one) for one in by_tier if one in self._timed)

    @property
    def elapsed_s(self) -> float:
        """Seconds since the beginning."""
        return self._clock() - self._begun_s

    async def run(self) -> AsyncGenerator[CalibrationProgress, None]:
        """Measure, and yield the progress."""
        for point in self._points:
            yield self._progress("warm-up", point)
            await self._pilot(point)
        while len(self._ratio) < _MIN_RATIOS:
            yield self._progress("ratio", self._references[-1])
            await self._compare()
        try:
            for number in range(2, _PRICE_ROUNDS + 1):
                for point in self._points:
                    if point.sets_a_price and point in self._timed:
                        yield self._progress(f"prices, round {number} of {_PRICE_ROUNDS}", point)
                        await self._alone(point)
                        await self._compare()
            for number in range(self._pace.rounds):
                for point in self._points:
                    if point in self._timed and self._has_time_for(point):
                        yield self._progress(f"round {number + 1} of {self._pace.rounds}", point)
                        await self._alone(point)
                        await self._co_resident(point)
                        await self._compare()
                        self._done += 1
            while len(self._ratio) < self._pace.ratios and self._affordable(
                self._cost_s(self._comparison())
            ):
                yield self._progress("ratio", self._references[-1])
                await self._compare()
        except DeviceBusy:
            _log.warning("live jobs took over: calibrating with the rounds that were done")

    async def _pilot(self, point: Point) -> None:
        """Warm a point up and see how long it takes; its first sample, if there is no other."""
        try:
            (first_s,) = await self._probe([point])
            times = [first_s] if first_s > _LONG_STEP_S else await self._probe([point] * 3)
        except DeviceOutOfMemory:
            if point in self._references:
                raise
            self.left_out.append(point.label)
            _log.warning("calibration: the device has no memory for %s", point.label)
            return
        self._timed[point] = _Timed(min(times), [median(times)])
        self._changed[point] = None

    async def _compare(self) -> None:
        """Time the references, the lowest tier's on both sides of each other, and note the ratios.

        What drifts while a round lasts (clocks, neighbours on the memory bus) drifts by as much
        before the other tier's steps as behind them, and leaves their ratio alone.
        """
        blocks = self._comparison()
        times = iter(await self._probe([p for p, warm, n in blocks for _ in range(warm + n)]))
        figures = [median(list(itertools.islice(times, warm + n))[warm:]) for _, warm, n in blocks]
        self._note(self._references[0], mean(figures[::2]))
        for index, point in enumerate(self._references[1:]):
            before_s, own_s, after_s = figures[2 * index : 2 * index + 3]
            self._note(point, own_s)
            self.ratios[point.tier].append(own_s / mean((before_s, after_s)))
        if len(self._references) == 1:
            self._ratio.append(1.0)

    def _comparison(self) -> list[tuple[Point, int, int]]:
        """Return the points of one comparison in order, each with its warm-up and its repeats."""
        lowest, *others = ((point, *self._repeats(point)) for point in self._references)
        if others:
            # One side of the others: as long in the lowest tier as in the deepest.
            point, warm, repeats = lowest
            wanted = math.ceil(self._cost_s(others[-1:]) / 2 / self._timed[point].pilot_s)
            lowest = point, warm, max(repeats, min(wanted, self._pace.max_repeats) | 1)
        return [lowest, *(block for other in others for block in (other, lowest))]

    async def _alone(self, point: Point) -> None:
        """Time a point alone: all that a price is made of."""
        warm, repeats = self._repeats(point)
        times = await self._probe([point] * (warm + repeats))
        self._note(point, median(times[warm:]))

    async def _co_resident(self, point: Point) -> None:
        """Time a point with another tier's reference before each step, where there is another."""
        other = self._other(point)
        if other is not None:
            times = await self._probe([other, point] * self._turns(point, other))
            self._timed[point].co_resident_s.append(median(times[1::2]))

    def _note(self, point: Point, step_s: float) -> None:
        self._timed[point].alone_s.append(step_s)
        self._changed[point] = None

    async def _probe(self, points: Sequence[Point]) -> tuple[float, ...]:
        patience_s = min(_PATIENCE_S, _LONGEST_S - self.elapsed_s)
        steps = [self._steps[point] for point in points]
        return await self._executor.probe(steps, max(patience_s, 0.0))

    def _repeats(self, point: Point) -> tuple[int, int]:
        """Return how many steps warm a point up, and how many are its sample of a round."""
        step_s = self._timed[point].pilot_s
        wanted = math.ceil(self._pace.sample_s / step_s)
        # Odd: the median is one of them, not between a fast and a slow one.
        repeats = min(max(wanted, 1), self._pace.max_repeats) | 1
        return (0, 1) if step_s > _LONG_STEP_S else (_WARM_STEPS, repeats)

    def _turns(self, point: Point, other: Point) -> int:
        turn_s = self._timed[point].pilot_s + self._timed[other].pilot_s
        return min(max(math.ceil(self._pace.sample_s / turn_s), 1), self._pace.max_repeats) | 1

    def _other(self, point: Point) -> Point | None:
        """Return the reference that a point is timed beside: the lowest tier's, or the deepest."""
        lowest, deepest = self._references[0], self._references[-1]
        other = deepest if point.tier == lowest.tier else lowest
        return None if other.tier == point.tier else other

    def _has_time_for(self, point: Point) -> bool:
        """Return whether a point's round fits into what is not kept for the ratio."""
        blocks = [(point, *self._repeats(point)), *self._comparison()]
        other = self._other(point)
        if other is not None:
            turns = self._turns(point, other)
            blocks += [(point, 0, turns), (other, 0, turns)]
        return self._affordable(self._cost_s(blocks), _POINTS_SHARE)

    def _cost_s(self, blocks: Iterable[tuple[Point, int, int]]) -> float:
        return sum((warm + n) * self._timed[point].pilot_s for point, warm, n in blocks)

    def _affordable(self, cost_s: float, share: float = 1.0) -> bool:
        return self.elapsed_s + cost_s <= share * self._pace.budget_s

    @property
    def _ratio(self) -> list[float]:
        """The deepest tier's ratios: the one that is shown."""
        return self.ratios[self._references[-1].tier]

    def _progress(self, phase: str, point: Point) -> CalibrationProgress:
        total = len(self._points) * self._pace.rounds
        fraction = max(self._done / total, self.elapsed_s / self._pace.budget_s)
        changed, self._changed = self._changed, {}
        return CalibrationProgress(
            phase=phase,
            fraction=min(fraction, 0.99),
            point=point.label,
            elapsed_s=self.elapsed_s,
            cost_ratio=median(self._ratio) if self._ratio else None,
            measured=tuple(self._timed[one].measured(one) for one in changed),
        )


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
        if self.phase is Phase.VERIFY:
            return self.tokens == VERIFY_ROWS
        return self.phase is not Phase.DECODE

    def step(self) -> Step:
        """Return the step; its blocks are numbered from 0, sequence after sequence."""
        each = blocks_for(self.context_tokens + self.tokens)
        # A verified row is drawn from, whatever comes of it; of other chunks the last one only.
        num_draws = self.tokens if self.phase is Phase.VERIFY else 1
        draws = tuple(Draw(Sampling(), index) for index in range(num_draws))
        return Step(
            self.tier,
            tuple(
                Chunk(
                    seq_id=-1 - index,
                    start=self.context_tokens,
                    # Ids below 256 are in every vocabulary.
                    token_ids=tuple((index + 7 * i) % 256 for i in range(self.tokens)),
                    blocks=tuple(range(index * each, (index + 1) * each)),
                    draws=draws,
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
    points += [Point(tier, Phase.VERIFY, 1, short, length) for length in ROWS[1:]]
    return tuple(
        point
        for point in points
        if point.num_blocks <= limits.num_blocks
        and point.context_tokens + point.tokens <= limits.max_context_tokens
    )


def step_times(points: Iterable[MeasuredPoint]) -> dict[Tier, dict[int, float]]:
    """Return what steps of so many rows take on each tier, in seconds, with short contexts.

    The lowest tier's rows are sequences that draft together, a deeper one's a sequence's tokens
    that are verified together.
    """
    points = tuple(points)
    times: dict[Tier, dict[int, float]] = {}
    tiers = sorted({point.tier for point in points})
    for tier in tiers:
        own = [point for point in points if point.tier == tier]
        # A card is a file, and may have lost some of its points.
        if short := min((p.context_tokens for p in own if p.phase is Phase.DECODE), default=0):
            at_short = [point for point in own if point.context_tokens == short]
            rows = {p.tokens: p.step_s for p in at_short if p.phase is Phase.VERIFY}
            decodes = {p.batch: p.step_s for p in at_short if p.phase is Phase.DECODE}
            if tier != tiers[0]:
                decodes = {batch: step_s for batch, step_s in decodes.items() if batch == 1}
            times[tier] = dict(sorted((rows | decodes).items()))
    return times


def interleaved(tiers: Iterable[tuple[Point, ...]]) -> tuple[Point, ...]:
    """Return A B A B: what slows the machine down for a while meets all tiers alike."""
    return tuple(
        point for pair in itertools.zip_longest(*tiers) for point in pair if point is not None
    )


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
    ratios: Mapping[Tier, Sequence[float]],
    kv_read_s: Mapping[Tier, float],
) -> Mapping[Tier, Mapping[Phase, Rate]]:
    """Return a card's lines, tier by tier.

    Args:
        points: of all tiers; each tier's first decode point of batch 1 is its reference.
        ratios: a tier's reference over the lowest tier's, from rounds in which both were timed.
        kv_read_s: seconds to read one token's keys and values once: no cached token costs less.
    """
    points = tuple(points)
    lowest = min(kv_read_s)
    lines: dict[Tier, Mapping[Phase, Rate]] = {}
    for tier in sorted(kv_read_s):
        costs = dict(costs_of([p for p in points if p.tier == tier], kv_read_s[tier]))
        unit = 1.0
        if tier != lowest:
            unit = median(ratios[tier])
            for phase in (Phase.DECODE, Phase.DRAFT):
                costs[phase] = replace(costs[phase], spread=spread_of(ratios[tier]))
        # Within a tier by its own reference, so that the ratio is the paired one, exactly.
        atp_per_s = unit / costs[Phase.DECODE].seconds
        lines[tier] = MappingProxyType(
            {
                phase: Rate(_uatp(cost.seconds * atp_per_s), cost.basis, cost.source, cost.spread)
                for phase, cost in costs.items()
            }
        )
    return MappingProxyType(lines)


def warning_of(lines: Mapping[Tier, Mapping[Phase, Rate]]) -> str:
    """Return which measured prices are not to be relied on, and why; "" where all are."""
    rates = measured_spreads(lines)
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
        Phase.DRAFT: replace(decode, source=f"A drafter's step decodes. {decode.source}"),
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


def verify_rows(points: Iterable[MeasuredPoint]) -> int:
    """Return the row count that a tier's verified row is priced at; 1 is a decoded token."""
    verify = _verify_point(points)
    return verify.tokens if verify else 1


def _verify_point(points: Iterable[MeasuredPoint]) -> MeasuredPoint | None:
    return min(
        (point for point in points if point.phase is Phase.VERIFY),
        key=lambda point: abs(point.tokens - VERIFY_ROWS),
        default=None,
    )


def _verify(points: Iterable[MeasuredPoint], reference: MeasuredPoint) -> Cost:
    verify = _verify_point(points)
    if verify is None:
        text = "As a decoded token: the context is too short to measure it."
        return Cost(reference.step_s, Basis.DECLARED, text, None)
    text = f"One step over {verify.tokens} rows, each of them drawn from: {_ms(verify.step_s)}."
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
