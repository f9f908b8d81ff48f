"""A step of one tier from its building to its landing, and what comes of it.

Owns what has to be known of it when it lands: its sequences, and what was decided for it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from sage_fed.device.sequence import Sequence
from sage_fed.device.words import Ended
from sage_fed.steps import SampledToken, Step


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a step delivered and which sequences it ended; a token comes before its ending.

    `num_prefill_tokens` of the step's tokens were prompt tokens. The sequences that started with
    the step were looked up in the prefix cache with `num_queried_tokens`, and had `num_hit_tokens`
    of them there. `num_preempted` were interrupted to make room for the step.
    """

    drawn: tuple[SampledToken, ...] = ()
    ended: tuple[Ended, ...] = ()
    num_prefill_tokens: int = 0
    num_queried_tokens: int = 0
    num_hit_tokens: int = 0
    num_preempted: int = 0


@dataclass(slots=True, eq=False)
class Flying:
    """`members` are the sequences of the step's chunks, in their order.

    `num_prefill` of its tokens are prompt tokens. For it, `num_preempted` were interrupted, and
    those that started were looked up with `num_queried` tokens and found `num_hit` of them.
    `void` where it was fed what an earlier step was to draw, and that step came to nothing.
    """

    step: Step
    members: tuple[Sequence, ...]
    num_prefill: int = 0
    num_queried: int = 0
    num_hit: int = 0
    num_preempted: int = 0
    void: bool = False

    def charge(self, elapsed_s: float) -> None:
        """Attribute the device's time to the members, by tokens."""
        token_s = elapsed_s / self.step.num_tokens
        for seq, chunk in zip(self.members, self.step.chunks, strict=True):
            seq.device_s += token_s * len(chunk.token_ids)

    def outcome(self, drawn: Iterable[SampledToken], ended: Iterable[Ended]) -> Outcome:
        """Return what it delivered and whom it ended, with what was decided for it."""
        return Outcome(
            drawn=tuple(drawn),
            ended=tuple(ended),
            num_prefill_tokens=self.num_prefill,
            num_queried_tokens=self.num_queried,
            num_hit_tokens=self.num_hit,
            num_preempted=self.num_preempted,
        )
