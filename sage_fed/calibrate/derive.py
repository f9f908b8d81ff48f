"""From measured times to prices: a pure function, and the one place that says what a price means.

The unit is the tactical output token: 1 ATP is the device's time of one decode step of one
sequence with a short context. A price is marginal device time, in that unit
(docs/decisions/0006-measured-prices.md). Rounded up to whole uATP, here, once.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from sage_fed.core import UATP_PER_ATP, MeasuredPoint, Phase, Tier
from sage_fed.pricing import Basis, Rate


@dataclass(frozen=True, slots=True)
class Costs:
    """Marginal device seconds of one token of each phase of a tier; `sources` say how known."""

    seconds: Mapping[Phase, float]
    sources: Mapping[Phase, tuple[Basis, str]]


def prices(
    points: Iterable[MeasuredPoint], cost_ratio: float, kv_read_s: Mapping[Tier, float]
) -> Mapping[Tier, Mapping[Phase, Rate]]:
    """Return a card's lines.

    Args:
        points: of both tiers; each tier's first decode point of batch 1 is its reference.
        cost_ratio: strategic over tactical reference, from rounds in which both were timed.
        kv_read_s: seconds to read one token's keys and values once: no cached token costs less.
    """
    points = tuple(points)
    units = {Tier.TACTICAL: 1.0, Tier.STRATEGIC: cost_ratio}
    lines: dict[Tier, Mapping[Phase, Rate]] = {}
    for tier in Tier:
        own = [point for point in points if point.tier is tier]
        costs = costs_of(own, kv_read_s[tier])
        # Within a tier by its own reference, so that the ratio is the paired one, exactly.
        atp_per_s = units[tier] / costs.seconds[Phase.DECODE]
        lines[tier] = MappingProxyType(
            {
                phase: Rate(_uatp(costs.seconds[phase] * atp_per_s), *costs.sources[phase])
                for phase in Phase
            }
        )
    return MappingProxyType(lines)


def costs_of(points: Iterable[MeasuredPoint], kv_read_s: float) -> Costs:
    """Return one tier's marginal costs; its reference is among the points."""
    points = tuple(points)
    reference = reference_point(points)
    prefill_s = max(_prefill_s(points, reference), kv_read_s)
    cached_s, cached_source = _cached_s(points, kv_read_s)
    verify = min(
        (point for point in points if point.phase is Phase.VERIFY),
        key=lambda point: point.tokens,
        default=None,
    )
    decode = (
        f"One sequence, {reference.context_tokens} tokens of context: "
        f"{_ms(reference.step_s)} a step, {reference.rounds} rounds, "
        f"spread {reference.spread:.1%}."
    )
    sources = {
        Phase.DECODE: (Basis.MEASURED, decode),
        Phase.DRAFT: (Basis.MEASURED, f"A drafted token is decoded. {decode}"),
        Phase.PREFILL: (Basis.MEASURED, f"{_ms(prefill_s)} more for each token of a prompt."),
        # Never above prefill: finding a token is never worse than computing it.
        Phase.CACHED: cached_source,
        Phase.VERIFY: (
            (Basis.MEASURED, f"One step over {verify.tokens} tokens: {_ms(verify.step_s)}.")
            if verify
            else (Basis.DECLARED, "As a decoded token: the context is too short to measure it.")
        ),
    }
    seconds = {
        Phase.DECODE: reference.step_s,
        Phase.DRAFT: reference.step_s,
        Phase.PREFILL: prefill_s,
        Phase.CACHED: min(cached_s, prefill_s),
        Phase.VERIFY: verify.token_s if verify else reference.step_s,
    }
    return Costs(MappingProxyType(seconds), MappingProxyType(sources))


def reference_point(points: Iterable[MeasuredPoint]) -> MeasuredPoint:
    """Return the point whose token is the tier's output token."""
    alone = (point for point in points if point.phase is Phase.DECODE and point.batch == 1)
    return min(alone, key=lambda point: point.context_tokens)


def _prefill_s(points: Iterable[MeasuredPoint], reference: MeasuredPoint) -> float:
    """What a prompt's token adds to a step that happens anyway: slope through the decode step.

    A job of n prompt and m output tokens takes one prefill step, whose first output token comes
    with it, and m - 1 decode steps. So m decode prices and n slopes pay for all of it.
    """
    prefills = [p for p in points if p.phase is Phase.PREFILL and p.context_tokens == 0]
    if not prefills:  # chunks of one token: a prompt is decoded
        return reference.step_s
    added = sum((p.tokens - 1) * (p.step_s - reference.step_s) for p in prefills)
    return added / sum((p.tokens - 1) ** 2 for p in prefills)


def _cached_s(points: Iterable[MeasuredPoint], kv_read_s: float) -> tuple[float, tuple[Basis, str]]:
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
                return added_s, (Basis.MEASURED, text)
    text = f"{_ms(kv_read_s)}: its keys and values are read once, at the device's bandwidth."
    return kv_read_s, (Basis.DECLARED, text)


def _uatp(atp: float) -> int:
    # Beyond a float's last digits, which must not make 1 ATP cost 1.000001.
    return max(1, math.ceil(round(atp * UATP_PER_ATP, 6)))


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.4g} ms"
