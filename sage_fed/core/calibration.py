"""What a calibration measures and says while it does."""

from __future__ import annotations

from dataclasses import dataclass

from sage_fed.core.money import Phase
from sage_fed.core.tiers import Tier


@dataclass(frozen=True, slots=True)
class MeasuredPoint:
    """One kind of step: `batch` sequences of `context_tokens` each, fed `tokens` each.

    `step_s` is the median over the rounds of the device's time with no other tier's step in
    between, `co_resident_s` with one before each (None where that was not measured).
    `spread` is half of the interquartile range of the rounds over their median; None where
    there was one round, which says nothing of it.
    """

    tier: Tier
    phase: Phase
    batch: int
    context_tokens: int
    tokens: int
    step_s: float
    spread: float | None
    rounds: int
    co_resident_s: float | None = None

    @property
    def token_s(self) -> float:
        """Device seconds per token fed."""
        return self.step_s / (self.batch * self.tokens)


@dataclass(frozen=True, slots=True)
class CalibrationProgress:
    """How far a calibration is, from 0 to 1, and what it does.

    `measured` are the points whose figures changed since the last message.
    """

    phase: str
    fraction: float
    point: str
    elapsed_s: float
    cost_ratio: float | None = None
    measured: tuple[MeasuredPoint, ...] = ()


@dataclass(frozen=True, slots=True)
class CalibrationResult:
    """A calibration's card and reports, as written into the daemon's cards directory.

    `card` is the file's text; `report` is Markdown and `plot` SVG, beside it.
    """

    version: str
    path: str
    card: str
    report: str
    plot: str
    cost_ratio: float
    cost_ratio_spread: float
    took_s: float
    adopted: bool
    points: tuple[MeasuredPoint, ...]


CalibrationEvent = CalibrationProgress | CalibrationResult
"""Progress, any number of times, and then the result."""
