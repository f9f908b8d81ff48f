"""Quantised linear layers as CUDA runs them fastest in plain torch and what torch compiles.

Owns the choice by kind and shape; the numbers are `quantise`'s, and shapes that a kernel cannot
take stay with `quantised`. A decode step reads every weight once, so what counts is that they
are read narrow:
int8 is widened where it is multiplied. Compiled, that is one kernel, for one row a reduction, for
several Triton's product; uncompiled the widened copy is written and read again, five bytes for
one, which is right and slow.
int4 goes through ATen's kernel of Tensor Cores in groups of 32 (`_weight_int4pack_mm`, sm_80 and
newer, bf16 only), compiled or not.
fp8 of one row is widened like int8; several rows are multiplied as fp8, their activations rounded
to it with a scale per token.
"""

from __future__ import annotations

import torch

from sage_fed.engine.linear import Linear
from sage_fed.engine.quantise import GROUP
from sage_fed.engine.quantised import Fp8Linear, WidenedLinear

_INNER_TILES = (8, 4, 2)
"""How many tiles of 16 inputs one thread of the int4 kernel takes; more is faster."""

_INT4_CAPABILITY = (8, 0)
_INT4_OUTPUTS = 8


def int8_linear(values: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None) -> Linear:
    """A layer of int8 [out, in] with fp32 scales [out]."""
    return WidenedLinear(values, scales, bias)


def fp8_linear(values: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None) -> Linear:
    """A layer of float8_e4m3fn [out, in] with fp32 scales [out]."""
    return RowwiseFp8Linear(values, scales, bias)


def int4_linear(
    packed: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None, in_features: int
) -> Linear | None:
    """A layer of canonical int4; None where ATen's kernel does not take its shape, or the device.

    Takes as much memory again until `packed` is let go.
    """
    tiles = next((n for n in _INNER_TILES if in_features % (16 * n) == 0), None)
    capable = torch.cuda.get_device_capability(packed.device) >= _INT4_CAPABILITY
    if tiles is None or not capable or packed.shape[0] % _INT4_OUTPUTS:
        return None
    tiled = torch.ops.aten._convert_weight_to_int4pack(high_first(packed), tiles)  # noqa: SLF001 - an operator's name
    return TiledInt4Linear(tiled, scale_grid(scales), bias)


def high_first(packed: torch.Tensor) -> torch.Tensor:
    """Canonical bytes with their halves exchanged: this kernel has the even input in the high."""
    return (packed << 4) | (packed >> 4)


def scale_grid(scales: torch.Tensor) -> torch.Tensor:
    """[groups, out, 2] bf16 of scales [out, groups]: w = (q - 8) * scale + zero, and no zeros."""
    return torch.stack((scales.t(), torch.zeros_like(scales.t())), dim=-1).contiguous()


class RowwiseFp8Linear:
    """float8 weights: widened for one row, multiplied as they are for several."""

    def __init__(
        self, values: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None
    ) -> None:
        self._one = WidenedLinear(values, scales, bias)
        self._several = Fp8Linear(values, scales, bias)

    @property
    def nbytes(self) -> int:
        """Device memory of the weights, which both have."""
        return self._one.nbytes

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Apply to [tokens, in_features]."""
        # Uncompiled, widening would write and read five bytes for each that is stored.
        if x.shape[0] == 1 and torch.compiler.is_compiling():
            return self._one(x)
        return self._several(x)

    def add_to(self, residual: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Return residual + self(x)."""
        return residual + self(x)

    def rows(self, indices: torch.Tensor) -> torch.Tensor:
        """Rows of the weights, dequantised."""
        return self._one.rows(indices)


class TiledInt4Linear:
    """`tiled` int4 as ATen's CUDA kernel has it, `grid` bf16 [groups, out, 2]."""

    def __init__(self, tiled: torch.Tensor, grid: torch.Tensor, bias: torch.Tensor | None) -> None:
        self._tiled = tiled
        self._grid = grid
        self._bias = bias

    @property
    def nbytes(self) -> int:
        """Device memory of the weights."""
        bias = 0 if self._bias is None else self._bias.nbytes
        return self._tiled.nbytes + self._grid.nbytes + bias

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Apply to [tokens, in_features]."""
        y: torch.Tensor = torch.ops.aten._weight_int4pack_mm(  # noqa: SLF001 - an operator's name
            x.contiguous(), self._tiled, GROUP, self._grid
        )
        return y if self._bias is None else y + self._bias

    def add_to(self, residual: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Return residual + self(x)."""
        return residual + self(x)

    def rows(self, indices: torch.Tensor) -> torch.Tensor:  # noqa: ARG002 - as the others
        """Never asked: heads are not int4."""
        raise AssertionError("an int4 layer was asked for rows")
