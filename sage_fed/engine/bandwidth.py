"""How fast the device reads its memory: the limit that decoding is measured against.

A decode step reads every weight once, so bytes per second over this figure is the share of
what the hardware allows. Fails with `ModelLoadError` where the device is absent or full.
"""

from __future__ import annotations

import time
from functools import partial

import torch

from sage_fed.engine.devices import resolve_device
from sage_fed.engine.memory import allocate
from sage_fed.engine.native import Library, load_library
from sage_fed.errors import ModelLoadError

_CPU_NBYTES = 256 * 2**20
_CUDA_NBYTES = 2**30
"""Several times the last-level cache; on CUDA long enough to hide a launch (0.2 ms at 5 TB/s)."""

_PASSES = 4
_ROUNDS = 3


@torch.inference_mode()
def read_bandwidth_bytes_per_s(device_name: str) -> float:
    """Read far more than the caches hold, with the threads that decoding has.

    The passes of a round are queued one behind the other, so that the device never waits for
    the host; the fastest round counts. Blocks for a tenth or two of a second.
    """
    device = resolve_device(device_name)
    # Torch's sum over small pages reaches two thirds of what our own kernels then read.
    native = load_library(torch.get_num_threads()) if device.type == "cpu" else None
    nbytes = _CUDA_NBYTES if device.type == "cuda" else _CPU_NBYTES
    try:
        values = allocate((nbytes // 4,), torch.float32, device).fill_(1.0)
    except (RuntimeError, MemoryError) as error:  # torch's on every device, and the host's
        raise ModelLoadError(f"{device} has no {nbytes} bytes to measure with") from error
    read = partial(_native_round_s, native) if isinstance(native, Library) else _round_s
    fastest_s = min(read(values) for _ in range(_ROUNDS))
    if device.type == "cuda":
        del values
        torch.cuda.empty_cache()
    return nbytes * _PASSES / fastest_s


def _native_round_s(library: Library, values: torch.Tensor) -> float:
    """As long as the fastest pass, times their number: other work on the cores only adds."""
    passes_s = []
    for _ in range(2 * _PASSES):
        began_s = time.perf_counter()
        library.read(values.data_ptr(), values.nbytes)
        passes_s.append(time.perf_counter() - began_s)
    return _PASSES * min(passes_s)


def _round_s(values: torch.Tensor) -> float:
    began_s = time.perf_counter()
    sums = [values.sum() for _ in range(_PASSES)]
    torch.stack(sums).tolist()  # waits for the device
    return time.perf_counter() - began_s
