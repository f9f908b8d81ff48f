"""One job's life: plan, hold, run, deliver, settle.

Import from here: `Broker` and the stream that it hands to a reader.
"""

from sage_fed.jobs.admission import Encoder, Planner
from sage_fed.jobs.broker import Broker
from sage_fed.jobs.outgoing import OutgoingStream

__all__ = ["Broker", "Encoder", "OutgoingStream", "Planner"]
