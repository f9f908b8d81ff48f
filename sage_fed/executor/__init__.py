"""The device and the thread that owns it, as the event loop sees them.

Import from here: `Executor` and what it takes and gives.
"""

from sage_fed.executor.device import Heartbeat
from sage_fed.executor.executor import Executor, ExecutorObserver
from sage_fed.executor.loader import TierSetup
from sage_fed.executor.stream import Tokens, TokenStream

__all__ = ["Executor", "ExecutorObserver", "Heartbeat", "TierSetup", "TokenStream", "Tokens"]
