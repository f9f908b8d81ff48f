"""The device: which sequences run and in which order, and the one thread that runs them.

Import from here: `Executor` and what it takes and gives, and the pure `Scheduler` with its words.
"""

from sage_fed.device.blocks import BlockPool, blocks_for
from sage_fed.device.device import Heartbeat
from sage_fed.device.executor import Executor, ExecutorObserver
from sage_fed.device.flying import Outcome
from sage_fed.device.limits import TierLimits
from sage_fed.device.loader import TierSetup
from sage_fed.device.scheduler import Scheduler
from sage_fed.device.stream import Tokens, TokenStream
from sage_fed.device.words import Ended, EndReason, SequenceSpec, TokenWeights

__all__ = [
    "BlockPool",
    "EndReason",
    "Ended",
    "Executor",
    "ExecutorObserver",
    "Heartbeat",
    "Outcome",
    "Scheduler",
    "SequenceSpec",
    "TierLimits",
    "TierSetup",
    "TokenStream",
    "TokenWeights",
    "Tokens",
    "blocks_for",
]
