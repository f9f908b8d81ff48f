"""What was timed so far: one figure a round and point, their medians and their spread.

Pure. A round's figure is a median already, so one step that was disturbed changes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median, quantiles

from sage_fed.calibrate.plan import Point
from sage_fed.core import MeasuredPoint


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
