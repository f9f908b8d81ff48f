"""The precisions that a tier may ask for: what weights are stored in, and what computes.

Owns the names and what each needs of a device. Knows no layer and no kernel (`formats` does).
Fails with `ModelLoadError`: an unknown name, or a device that cannot.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

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
