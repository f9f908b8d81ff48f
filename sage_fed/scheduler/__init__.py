"""Which sequences run and in which order: a pure state machine over both tiers.

Import from here: `Scheduler`, the words it speaks, and the limits it keeps.
"""

from sage_fed.scheduler.blocks import BlockPool, blocks_for
from sage_fed.scheduler.scheduler import Scheduler
from sage_fed.scheduler.sequence import Ended, EndReason, SequenceSpec
from sage_fed.scheduler.tier import Outcome, TierLimits

__all__ = [
    "BlockPool",
    "EndReason",
    "Ended",
    "Outcome",
    "Scheduler",
    "SequenceSpec",
    "TierLimits",
    "blocks_for",
]
