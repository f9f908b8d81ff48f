"""What a daemon says to systemd: that it is ready, how it fares, that it lives, that it stops.

Owns the protocol of sd_notify(3), which is one datagram of KEY=value lines. It is written out
here because libsystemd's bindings need its headers to install, and `sdnotify` is abandoned.
Without NOTIFY_SOCKET in the environment every call does nothing.
Never fails: a manager that does not listen is logged once, and the daemon goes on serving.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Mapping
from typing import Self

_log = logging.getLogger(__name__)

_PATIENCE_S = 1.0
"""The manager's queue holds a few messages, and a READY that is lost is a failed start: we wait
while it is busy with something else, which takes it milliseconds."""

_MAX_STATUS_CHARS = 400
"""systemctl shows one line; a longer text is cut."""


class ServiceManager:
    """The service manager that started this process, if one did.

    Args:
        address: of its socket: a path, or `@NAME` for an abstract one; empty for none.
        watchdog_s: how long it waits for `alive` before it kills us; None where it does not.
    """

    def __init__(self, address: str = "", watchdog_s: float | None = None) -> None:
        self.watchdog_s = watchdog_s
        self._address = f"\0{address[1:]}" if address.startswith("@") else address
        self._status = ""
        self._deaf = False

    @classmethod
    def of(cls, environ: Mapping[str, str]) -> Self:
        """The manager that an environment names; what is meant for another process is not ours."""
        address = environ.get("NOTIFY_SOCKET", "")
        if not address.startswith(("/", "@")):
            return cls()
        return cls(address, _watchdog_s(environ))

    def status(self, text: str) -> None:
        """Say how it fares, in one line for people."""
        # A line break would begin another field.
        line = " ".join(text.split())[:_MAX_STATUS_CHARS]
        if line != self._status:
            self._status = line
            self._send(f"STATUS={line}")

    def ready(self) -> None:
        """Say that the start is over: it serves."""
        self._send("READY=1")

    def stopping(self, within_s: float) -> None:
        """Say that it stops, and how long that may take."""
        self._send("STOPPING=1")
        self.extend(within_s)

    def extend(self, patience_s: float) -> None:
        """Ask for so much time from now on, for the start or the stop that is under way."""
        self._send(f"EXTEND_TIMEOUT_USEC={round(patience_s * 1e6)}")

    def alive(self) -> None:
        """Feed the watchdog; one that does not get through is followed by the next."""
        self._send("WATCHDOG=1", patience_s=0.0)

    def _send(self, message: str, *, patience_s: float = _PATIENCE_S) -> None:
        if not self._address:
            return
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
                sender.settimeout(patience_s)
                # Connected: only then is it told when the manager has room again.
                sender.connect(self._address)
                sender.send(message.encode())
        except BlockingIOError:
            # The watchdog's next one comes soon.
            return
        except OSError as error:
            if not self._deaf:
                _log.warning("the service manager does not listen: %s", error.strerror or error)
            self._deaf = True


def _watchdog_s(environ: Mapping[str, str]) -> float | None:
    if environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return None
    interval_us = environ.get("WATCHDOG_USEC", "")
    return int(interval_us) / 1e6 if interval_us.isdecimal() and int(interval_us) else None
