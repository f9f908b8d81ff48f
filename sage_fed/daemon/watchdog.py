"""Whether the device's thread gets on, and telling the service manager so, or not.

Owns the rule of what counts as progress. A thread that hangs in the device cannot be ended from
inside its process: the manager is no longer told that we live, and restarts us.
Fails never; where nobody watches, `keep_watch` only says in the log that the device hangs.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Protocol

from sage_fed.device import Heartbeat
from sage_fed.systemd import ServiceManager

_log = logging.getLogger(__name__)

_ROUNDS = 4
"""Times that the manager is told within its own patience."""

_UNWATCHED_S = 10.0
"""Between two looks where no manager waits for one."""


class Watched(Protocol):
    """As much of the executor as is looked at."""

    @property
    def heartbeat(self) -> Heartbeat | None:
        """The device thread's last sign of life."""

    def ping(self) -> None:
        """Ask for another one."""


class Pulse:
    """Judges one heartbeat after the other; between two of them the thread is pinged.

    A thread gets on if it has turned its loop since it was last asked to, whether it had work or
    not, and if, while it has work, it ends a step now and then. Either may take `step_timeout_s`:
    a step may be a long one, and nothing is heard of it before it ends.
    """

    def __init__(self, step_timeout_s: float) -> None:
        self._step_timeout_s = step_timeout_s
        self._asked_s: float | None = None
        self._worked_s = 0.0
        self._steps_done = -1

    def gets_on(self, beat: Heartbeat, now_s: float) -> bool:
        """Whether the thread gets on, as of `now_s` on the clock of the heartbeats."""
        if self._asked_s is None or beat.last_progress_s >= self._asked_s:
            self._asked_s = now_s
        if not beat.busy or beat.steps_done != self._steps_done:
            self._worked_s, self._steps_done = now_s, beat.steps_done
        return now_s - min(self._asked_s, self._worked_s) <= self._step_timeout_s


async def keep_watch(
    executor: Watched,
    manager: ServiceManager,
    step_timeout_s: float,
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """Feed the manager's watchdog for as long as the device's thread gets on."""
    pulse = Pulse(step_timeout_s)
    interval_s = manager.watchdog_s / _ROUNDS if manager.watchdog_s else _UNWATCHED_S
    hangs = False
    while True:
        beat = executor.heartbeat
        if beat is not None:
            hung, hangs = hangs, not pulse.gets_on(beat, clock())
            if not hangs:
                manager.alive()
                if hung:
                    _log.warning("the device's thread gets on again")
                    manager.status("the device gets on again")
            elif not hung:
                _log.critical(
                    "the device's thread has made no progress for %.0f s "
                    "(scheduling.step_timeout_s)",
                    step_timeout_s,
                )
                manager.status(f"the device hangs: no progress for {step_timeout_s:.0f} s")
            executor.ping()
        await asyncio.sleep(interval_s)
