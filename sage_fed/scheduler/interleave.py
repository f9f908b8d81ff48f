"""Which tier steps next, and how long a strategic prefill chunk may be.

Owns the tactical tier's claim on device time. Knows no sequences and no queues.

The rule pays afterwards, with measured time: a strategic step that took S seconds, while
tactical work was waiting or came soon after, gives the tactical tier the next
`S * share / (1 - share)` seconds of the device. So nothing is predicted, the ratio of steps
follows the models as they are, and a strategic step never follows a strategic step while
tactical work is waiting. The strategic tier cannot starve: what it owes is bounded by
`MAX_TACTICAL_RUN` steps, also where one of its steps took absurdly long.
"""

from __future__ import annotations

from sage_fed.core import Tier
from sage_fed.scheduler.rates import StepRates

MAX_TACTICAL_RUN = 64
"""Tactical steps in a row, at most, while strategic work is waiting."""

_CHUNK_TACTICAL_STEPS = 4.0
"""What a strategic prefill chunk may cost, in tactical decode steps."""

_CHUNK_SHORTEST_STEPS = 2.0
"""Or, if that is more, in shortest strategic steps: below about one, a chunk is pure overhead,
because any step reads all the weights; above one, a chunk grows until its tokens cost time."""

_FIRST_CHUNK_TOKENS = 64
"""Chunk length until prefill has been measured."""

_MIN_CHUNK_TOKENS = 16


class Interleave:
    """Chooses between two tiers; `tactical_share` of device time while both have work."""

    def __init__(self, tactical_share: float) -> None:
        assert 0.0 < tactical_share < 1.0
        self._tactical_per_strategic = tactical_share / (1.0 - tactical_share)
        self._tactical_due_s = 0.0
        self._tactical_run = 0

    def pick(self, *, tactical: bool, strategic: bool) -> Tier | None:
        """Return the tier that steps next, given which have work."""
        if not (tactical and strategic):
            return Tier.TACTICAL if tactical else Tier.STRATEGIC if strategic else None
        if self._tactical_run == 0:
            return Tier.TACTICAL
        paid = self._tactical_due_s <= 0.0 or self._tactical_run >= MAX_TACTICAL_RUN
        return Tier.STRATEGIC if paid else Tier.TACTICAL

    def note(self, tier: Tier, elapsed_s: float, *, contended: bool) -> None:
        """Account for a step; `contended` says whether the other tier had work meanwhile."""
        if tier is Tier.STRATEGIC:
            self._tactical_due_s = elapsed_s * self._tactical_per_strategic
            self._tactical_run = 0
        elif contended:
            self._tactical_due_s -= elapsed_s
            self._tactical_run += 1
        else:
            # Alone on the device: a tier that had no work has no claim on the past.
            self._tactical_due_s = 0.0
            self._tactical_run = 0


def shared_chunk_tokens(tactical: StepRates, strategic: StepRates) -> int:
    """Return how many prompt tokens a strategic step may take while tactical work is waiting."""
    tokens_per_s = strategic.prefill_tokens_per_s
    if tokens_per_s is None:
        return _FIRST_CHUNK_TOKENS
    allowed_s = max(
        _CHUNK_TACTICAL_STEPS * (tactical.decode_step_s or 0.0),
        _CHUNK_SHORTEST_STEPS * (strategic.shortest_step_s or 0.0),
    )
    return max(int(tokens_per_s * allowed_s), _MIN_CHUNK_TOKENS)
