"""How much memory models take here: the device's, and the host's while they are loaded.

Fails never: what the system does not tell is None.
"""

from __future__ import annotations

from pathlib import Path

import torch

from sage_fed.engine.devices import resolve_device

_PEAK_RESET = "5"  # proc(5), clear_refs: the peak resident size becomes the present one


def memory_used_bytes(device_name: str) -> int | None:
    """What torch has allocated on a GPU; None on the CPU.

    What is resident there does not tell one model from the next: freed memory is used again, and
    pages of a mapped file count from their first use.
    """
    device = resolve_device(device_name)
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else None


def host_available_bytes() -> int | None:
    """What the host could give to a process without swapping."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    sizes = [line.split() for line in lines if line.startswith("MemAvailable:")]
    return int(sizes[0][1]) * 1024 if sizes else None


def begin_host_peak() -> bool:
    """Forget the peak so far; False where the system does not allow it."""
    try:
        Path("/proc/self/clear_refs").write_text(_PEAK_RESET)
    except OSError:
        return False
    return True


def host_peak_bytes() -> int | None:
    """The most that was resident since `begin_host_peak`."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    sizes = [line.split() for line in lines if line.startswith("VmHWM:")]
    return int(sizes[0][1]) * 1024 if sizes else None
