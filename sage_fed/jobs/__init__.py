"""One job's life: admission, hold, stages, delivery, settlement."""

from sage_fed.jobs.admission import Admission, Encoder
from sage_fed.jobs.broker import Broker, Services
from sage_fed.jobs.outgoing import OutgoingStream

__all__ = ["Admission", "Broker", "Encoder", "OutgoingStream", "Services"]
