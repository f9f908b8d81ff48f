"""Waiting for another process: there is nothing to wait on, so it is asked again and again."""

from __future__ import annotations

import time
from collections.abc import Callable

WAIT_S = 60.0
"""How long anything of a real daemon may take on a busy machine."""

_POLL_S = 0.02


def until(condition: Callable[[], bool], what: str = "it never came true") -> None:
    """Ask until it says yes; a deadline that passes fails the test with `what`."""
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(_POLL_S)
