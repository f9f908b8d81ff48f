"""The two clocks of the ledger: one that refill trusts, one that people read.

Owns reading them. Does not know accounts or SQL.
Refill counts on the kernel's time since boot (suspend included) together with the boot's id,
because the wall clock jumps: a corrected date must neither mint nor withhold ATP.
Wall time only stamps entries and ages kept results.
Where a platform has neither boot clock nor boot id, time counts within one process only, so
such a machine loses the refill of its downtime instead of ever minting twice.
"""

from __future__ import annotations

import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True, slots=True)
class Now:
    """One instant: `ns` nanoseconds since the start of `epoch`, and Unix time `wall_ns`."""

    epoch: str
    ns: int
    wall_ns: int


class Clock(Protocol):
    """Says what time it is; `ns` never goes back while `epoch` is the same."""

    def now(self) -> Now:
        """The instant of the call."""
        ...


class BootClock:
    """Time since the kernel's boot; its epoch is the boot id."""

    def __init__(self, boot_id: str) -> None:
        self._epoch = f"boot:{boot_id}"

    def now(self) -> Now:
        """The instant of the call."""
        ns = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
        return Now(self._epoch, ns, time.time_ns())


class ProcessClock:
    """Time since this object was made; its epoch is new in each process."""

    def __init__(self) -> None:
        self._epoch = f"process:{uuid.uuid4()}"
        self._start_ns = time.monotonic_ns()

    def now(self) -> Now:
        """The instant of the call."""
        return Now(self._epoch, time.monotonic_ns() - self._start_ns, time.time_ns())


def system_clock(boot_id_file: Path = BOOT_ID) -> Clock:
    """The best clock of this platform: since boot, or else since now."""
    try:
        boot_id = boot_id_file.read_text(encoding="ascii").strip()
    except OSError:
        boot_id = ""
    if boot_id and hasattr(time, "CLOCK_BOOTTIME"):
        return BootClock(boot_id)
    return ProcessClock()
