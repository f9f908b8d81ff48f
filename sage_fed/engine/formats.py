"""Which kernels run a model: the one place that decides it, and says so.

Owns the choice from precision, device and what was asked for. A choice that cannot be had is an
error; "auto" takes the fastest that is there, the model's info names it, and what keeps a CPU
from the native ones is logged.
Fails with `ModelLoadError`.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch

from sage_fed.engine.linear import DenseFormat, LinearFormat
from sage_fed.engine.native import Library, Unavailable, load_library
from sage_fed.engine.native.library import KINDS
from sage_fed.engine.native.linear import Arena, PackedFormat
from sage_fed.engine.precision import Precision
from sage_fed.engine.quantised_format import QuantisedFormat
from sage_fed.errors import ModelLoadError

_LOG = logging.getLogger(__name__)
_NATIVE_DENSE = {torch.bfloat16: "bf16", torch.float32: "fp32"}

KERNELS = ("auto", "native", "torch")


@dataclass(frozen=True, slots=True)
class Formats:
    """How a model's layers and its head are stored; `kernels` names what runs them.

    `native` are our own kernels, where it is them.
    """

    layers: LinearFormat
    head: LinearFormat
    kernels: str
    native: Library | None = None

    @property
    def layout(self) -> str:
        """Names the form of all stored weights."""
        return f"{self.layers.layout}+{self.head.layout}"


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
