"""Precisions and kernels: what weights are stored in, what computes, and how fast memory is read.

Owns the names, what each needs of a device, and the one choice of kernels from precision, device
and what was asked for. "auto" takes the fastest that is there, the model's info names it, and what
keeps a CPU from the native ones is logged. The memory's bandwidth is the limit that decoding is
measured against: a step reads every weight once.
Fails with `ModelLoadError`: an unknown name, or a device that cannot.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from functools import partial

import torch

from sage_fed.engine.linear import DenseFormat, Formats, LinearFormat
from sage_fed.engine.machine import allocate, resolve_device
from sage_fed.engine.native import Library, Unavailable, load_library
from sage_fed.engine.native.forward import Arena, PackedFormat
from sage_fed.engine.native.library import KINDS
from sage_fed.engine.quantised import QuantisedFormat
from sage_fed.errors import ModelLoadError

_FP8_CAPABILITY = (8, 9)  # Ada and newer multiply 8-bit floats


@dataclass(frozen=True, slots=True)
class Precision:
    """One way to hold a model.

    `compute` is the type of activations, norms, an embedding of its own and the KV cache.
    `layers` and `head` name what their matrices are stored in: dense (in `compute`), int8,
    int4 or fp8. Four bits are too few for a head: every logit is one of its rows.
    """

    name: str
    compute: torch.dtype
    layers: str = "dense"
    head: str = "dense"

    @property
    def quantised(self) -> bool:
        """Whether weights are stored in other numbers than the checkpoint's."""
        return self.layers != "dense"


PRECISIONS: dict[str, Precision] = {
    precision.name: precision
    for precision in (
        Precision("fp32", torch.float32),
        Precision("bf16", torch.bfloat16),
        Precision("fp16", torch.float16),
        Precision("int8", torch.bfloat16, "int8", "int8"),
        Precision("int4", torch.bfloat16, "int4", "int8"),
        Precision("fp8", torch.bfloat16, "fp8", "fp8"),
    )
}


def precision_of(name: str, device: torch.device) -> Precision:
    """The precision called `name`, on a device that can.

    Raises:
        ModelLoadError: there is none of that name, or `device` lacks what it takes.
    """
    precision = PRECISIONS.get(name)
    if precision is None:
        raise ModelLoadError(f"precision {name!r} is not one of {', '.join(PRECISIONS)}")
    if precision.layers == "fp8" and not _has_fp8(device):
        raise ModelLoadError(
            f"precision fp8 needs a CUDA device of compute capability 8.9 or newer, which {device} "
            "is not; int8 takes as much memory and runs anywhere"
        )
    return precision


def _has_fp8(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= _FP8_CAPABILITY


_LOG = logging.getLogger(__name__)
_NATIVE_DENSE = {torch.bfloat16: "bf16", torch.float32: "fp32"}

KERNELS = ("auto", "native", "torch")


def choose_formats(precision: Precision, device: torch.device, kernels: str = "auto") -> Formats:
    """Choose for `precision` on `device`; `kernels` is one of `KERNELS`.

    Raises:
        ModelLoadError: these kernels do not exist, or not here.
    """
    if kernels not in KERNELS:
        raise ModelLoadError(f"kernels {kernels!r} is not one of {', '.join(KERNELS)}")
    if kernels != "torch":
        library = _native(precision, device)
        if isinstance(library, Library):
            return _native_formats(precision, library)
        if kernels == "native":
            raise ModelLoadError(f"native kernels were asked for: {library.reason}")
        if device.type == "cpu":
            _LOG.warning("no native kernels, torch computes instead: %s", library.reason)
    return Formats(
        layers=_torch_format(precision.layers, precision.compute, device),
        head=_torch_format(precision.head, precision.compute, device),
        kernels="torch",
    )


def _native(precision: Precision, device: torch.device) -> Library | Unavailable:
    """The native kernels, compiled if need be, or why there are none."""
    if device.type != "cpu":
        return Unavailable(f"they are for the CPU, not {device}")
    if precision.compute not in _NATIVE_DENSE or precision.layers not in {"dense", *KINDS}:
        return Unavailable(f"they have no {precision.name}")
    return load_library(torch.get_num_threads())


def _native_formats(precision: Precision, library: Library) -> Formats:
    dense, arena = _NATIVE_DENSE[precision.compute], Arena()
    layers, head = (
        PackedFormat(library, dense if kind == "dense" else kind, arena)
        for kind in (precision.layers, precision.head)
    )
    return Formats(layers, head, "native", library)


def _torch_format(kind: str, compute: torch.dtype, device: torch.device) -> LinearFormat:
    if kind == "dense":
        return DenseFormat(compute, device)
    return QuantisedFormat(kind, compute, device)


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
