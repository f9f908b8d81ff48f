"""The device: which sequences run and in which order, and the one thread that runs them.

Import from here: `Executor` and what it takes and gives, and the pure `Scheduler` with its words.
"""

from sage_fed.device.device_thread import Heartbeat
from sage_fed.device.executor import Executor, ExecutorObserver
from sage_fed.device.kv_blocks import BlockPool, blocks_for
from sage_fed.device.messages import Pacer, is_away
from sage_fed.device.scheduler import Scheduler
from sage_fed.device.sequence import Ended, EndReason, SequenceSpec, TierLimits, TokenWeights
from sage_fed.device.tier_loading import TierSetup
from sage_fed.device.tier_scheduler import Outcome

__all__ = [
    "BlockPool",
    "EndReason",
    "Ended",
    "Executor",
    "ExecutorObserver",
    "Heartbeat",
    "Outcome",
    "Pacer",
    "Scheduler",
    "SequenceSpec",
    "TierLimits",
    "TierSetup",
    "TokenWeights",
    "blocks_for",
    "is_away",
]
