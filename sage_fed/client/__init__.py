"""The Python client: a running daemon as typed calls.

`Client` takes and gives core's frozen values and raises the error tree, as if the daemon were
a library; a gRPC error never comes out. `requests`, `replies` and `reports` translate, `asks`
lists the calls, `failures` rebuilds errors. Nothing is checked here: the daemon
judges every request.
"""

from __future__ import annotations

from sage_fed.client.channel import Tls, leaves_machine
from sage_fed.client.client import Answer, Client, EntryPage, LoadReport, TokenCount
from sage_fed.client.requests import JobFields

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
