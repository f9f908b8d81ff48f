"""Quantised linear layers in plain torch: on any device, and correct before fast.

Owns the products of int8, int4 and fp8 weights as `quantise` defines them. Integer weights
are exact in bf16, so scales are applied to products, not to rounded weights. On the CPU ATen's
own kernel for packed int4 serves where shapes suit it; native kernels (`formats` chooses) are
faster.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812 - the name that every reader of torch knows

from sage_fed.engine import quantise
from sage_fed.engine.quantise import GROUP


class WidenedLinear:
    """Int8 or float8 `values` [out, in], widened for a product; `scales` fp32 [out].

    The bias is in the compute type, or None. `block` rows are widened at a time, or all of them:
    where a compiler makes one kernel of it, none is ever stored wide.
    """

    def __init__(
        self,
        values: torch.Tensor,
        scales: torch.Tensor,
        bias: torch.Tensor | None,
        *,
        block: int | None = None,
    ) -> None:
        self._values = values
        self._scales = scales
        self._bias = bias
        rows = values.shape[0]
        size = block or rows
        self._blocks = [slice(i, i + size) for i in range(0, rows, size)]

    @property
    def nbytes(self) -> int:
        """Device memory of the weights."""
        return _nbytes(self._values, self._scales, self._bias)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Apply to [tokens, in_features]."""
        # Some rows at a time: widened weights stay in the cache, and are never all there.
        # (ATen's _weight_int8pack_mm is no faster for one token, and reads beyond odd shapes.)
        # Narrow numbers are exact in bf16; their scales would not be, so they come after.
        parts = [F.linear(x, self._values[block].to(x.dtype)) for block in self._blocks]
        y = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
        return _scaled(y, self._scales, self._bias)

    def add_to(self, residual: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Return residual + self(x)."""
        return residual + self(x)

    def rows(self, indices: torch.Tensor) -> torch.Tensor:
        """Rows of the weights, dequantised."""
        wide = quantise.dequantise_int8(self._values[indices], self._scales[indices])
        return wide.to(torch.bfloat16)


class Int4Linear:
    """`packed` uint8 [out, groups * 16], `scales` bf16 [out, groups], dequantised for a product."""

    def __init__(
        self,
        packed: torch.Tensor,
        scales: torch.Tensor,
        bias: torch.Tensor | None,
        *,
        in_features: int,
        block: int,
    ) -> None:
        self._packed = packed
        self._scales = scales
        self._bias = bias
        self._in_features = in_features
        self._blocks = [slice(i, i + block) for i in range(0, packed.shape[0], block)]

    @property
    def nbytes(self) -> int:
        """Device memory of the weights."""
        return _nbytes(self._packed, self._scales, self._bias)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Apply to [tokens, in_features]."""
        parts = [F.linear(x, self._weights(block).to(x.dtype)) for block in self._blocks]
        y = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
        return y if self._bias is None else y.add_(self._bias)

    def add_to(self, residual: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Return residual + self(x)."""
        return residual + self(x)

    def rows(self, indices: torch.Tensor) -> torch.Tensor:
        """Rows of the weights, dequantised."""
        return self._weights(indices).to(torch.bfloat16)

    def _weights(self, which: slice | torch.Tensor) -> torch.Tensor:
        wide = quantise.dequantise_int4(self._packed[which], self._scales[which])
        return wide[:, : self._in_features]


class AtenInt4Linear:
    """Int4 in ATen's packing for the CPU; `grid` is bf16 [groups, out, 2]: scale and zero."""

    def __init__(self, packed: torch.Tensor, grid: torch.Tensor, bias: torch.Tensor | None) -> None:
        self._packed = packed
        self._grid = grid
        self._bias = bias

    @property
    def nbytes(self) -> int:
        """Device memory of the weights."""
        return _nbytes(self._packed, self._grid, self._bias)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Apply to [tokens, in_features]."""
        y: torch.Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(  # noqa: SLF001 - an operator's name
            x.contiguous(), self._packed, GROUP, self._grid
        )
        return y if self._bias is None else y.add_(self._bias)

    def add_to(self, residual: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Return residual + self(x)."""
        return residual + self(x)

    def rows(self, indices: torch.Tensor) -> torch.Tensor:  # noqa: ARG002 - as the others
        """Never asked: heads are not int4."""
        raise AssertionError("an int4 layer was asked for rows")


class Fp8Linear:
    """`values` float8 [out, in], `scales` fp32 [out]; activations get a scale per token."""

    def __init__(
        self, values: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None
    ) -> None:
        self._values = values
        self._scales = scales
        self._bias = bias

    @property
    def nbytes(self) -> int:
        """Device memory of the weights."""
        return _nbytes(self._values, self._scales, self._bias)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Apply to [tokens, in_features]."""
        narrow, scales = quantise.quantise_fp8(x)
        y: torch.Tensor = torch._scaled_mm(  # noqa: SLF001 - its only name
            narrow,
            self._values.t(),
            scale_a=scales[:, None],
            scale_b=self._scales[None, :],
            bias=self._bias,
            out_dtype=x.dtype,
        )
        return y

    def add_to(self, residual: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Return residual + self(x)."""
        return residual + self(x)

    def rows(self, indices: torch.Tensor) -> torch.Tensor:
        """Rows of the weights, dequantised."""
        wide = quantise.dequantise_fp8(self._values[indices], self._scales[indices])
        return wide.to(torch.bfloat16)


def _scaled(y: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    wide = y.float().mul_(scales)
    if bias is not None:
        wide.add_(bias)
    return wide.to(y.dtype)


def _nbytes(*tensors: torch.Tensor | None) -> int:
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)
