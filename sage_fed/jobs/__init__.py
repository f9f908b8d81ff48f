"""One job's life: plan, hold, run, deliver, settle.

Import from here: `Broker` and the stream that it hands to a reader.
"""

from sage_fed.jobs.broker import Broker
from sage_fed.jobs.encoding import Encoder
from sage_fed.jobs.mailbox import JobStream
from sage_fed.jobs.plan import Planner

__all__ = ["Broker", "Encoder", "JobStream", "Planner"]
