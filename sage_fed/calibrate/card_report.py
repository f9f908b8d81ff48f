"""A measured card for a person to read: a page of Markdown, tables first, and a picture.

Pure; the card itself is the file beside them. The picture is drawn by hand: a few lines on
logarithmic axes are not worth a plotting library.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from xml.sax.saxutils import escape

from sage_fed.cards import RateCard
from sage_fed.core import MeasuredPoint, Phase, Tier

_POINT_HEADINGS = (
    *("tier", "phase", "batch", "context", "tokens", "step", "tok/s"),
    *("share", "co-resident", "spread", "rounds"),
)
_WIDTH, _HEIGHT = 720, 420
_LEFT, _RIGHT, _TOP, _BOTTOM = 70, 210, 50, 50
_COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd")
"""Of the tiers, the lowest first."""


def report_of(card: RateCard, left_out: Sequence[str], plot: str) -> str:
    """Return the page; `plot` is the picture's file name, `left_out` points without a figure."""
    measured, fingerprint, tiers = card.measured, card.fingerprint, sorted(card.lines)
    assert measured is not None, "a report is of a measured card"
    assert fingerprint is not None, "a report is of a measured card"
    price_headings = [name for tier in tiers for name in (tier.name, "spread")]
    prices = [
        [phase.value, *_prices(card, phase), f"{card.cost_ratio(phase):.2f}"] for phase in Phase
    ]
    conditions = [
        ("device", fingerprint.device),
        ("threads", str(fingerprint.threads)),
        ("fingerprint", fingerprint.digest),
        *((f"{tier.name} load", f"{measured.load_s[tier]:.2f} s") for tier in tiers),
        *measured.conditions.items(),
    ]
    warning = f"\n**Warning**: {measured.warning}.\n" if measured.warning else ""
    missing = f"\nLeft out, for want of device memory: {', '.join(left_out)}.\n" if left_out else ""
    return f"""\
# Rate card {card.version}

{card.title}, measured {measured.at:%Y-%m-%d %H:%M} UTC in {measured.took_s:.0f} s.

A {tiers[-1].name} output token costs **{card.cost_ratio():.3f}** {tiers[0].name} ones: the median \
of {measured.rounds} paired rounds, spread ±{measured.spread:.1%} (half of the interquartile \
range), standard error ±{measured.error:.2%}.
1 ATP is {measured.token_s * 1e3:.4g} ms of device time.
{warning}
![step times]({plot})

## Prices (ATP per token)

{_table(("phase", *price_headings, "ratio"), prices)}

## What was timed

Alone: the tier's steps one after the other. \
Co-resident: a decode step of another tier before each.
The share is of the measured read bandwidth, \
{measured.read_bandwidth_bytes_per_s / 1e9:.1f} GB/s, weights and KV cache together.

{_table(_POINT_HEADINGS, [_point_row(card, point) for point in measured.points])}
{missing}
## Batches

{_table(("batch", *(f"{tier.name} tok/s" for tier in tiers), "ratio"), _batch_rows(card))}

## Conditions

{_table(("what", "reading"), conditions)}
"""


def _prices(card: RateCard, phase: Phase) -> Iterable[str]:
    for tier in sorted(card.lines):
        rate = card.lines[tier][phase]
        yield from (f"{rate.uatp / 1e6:.6f}", _spread(rate.spread))


def _point_row(card: RateCard, point: MeasuredPoint) -> tuple[str, ...]:
    assert card.measured is not None
    assert card.fingerprint is not None
    model = card.fingerprint.models[point.tier]
    attended = point.batch * (point.context_tokens + point.tokens)
    read_s = (model.step_bytes + attended * model.kv_token_bytes) / (
        card.measured.read_bandwidth_bytes_per_s
    )
    return (
        point.tier.name,
        point.phase.value,
        str(point.batch),
        str(point.context_tokens),
        str(point.tokens),
        f"{point.step_s * 1e3:.3f} ms",
        f"{1 / point.token_s:,.0f}",
        f"{read_s / point.step_s:.0%}",
        "" if point.co_resident_s is None else f"{point.co_resident_s / point.step_s:.2f}x",
        _spread(point.spread),
        str(point.rounds),
    )


def _batch_rows(card: RateCard) -> Iterable[list[str]]:
    """Yield a row for each batch size that all tiers decoded, at their shortest contexts."""
    assert card.measured is not None
    token_s: dict[tuple[int, Tier], float] = {}
    for point in sorted(card.measured.points, key=lambda point: point.context_tokens):
        if point.phase is Phase.DECODE:
            token_s.setdefault((point.batch, point.tier), point.token_s)
    tiers = sorted(card.lines)
    for batch in sorted({batch for batch, _ in token_s}):
        times = [token_s[batch, tier] for tier in tiers if (batch, tier) in token_s]
        if len(times) == len(tiers):
            yield [str(batch), *(f"{1 / s:,.0f}" for s in times), f"{times[-1] / times[0]:.2f}"]


def _spread(spread: float | None) -> str:
    return "-" if spread is None else f"±{spread:.1%}"


def _table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join(f"| {' | '.join(c.replace('|', '/') for c in line)} |" for line in lines)


def plot_of(card: RateCard) -> str:
    """Return an SVG of device time per token over the batch.

    Contexts of one tier share its colour; the longer ones are dashed.
    """
    assert card.measured is not None, "a plot is of a measured card"
    curves: dict[tuple[Tier, int], list[tuple[float, float]]] = {}
    for point in card.measured.points:
        if point.phase is Phase.DECODE:
            curve = curves.setdefault((point.tier, point.context_tokens), [])
            curve.append((point.batch, point.token_s * 1e3))
    across = _Axis([x for curve in curves.values() for x, _ in curve], _LEFT, _WIDTH - _RIGHT)
    up = _Axis([y for curve in curves.values() for _, y in curve], _HEIGHT - _BOTTOM, _TOP)
    size = f'viewBox="0 0 {_WIDTH} {_HEIGHT}" font-family="sans-serif" font-size="12"'
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size}>',
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="white"/>',
        _label(_LEFT, 18, card.title.removesuffix(f" on {card.device}"), size=11),
        _label(_LEFT, 36, f"{card.device}: {card.cost_ratio():.2f} : 1 at batch 1"),
        _label(_WIDTH / 2 - 60, _HEIGHT - 12, "sequences in the batch"),
        f'<g transform="rotate(-90 16 {_HEIGHT / 2})">',
        _label(-40, _HEIGHT / 2, "device ms per output token"),
        "</g>",
    ]
    for value in across.marks((1,), 2):
        x = across.at(value)
        parts.append(_line((x, _TOP), (x, _HEIGHT - _BOTTOM), 'stroke="#ddd"'))
        parts.append(_label(x - 6, _HEIGHT - _BOTTOM + 16, f"{value:g}"))
    for value in up.marks((1, 2, 5), 10):
        y = up.at(value)
        parts.append(_line((_LEFT, y), (_WIDTH - _RIGHT, y), 'stroke="#ddd"'))
        parts.append(_label(_LEFT - 40, y + 4, f"{value:g}"))
    tiers = sorted(card.lines)
    for index, ((tier, context), curve) in enumerate(curves.items()):
        colour = _COLOURS[tiers.index(tier) % len(_COLOURS)]
        shortest = min(tokens for owner, tokens in curves if owner == tier)
        dash = "" if context == shortest else ' stroke-dasharray="6 4"'
        style = f'stroke="{colour}" stroke-width="2"{dash}'
        places = [(across.at(x), up.at(y)) for x, y in sorted(curve)]
        x, y = _WIDTH - _RIGHT + 15, _TOP + 10 + 22 * index
        joined = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        parts.append(f'<polyline points="{joined}" fill="none" {style}/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in places]
        parts.append(_line((x, y), (x + 24, y), style))
        parts.append(_label(x + 30, y + 4, f"{tier.name}, context {context}"))
    return "\n".join([*parts, "</svg>"]) + "\n"


class _Axis:
    """A logarithmic axis from the values' least to their greatest, `begin` to `end` on paper."""

    def __init__(self, values: Sequence[float], begin: float, end: float) -> None:
        self._low, self._high = min(values), max(values)
        if self._low == self._high:
            self._low, self._high = self._low / 2, self._high * 2
        self._begin, self._end = begin, end

    def at(self, value: float) -> float:
        share = math.log(value / self._low) / math.log(self._high / self._low)
        return self._begin + share * (self._end - self._begin)

    def marks(self, steps: Sequence[int], base: int) -> list[float]:
        """Return the round values inside the axis: steps times powers of the base."""
        first = math.floor(math.log(self._low, base))
        last = math.ceil(math.log(self._high, base))
        values = (step * float(base) ** power for power in range(first, last + 1) for step in steps)
        return [value for value in values if self._low <= value <= self._high]


def _line(begin: tuple[float, float], end: tuple[float, float], style: str) -> str:
    (x1, y1), (x2, y2) = begin, end
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" {style}/>'


def _label(x: float, y: float, text: str, size: int = 12) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}">{escape(text)}</text>'
