"""From measured times to prices: a pure function, and the one place that says what a price means.

The unit is the tactical output token: 1 ATP is the device's time of one decode step of one
sequence with a short context. A price is marginal device time, in that unit
(docs/decisions/0006-measured-prices.md). Rounded up to whole uATP, here, once.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from statistics import median
from types import MappingProxyType

from sage_fed.cards import Basis, Rate
from sage_fed.core import TIER_ROLES, UATP_PER_ATP, MeasuredPoint, Phase, Tier

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
