"""How fast the device reads its memory: the limit that decoding is measured against.

A decode step reads every weight once, so bytes per second over this figure is the share of
what the hardware allows. Fails with `ModelLoadError` where the device is absent or full.
"""

from __future__ import annotations

import time

import torch

from sage_fed.engine.load import resolve_device
from sage_fed.errors import ModelLoadError

_CPU_NBYTES = 128 * 2**20
_CUDA_NBYTES = 2**30
"""Several times the last-level cache; on CUDA long enough to hide a launch (0.2 ms at 5 TB/s)."""

_PASSES = 4
_ROUNDS = 3


@torch.inference_mode()
def read_bandwidth_bytes_per_s(device_name: str) -> float:
    """Read far more than the caches hold, with the threads that decoding has.

    The passes of a round are queued one behind the other, so that the device never waits for
    the host; the fastest round counts. Blocks for some tens of milliseconds.
    """
    device = resolve_device(device_name)
    nbytes = _CUDA_NBYTES if device.type == "cuda" else _CPU_NBYTES
    try:
        values = torch.ones(nbytes // 4, dtype=torch.float32, device=device)
    except RuntimeError as error:  # torch's out-of-memory errors on every device
        raise ModelLoadError(f"{device} has no {nbytes} bytes to measure with") from error
    fastest_s = min(_round_s(values) for _ in range(_ROUNDS))
    if device.type == "cuda":
        del values
        torch.cuda.empty_cache()
    return nbytes * _PASSES / fastest_s


def _round_s(values: torch.Tensor) -> float:
    began_s = time.perf_counter()
    sums = [values.sum() for _ in range(_PASSES)]
    torch.stack(sums).tolist()  # waits for the device
    return time.perf_counter() - began_s
