"""The seam for weight formats: what the forward pass may ask of a linear layer.

Today the only format is dense. A packed format (int8, int4) adds one `Linear` and one
`LinearFormat` beside the dense ones; checkpoint reading and the forward pass stay as they are,
because pieces of a fused layer are handed over row range by row range and applied as a whole.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F  # noqa: N812 - the name that every reader of torch knows


class Linear(Protocol):
    """y = x W^T + b, for x [tokens, in_features]."""

    @property
    def nbytes(self) -> int:
        """Device memory of the weights."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Apply to [tokens, in_features]; returns [tokens, out_features], freshly allocated."""

    def add_to(self, residual: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Return residual + self(x), in one pass where the format can."""


class LinearBuilder(Protocol):
    """One layer while its checkpoint is read; pieces arrive in any order."""

    def place_weight(self, first_row: int, rows: torch.Tensor) -> None:
        """Take `rows` [n, in_features], a host tensor that is only valid during the call."""

    def place_bias(self, first_row: int, values: torch.Tensor) -> None:
        """Take `values` [n], likewise."""

    def build(self) -> Linear:
        """The layer; called once, after every piece has been placed."""


class LinearFormat(Protocol):
    """How a model's linear layers are stored."""

    def builder(self, out_features: int, in_features: int, *, bias: bool) -> LinearBuilder:
        """Allocate a layer on the device."""


class DenseLinear:
    """Weights in a floating-point type: [out_features, in_features], bias [out_features]."""

    __slots__ = ("_bias", "_transposed", "_weight")

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self._weight = weight
        self._transposed = weight.t()
        self._bias = bias

    @property
    def nbytes(self) -> int:
        """Device memory of the weights."""
        return self._weight.nbytes + (0 if self._bias is None else self._bias.nbytes)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Apply to [tokens, in_features]."""
        return F.linear(x, self._weight, self._bias)

    def add_to(self, residual: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Return residual + self(x)."""
        if self._bias is not None:
            return residual + F.linear(x, self._weight, self._bias)
        return torch.addmm(residual, x, self._transposed)


class DenseFormat:
    """Dense layers of one type on one device."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self._dtype = dtype
        self._device = device

    def builder(self, out_features: int, in_features: int, *, bias: bool) -> LinearBuilder:
        """Allocate the layer in its final place; pieces are converted into it."""
        weight = torch.empty(out_features, in_features, dtype=self._dtype, device=self._device)
        biases = torch.empty(out_features, dtype=self._dtype, device=self._device) if bias else None
        return _DenseBuilder(weight, biases)


class _DenseBuilder:
    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self._weight = weight
        self._bias = bias

    def place_weight(self, first_row: int, rows: torch.Tensor) -> None:
        self._weight[first_row : first_row + rows.shape[0]].copy_(rows)

    def place_bias(self, first_row: int, values: torch.Tensor) -> None:
        assert self._bias is not None
        self._bias[first_row : first_row + values.shape[0]].copy_(values)

    def build(self) -> Linear:
        return DenseLinear(self._weight, self._bias)
