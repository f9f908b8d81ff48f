"""The Python client: a running daemon as typed calls.

`Client` takes and gives core's frozen values and raises the error tree, as if the daemon were
a library; a gRPC error never comes out. `job_request` is the shorthand for a
job, `channel` the connection and its errors. Nothing is checked here: the daemon
judges every request.
"""

from __future__ import annotations

from sage_fed.client.channel import Tls, leaves_machine
from sage_fed.client.client import Client
from sage_fed.core import Answer, EntryPage, JobFields, LoadReport, TokenCount

__all__ = [
    "Answer",
    "Client",
    "EntryPage",
    "JobFields",
    "LoadReport",
    "Tls",
    "TokenCount",
    "leaves_machine",
]
