"""Which kernels run a model: the one place that decides it, and says so.

Owns the choice from precision, device and what was asked for. A choice that cannot be had is an
error; "auto" takes the fastest that is there, and the model's info names it.
Fails with `ModelLoadError`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sage_fed.engine.linear import DenseFormat, LinearFormat
from sage_fed.engine.precision import Precision
from sage_fed.engine.quantised_format import QuantisedFormat
from sage_fed.errors import ModelLoadError

KERNELS = ("auto", "native", "torch")


@dataclass(frozen=True, slots=True)
class Formats:
    """How a model's layers and its head are stored; `kernels` names what runs them."""

    layers: LinearFormat
    head: LinearFormat
    kernels: str

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
    if kernels == "native":
        raise ModelLoadError(f"there are no native kernels for {precision.name} on {device}")
    return Formats(
        layers=_torch_format(precision.layers, precision.compute, device),
        head=_torch_format(precision.head, precision.compute, device),
        kernels="torch",
    )


def _torch_format(kind: str, compute: torch.dtype, device: torch.device) -> LinearFormat:
    if kind == "dense":
        return DenseFormat(compute, device)
    return QuantisedFormat(kind, compute, device)
