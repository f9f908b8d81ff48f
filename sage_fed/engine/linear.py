"""The seam for weight formats: what the forward pass may ask of a linear layer.

Owns the protocols, and the dense format. A packed format adds one `Linear` and one
`LinearFormat` (`quantised`, and those of native kernels); checkpoint reading and the forward
pass stay as they are, because pieces of a fused layer are handed over row range by row range
and applied as a whole.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F  # noqa: N812 - the name that every reader of torch knows

from sage_fed.engine.machine import allocate
from sage_fed.engine.native import Library


class Linear(Protocol):
    """y = x W^T + b, for x [tokens, in_features]."""

    @property
    def nbytes(self) -> int:
        """Device memory of the weights."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Apply to [tokens, in_features]; returns [tokens, out_features], freshly allocated."""

    def add_to(self, residual: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Return residual + self(x), in one pass where the format can."""

    def rows(self, indices: torch.Tensor) -> torch.Tensor:
        """Rows [n, in_features] of W in the type of x: what a tied embedding looks up.

        Only asked of heads. `indices` is int64 [n].
        """


class LinearBuilder(Protocol):
    """One layer while its checkpoint is read; pieces arrive in any order."""

    @property
    def storage(self) -> Mapping[str, torch.Tensor]:
        """What the pieces fill, by names of the format's own.

        A caller with a copy of all of it, made under the same `LinearFormat.layout`, may fill it
        instead of placing pieces.
        """

    def memory(self, first_row: int, num_rows: int, dtype: torch.dtype) -> torch.Tensor | None:
        """Where rows [num_rows, in_features] of `dtype` may be read to, instead of placed.

        Contiguous host memory in which they already are as the layer keeps them; None where
        the format keeps them otherwise.
        """

    def place_weight(self, first_row: int, rows: torch.Tensor) -> None:
        """Take `rows` [n, in_features], a host tensor that is only valid during the call.

        On a device that runs behind the host, it is valid until what was queued has run.
        """

    def place_bias(self, first_row: int, values: torch.Tensor) -> None:
        """Take `values` [n], likewise."""

    def build(self) -> Linear:
        """The layer; called once, after every piece has been placed."""


class LinearFormat(Protocol):
    """How a model's linear layers are stored."""

    @property
    def layout(self) -> str:
        """Names the form of the storage: copies made under another name are not usable."""

    def builder(
        self, out_features: int, in_features: int, *, bias: bool, gated: bool = False
    ) -> LinearBuilder:
        """Allocate a layer on the device; `gated`: gate rows, and then as many up rows."""


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
        if self._bias is not None and torch.compiler.is_compiling():
            # Apart, the product of one row can become a kernel that adds what follows as well.
            return F.linear(x, self._weight) + self._bias
        return F.linear(x, self._weight, self._bias)

    def add_to(self, residual: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Return residual + self(x)."""
        if self._bias is not None or torch.compiler.is_compiling():
            return residual + self(x)
        return torch.addmm(residual, x, self._transposed)

    def rows(self, indices: torch.Tensor) -> torch.Tensor:
        """Rows of the weights."""
        return self._weight.index_select(0, indices)


class DenseFormat:
    """Dense layers of one type on one device."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self._dtype = dtype
        self._device = device

    @property
    def layout(self) -> str:
        """Rows as the checkpoint has them."""
        return f"dense-{self._dtype}"

    def builder(
        self,
        out_features: int,
        in_features: int,
        *,
        bias: bool,
        gated: bool = False,  # noqa: ARG002 - rows stay in their order
    ) -> LinearBuilder:
        """Allocate the layer in its final place; pieces are converted into it."""
        weight = allocate((out_features, in_features), self._dtype, self._device)
        biases = torch.empty(out_features, dtype=self._dtype, device=self._device) if bias else None
        return DenseBuilder(weight, biases)


class DenseBuilder:
    """A `LinearBuilder` whose rows are kept as they come; `weight` may also be a vector."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        self._weight = weight
        self._bias = bias

    @property
    def storage(self) -> Mapping[str, torch.Tensor]:
        """See `LinearBuilder`."""
        weight = {"weight": self._weight}
        return weight if self._bias is None else weight | {"bias": self._bias}

    def memory(self, first_row: int, num_rows: int, dtype: torch.dtype) -> torch.Tensor | None:
        """None but on the host, and in its own type."""
        if self._weight.device.type != "cpu" or self._weight.dtype != dtype:
            return None
        return self._weight[first_row : first_row + num_rows]

    def place_weight(self, first_row: int, rows: torch.Tensor) -> None:
        """Convert `rows` into their place."""
        self._weight[first_row : first_row + rows.shape[0]].copy_(rows, non_blocking=True)

    def place_bias(self, first_row: int, values: torch.Tensor) -> None:
        """Convert `values` into their place."""
        assert self._bias is not None
        self._bias[first_row : first_row + values.shape[0]].copy_(values, non_blocking=True)

    def build(self) -> Linear:
        """The layer."""
        return DenseLinear(self._weight, self._bias)
