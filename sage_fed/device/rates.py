"""What one tier's recent steps took.

Owns two short windows of measured steps and the figures made of them, which are asked for after
every step and so are kept up to date rather than made anew.
Knows no clock (elapsed times are given) and no sequence. Figures are None until measured.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque

_WINDOW = 64
"""Steps that a figure looks back on: about a second of tactical decoding."""

_NEWEST = 0.1
"""The newest step's weight in what a step of so many rows takes."""


class StepRates:
    """Step times of one tier, in seconds, and prefill speed, in tokens per second."""

    def __init__(self) -> None:
        self._decode_s: deque[float] = deque()
        self._by_time: list[float] = []
        """The same, in ascending order."""
        self._prefill: deque[tuple[int, float]] = deque(maxlen=_WINDOW)
        self._prefill_tokens_per_s: float | None = None
        self._by_rows: dict[int, float] = {}
        self._rows: list[int] = []
        """The numbers of rows that have been seen, in ascending order."""

    def record(self, *, num_tokens: int, prefills: bool, elapsed_s: float) -> None:
        """Note a completed step of `num_tokens` tokens, with prompt tokens among them or not."""
        elapsed_s = max(elapsed_s, 1e-9)
        if prefills:
            self._prefill.append((num_tokens, elapsed_s))
            self._prefill_tokens_per_s = self._slope()
            return
        if len(self._decode_s) == _WINDOW:
            del self._by_time[bisect_left(self._by_time, self._decode_s.popleft())]
        self._decode_s.append(elapsed_s)
        insort(self._by_time, elapsed_s)
        known_s = self._by_rows.get(num_tokens)
        if known_s is None:
            insort(self._rows, num_tokens)
            known_s = elapsed_s
        self._by_rows[num_tokens] = known_s + _NEWEST * (elapsed_s - known_s)

    def decode_s(self, num_rows: int) -> float | None:
        """Return what a step takes that decodes so many sequences; None where nothing is measured.

        Between measured numbers on the line between them; beyond them rather too much than too
        little: above, in proportion, and below, what the least has taken.
        """
        if (known_s := self._by_rows.get(num_rows)) is not None:
            return known_s
        if not self._rows:
            return None
        place = bisect_left(self._rows, num_rows)
        if place == 0:
            return self._by_rows[self._rows[0]]
        below = self._rows[place - 1]
        below_s = self._by_rows[below]
        if place == len(self._rows):
            return below_s * num_rows / below
        above = self._rows[place]
        return below_s + (self._by_rows[above] - below_s) * (num_rows - below) / (above - below)

    @property
    def decode_step_s(self) -> float | None:
        """Median time of a step that only decodes."""
        times = self._by_time
        middle = len(times) // 2
        if len(times) % 2:
            return times[middle]
        return (times[middle - 1] + times[middle]) / 2 if times else None

    @property
    def shortest_step_s(self) -> float | None:
        """The least that a step has taken, whatever it did: about the reading of the weights."""
        times = [*self._by_time[:1], *(elapsed_s for _, elapsed_s in self._prefill)]
        return min(times) if times else None

    @property
    def prefill_tokens_per_s(self) -> float | None:
        """Least-squares slope through the origin of tokens over time.

        Long chunks weigh by the square of their length: a short prompt's step is mostly the
        fixed cost of a forward pass and says little about the speed of a long one.
        """
        return self._prefill_tokens_per_s

    def _slope(self) -> float:
        squares = sum(n * n for n, _ in self._prefill)
        return squares / sum(n * elapsed_s for n, elapsed_s in self._prefill)
