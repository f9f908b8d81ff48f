"""When a tier that failed is loaded again, and when a device that says nothing is given up.

Owns the counting only: no thread, no task, no tier. Cannot fail.
"""

from __future__ import annotations

from sage_fed.device.device import Heartbeat

FIRST_S = 1.0
MOST_S = 60.0
SOUND_S = 300.0
"""A tier that has served for so long has recovered: its next failure is a first one again."""

LOOK_S = 0.5
"""How often the device's heartbeat is looked at."""


class BackOff:
    """How long one tier waits before it is loaded again: twice as long each time, to a bound."""

    def __init__(self, first_s: float = FIRST_S) -> None:
        self._first_s = first_s
        self._failures = 0
        self._ready_s: float | None = None

    def ready(self, now: float) -> None:
        """Note that the tier serves."""
        self._ready_s = now

    def failed(self, now: float) -> float:
        """Return after how many seconds to load it again."""
        if self._ready_s is not None and now - self._ready_s >= SOUND_S:
            self._failures = 0
        self._ready_s = None
        self._failures += 1
        return min(self._first_s * 2.0 ** min(self._failures - 1, 10), MOST_S)


class Stall:
    """For how long the device has been busy without a sign of life, by looks every `look_s`.

    Time counts only while somebody looks: a process that was stopped, or a machine that slept,
    has not been waiting for its device.
    """

    def __init__(self, look_s: float) -> None:
        self._look_s = look_s
        self._stalled_s = 0.0
        self._last: Heartbeat | None = None

    def look(self, heartbeat: Heartbeat) -> float:
        """Return for how long there was none, `look_s` after the look before this one."""
        same = self._last is not None and heartbeat.busy and _pulse(heartbeat) == _pulse(self._last)
        self._stalled_s = self._stalled_s + self._look_s if same else 0.0
        self._last = heartbeat
        return self._stalled_s


def _pulse(heartbeat: Heartbeat) -> tuple[int, float]:
    return heartbeat.steps_done, heartbeat.last_progress_s
