"""Which sequences run and in which order: a pure state machine over both tiers.

Import from here: `Scheduler`, the words it speaks, and the limits it keeps.
"""

from sage_fed.scheduler.blocks import BlockPool, blocks_for
from sage_fed.scheduler.flying import Outcome
from sage_fed.scheduler.limits import TierLimits
from sage_fed.scheduler.scheduler import Scheduler
from sage_fed.scheduler.words import Ended, EndReason, SequenceSpec, TokenWeights

__all__ = [
    "BlockPool",
    "EndReason",
    "Ended",
    "Outcome",
    "Scheduler",
    "SequenceSpec",
    "TierLimits",
    "TokenWeights",
    "blocks_for",
]
