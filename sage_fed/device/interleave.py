"""Which tier steps next, and how long a strategic step and its prefill chunk may be.

Owns the tactical tier's claim on device time. Knows no sequences and no queues.

The rule pays afterwards, with measured time: a strategic step that took S seconds, while
tactical work was waiting or came soon after, gives the tactical tier the next
`S * share / (1 - share)` seconds of the device. So nothing is predicted, the ratio of steps
follows the models as they are, and a strategic step never follows a strategic step while
tactical work is waiting. The strategic tier cannot starve: what it owes is bounded by
`MAX_TACTICAL_RUN` steps, also where one of its steps took absurdly long.

Where an engine can pause between layers, all this holds of the parts of a strategic step: each is
about as long as one tactical step pays for, so that tactical tokens wait for a part, not a step.
"""

from __future__ import annotations

from sage_fed.core import Tier
from sage_fed.device.rates import StepRates

MAX_TACTICAL_RUN = 64
"""Tactical steps in a row, at most, while strategic work is waiting."""

_CHUNK_TACTICAL_STEPS = 4.0
"""What a strategic prefill chunk may cost, in tactical decode steps."""

_CHUNK_SHORTEST_STEPS = 2.0
"""Or, if that is more, in shortest strategic steps: below about one, a chunk is pure overhead,
because any step reads all the weights; above one, a chunk grows until its tokens cost time."""

_FIRST_PART_S = 0.020
"""A part of a strategic step until a tactical step has been measured."""

_SHORTEST_PART_S = 0.002
"""A pause costs the host a turn of its loop; parts are to be long against that."""

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
        if tier == Tier.STRATEGIC:
            owed_s = elapsed_s * self._tactical_per_strategic
            # What was paid too much, by less than a step, counts: parts are as short as that.
            paid_s = min(max(-self._tactical_due_s, 0.0), owed_s)
            self._tactical_due_s = owed_s - paid_s
            self._tactical_run = 0
        elif contended:
            self._tactical_due_s -= elapsed_s
            self._tactical_run += 1
        else:
            # Alone on the device: a tier that had no work has no claim on the past.
            self._tactical_due_s = 0.0
            self._tactical_run = 0

    def part_s(self, tactical: StepRates) -> float:
        """Return how long a part of a strategic step is to be: what a tactical step pays for."""
        step_s = tactical.decode_step_s
        if step_s is None:
            return _FIRST_PART_S
        return max(step_s / self._tactical_per_strategic, _SHORTEST_PART_S)


def shared_chunk_tokens(tactical: StepRates, strategic: StepRates, num_parts: int) -> int:
    """Return how many prompt tokens a strategic step may take while tactical work is waiting.

    Of a step that pauses, one of the `num_parts` is to cost a tactical step, not the whole.
    """
    tokens_per_s = strategic.prefill_tokens_per_s
    if tokens_per_s is None:
        return _FIRST_CHUNK_TOKENS
    allowed_s = max(
        max(_CHUNK_TACTICAL_STEPS, num_parts) * (tactical.decode_step_s or 0.0),
        _CHUNK_SHORTEST_STEPS * (strategic.shortest_step_s or 0.0),
    )
    return max(int(tokens_per_s * allowed_s), _MIN_CHUNK_TOKENS)
