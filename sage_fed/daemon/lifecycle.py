"""When the daemon stops, and how urgently.

Owns the signals and the one decision they lead to. The first SIGTERM, SIGINT or SIGHUP (a
terminal that is gone) asks for a drain, a second one for a stop at once; a failed part asks for a
stop with an exit code of 1.
"""

from __future__ import annotations

import asyncio
import logging
import signal

_log = logging.getLogger(__name__)

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Lifecycle:
    """The daemon's stop: asked for once, then only hurried. Event loop only."""

    def __init__(self) -> None:
        self.exit_code = 0
        self.grace_s: float | None = None
        self.failure = ""
        self._stopping = asyncio.Event()
        self._hurried = asyncio.Event()

    def install_signals(self) -> None:
        """Listen to the signals that end a daemon on the running loop."""
        loop = asyncio.get_running_loop()
        for number in _SIGNALS:
            loop.add_signal_handler(number, self._on_signal, number)

    def ignore_signals(self) -> None:
        """Ignore them from now on: all is stopped, and a late one must not spoil the exit code.

        The interpreter takes a moment to leave; a closed loop would restore the deadly default.
        """
        loop = asyncio.get_running_loop()
        for number in _SIGNALS:
            loop.remove_signal_handler(number)
            signal.signal(number, signal.SIG_IGN)

    def drain(self, grace_s: float | None = None) -> None:
        """Ask for a stop once running jobs have ended; None is the setting's grace."""
        if not self._stopping.is_set():
            self.grace_s = grace_s
            self._stopping.set()

    def fail(self, why: str) -> None:
        """Ask for a stop because a part of the daemon is gone; the exit code says so."""
        _log.critical("stopping: %s", why)
        self.failure = self.failure or why
        self.exit_code = 1
        self._stopping.set()
        self._hurried.set()

    async def wait_stopping(self) -> None:
        """Wait until a stop is asked for."""
        await self._stopping.wait()

    async def wait_hurried(self) -> None:
        """Wait until the stop must not wait for jobs any more."""
        await self._hurried.wait()

    def _on_signal(self, number: signal.Signals) -> None:
        if not self._stopping.is_set():
            _log.info("%s: draining; send it again to stop at once", number.name)
            self.drain()
        elif not self._hurried.is_set():
            _log.warning("%s again: stopping at once", number.name)
            self.exit_code = 128 + number
            self._hurried.set()
