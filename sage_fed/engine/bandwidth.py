"""How fast the device reads its memory: the limit that decoding is measured against.

A decode step reads every weight once, so bytes per second over this figure is the share of
what the hardware allows. Fails with `ModelLoadError` where the device is absent or full.
"""

from __future__ import annotations

import time

import torch

from sage_fed.engine.load import resolve_device
from sage_fed.errors import ModelLoadError

_NBYTES = 128 * 2**20
"""Several times the last-level cache of the machines that we know."""

_PASSES = 5


@torch.inference_mode()
def read_bandwidth_bytes_per_s(device_name: str) -> float:
    """Read 128 MiB a few times, with the threads that decoding has; the fastest pass counts.

    Blocks for some tens of milliseconds.
    """
    device = resolve_device(device_name)
    try:
        values = torch.ones(_NBYTES // 4, dtype=torch.float32, device=device)
    except RuntimeError as error:  # torch's out-of-memory errors on every device
        raise ModelLoadError(f"{device} has no {_NBYTES} bytes to measure with") from error
    fastest_s = min(_pass_s(values) for _ in range(_PASSES))
    return _NBYTES / fastest_s


def _pass_s(values: torch.Tensor) -> float:
    began_s = time.perf_counter()
    values.sum().item()  # waits for the device
    return time.perf_counter() - began_s
