"""One command's conversation with the daemon.

Owns: opening and closing the client.
Does not know: what is asked, how it is shown.
Fails: the error tree, as the client raises it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from sage_fed.client import Client

T = TypeVar("T")


def call(address: str, token: str | None, work: Callable[[Client], T]) -> T:
    """Connect, do the work, disconnect. Ctrl-C ends the work, and with it its RPC."""
    with Client(address, token=token) as client:
        return work(client)
