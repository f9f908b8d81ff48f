"""A measured card as a picture: device time per token over the batch, both tiers, as SVG.

Pure, and drawn by hand: two lines on logarithmic axes are not worth a plotting library.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from xml.sax.saxutils import escape

from sage_fed.cards import RateCard
from sage_fed.core import MeasuredPoint, Phase, Tier

_WIDTH, _HEIGHT = 720, 420
_LEFT, _RIGHT, _TOP, _BOTTOM = 70, 210, 50, 50
_COLOURS = {Tier.TACTICAL: "#1f77b4", Tier.STRATEGIC: "#d62728"}

Curve = list[tuple[float, float]]


def plot_of(card: RateCard) -> str:
    """Return the picture; contexts of one tier share its colour, the longer one is dashed."""
    assert card.measured is not None, "a plot is of a measured card"
    curves = _curves(card.measured.points)
    across = _Axis([x for _, curve in curves for x, _ in curve], _LEFT, _WIDTH - _RIGHT)
    up = _Axis([y for _, curve in curves for _, y in curve], _HEIGHT - _BOTTOM, _TOP)
    parts = [
        (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" '
            'font-family="sans-serif" font-size="12">'
        ),
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="white"/>',
        _words(_LEFT, 18, card.title.removesuffix(f" on {card.device}"), size=11),
        _words(_LEFT, 36, f"{card.device}: {card.cost_ratio():.2f} : 1 at batch 1"),
        _words(_WIDTH / 2 - 60, _HEIGHT - 12, "sequences in the batch"),
        (
            f'<g transform="rotate(-90 16 {_HEIGHT / 2})">'
            f"{_words(-40, _HEIGHT / 2, 'device ms per output token')}</g>"
        ),
        *_grid(across, up),
    ]
    for index, ((tier, context), curve) in enumerate(curves):
        parts += _line(tier, context, [(across.at(x), up.at(y)) for x, y in curve], index, curves)
    return "\n".join([*parts, "</svg>"]) + "\n"


class _Axis:
    """A logarithmic axis from the values' least to their greatest, `begin` to `end` on paper."""

    def __init__(self, values: Sequence[float], begin: float, end: float) -> None:
        self.low, self.high = min(values), max(values)
        if self.low == self.high:
            self.low, self.high = self.low / 2, self.high * 2
        self._begin, self._end = begin, end

    def at(self, value: float) -> float:
        """Where a value is on paper."""
        share = math.log(value / self.low) / math.log(self.high / self.low)
        return self._begin + share * (self._end - self._begin)

    def marks(self, base: int) -> list[float]:
        """Round values inside the axis: powers of 2, or 1, 2 and 5 times powers of 10."""
        steps = (1,) if base == 2 else (1, 2, 5)
        first = math.floor(math.log(self.low, base))
        last = math.ceil(math.log(self.high, base))
        values = (step * float(base) ** power for power in range(first, last + 1) for step in steps)
        return [value for value in values if self.low <= value <= self.high]


def _curves(points: Iterable[MeasuredPoint]) -> list[tuple[tuple[Tier, int], Curve]]:
    curves: dict[tuple[Tier, int], Curve] = {}
    for point in points:
        if point.phase is Phase.DECODE:
            curve = curves.setdefault((point.tier, point.context_tokens), [])
            curve.append((float(point.batch), point.token_s * 1e3))
    return [(key, sorted(curve)) for key, curve in curves.items()]


def _grid(across: _Axis, up: _Axis) -> list[str]:
    parts = []
    for value in across.marks(2):
        x = across.at(value)
        parts.append(_stroke(x, _TOP, x, _HEIGHT - _BOTTOM))
        parts.append(_words(x - 6, _HEIGHT - _BOTTOM + 16, f"{value:g}"))
    for value in up.marks(10):
        y = up.at(value)
        parts.append(_stroke(_LEFT, y, _WIDTH - _RIGHT, y))
        parts.append(_words(_LEFT - 40, y + 4, f"{value:g}"))
    return parts


def _line(
    tier: Tier,
    context: int,
    places: Curve,
    index: int,
    curves: Sequence[tuple[tuple[Tier, int], Curve]],
) -> list[str]:
    shortest = min(other for (owner, other), _ in curves if owner is tier)
    dash = "" if context == shortest else ' stroke-dasharray="6 4"'
    colour = _COLOURS[tier]
    joined = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    key_x, key_y = _WIDTH - _RIGHT + 15, _TOP + 10 + 22 * index
    return [
        f'<polyline points="{joined}" fill="none" stroke="{colour}" stroke-width="2"{dash}/>',
        *(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in places),
        (
            f'<line x1="{key_x}" y1="{key_y}" x2="{key_x + 24}" y2="{key_y}" stroke="{colour}" '
            f'stroke-width="2"{dash}/>'
        ),
        _words(key_x + 30, key_y + 4, f"{tier.name}, context {context}"),
    ]


def _stroke(x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="#ddd"/>'


def _words(x: float, y: float, text: str, size: int = 12) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}">{escape(text)}</text>'
