"""A step of one tier that was built and has not landed.

Owns what has to be known of it when it lands: its sequences, and what was decided for it.
"""

from __future__ import annotations

from dataclasses import dataclass

from sage_fed.scheduler.sequence import Sequence
from sage_fed.steps import Step


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
