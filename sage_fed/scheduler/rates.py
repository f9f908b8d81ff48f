"""What one tier's recent steps took.

Owns two short windows of measured steps and the figures made of them.
Knows no clock (elapsed times are given) and no sequence. Figures are None until measured.
"""

from __future__ import annotations

from collections import deque
from statistics import median

_WINDOW = 64
"""Steps that a figure looks back on: about a second of tactical decoding."""


class StepRates:
    """Step times of one tier, in seconds, and prefill speed, in tokens per second."""

    def __init__(self) -> None:
        self._decode_s: deque[float] = deque(maxlen=_WINDOW)
        self._prefill: deque[tuple[int, float]] = deque(maxlen=_WINDOW)

    def record(self, *, num_tokens: int, prefills: bool, elapsed_s: float) -> None:
        """Note a completed step of `num_tokens` tokens, with prompt tokens among them or not."""
        elapsed_s = max(elapsed_s, 1e-9)
        if prefills:
            self._prefill.append((num_tokens, elapsed_s))
        else:
            self._decode_s.append(elapsed_s)

    @property
    def decode_step_s(self) -> float | None:
        """Median time of a step that only decodes."""
        return median(self._decode_s) if self._decode_s else None

    @property
    def shortest_step_s(self) -> float | None:
        """The least that a step has taken, whatever it did: about the reading of the weights."""
        times = [*self._decode_s, *(elapsed_s for _, elapsed_s in self._prefill)]
        return min(times) if times else None

    @property
    def prefill_tokens_per_s(self) -> float | None:
        """Least-squares slope through the origin of tokens over time.

        Long chunks weigh by the square of their length: a short prompt's step is mostly the
        fixed cost of a forward pass and says little about the speed of a long one.
        """
        if not self._prefill:
            return None
        squares = sum(n * n for n, _ in self._prefill)
        return squares / sum(n * elapsed_s for n, elapsed_s in self._prefill)
