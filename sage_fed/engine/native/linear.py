"""Linear layers in packed panels: what the kernels stream.

A layer's memory is claimed when its builder is made and filled row range by row range, so the
model is in memory once. Quantisation is the canonical one (see `quantise`), done in C++.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from sage_fed.engine.memory import allocate
from sage_fed.engine.native.library import KINDS, SOURCE_TYPES, Library, LinearStruct

_ALIGNMENT = 2 << 20
_ARENA_NBYTES = 64 << 20


class Arena:
    """Hands out memory from large pieces, so that small layers lie in large pages too."""

    def __init__(self) -> None:
        self._piece = torch.empty(0, dtype=torch.uint8)
        self._at = 0

    def claim(self, nbytes: int) -> torch.Tensor:
        """Bytes [nbytes], 64-byte aligned; not cleared."""
        self._at = -(-self._at // 64) * 64
        if self._at + nbytes > self._piece.nbytes:
            size = max(nbytes, _ARENA_NBYTES) + _ALIGNMENT
            piece = allocate((size,), torch.uint8, torch.device("cpu"))
            self._piece = piece[-piece.data_ptr() % _ALIGNMENT :]
            self._at = 0
        claimed = self._piece[self._at : self._at + nbytes]
        self._at += nbytes
        return claimed


@dataclass(frozen=True, slots=True)
class PackedLinear:
    """A layer that the kernels run; `struct` points into `storage`."""

    struct: LinearStruct
    storage: Mapping[str, torch.Tensor]
    library: Library

    @property
    def nbytes(self) -> int:
        """Memory of the weights, padding included."""
        return sum(part.nbytes for part in self.storage.values())

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Apply to [tokens, in_features]; the pass itself does not come this way."""
        x = x.float().contiguous()
        y = torch.empty(x.shape[0], self.struct.n)
        self.library.linear_apply(self.struct, x.data_ptr(), x.shape[0], y.data_ptr())
        return y

    def add_to(self, residual: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Return residual + self(x)."""
        return residual + self(x)

    def row(self, index: int) -> torch.Tensor:
        """A row of the weights, fp32 [in_features]."""
        row = torch.empty(self.struct.k)
        self.library.linear_row(self.struct, index, row.data_ptr())
        return row

    def rows(self, indices: torch.Tensor) -> torch.Tensor:
        """Rows of the weights, fp32; the pass itself looks them up in C++."""
        return torch.stack([self.row(int(index)) for index in indices])


class PackedFormat:
    """Layers of one kind ("bf16", "int8", "int4" or "fp32")."""

    def __init__(self, library: Library, kind: str, arena: Arena) -> None:
        self._library = library
        self._kind = kind
        self._arena = arena

    @property
    def layout(self) -> str:
        """Panels of 64 outputs, as `model.h` has them."""
        return f"panels-{self._kind}-1"

    def builder(
        self, out_features: int, in_features: int, *, bias: bool, gated: bool = False
    ) -> PackedBuilder:
        """Allocate a layer; the kernels multiply the halves of a gated one."""
        struct = LinearStruct(n=out_features, k=in_features, kind=KINDS[self._kind], gated=gated)
        return PackedBuilder(self._library, self._arena, struct, bias=bias)


class PackedBuilder:
    """A `LinearBuilder` that packs, and quantises, as rows arrive."""

    def __init__(self, library: Library, arena: Arena, struct: LinearStruct, *, bias: bool) -> None:
        self._library = library
        self._struct = struct
        floats = 4 * library.linear_columns(struct)
        storage = {"panels": arena.claim(library.linear_nbytes(struct))}
        struct.data = storage["panels"].data_ptr()
        if struct.kind == KINDS["int8"]:
            storage["scales"] = arena.claim(floats)
            struct.scales = storage["scales"].data_ptr()
        if bias:
            storage["bias"] = arena.claim(floats)
            struct.bias = storage["bias"].data_ptr()
        library.linear_clear(struct)
        self.storage: Mapping[str, torch.Tensor] = storage

    def memory(self, first_row: int, num_rows: int, dtype: torch.dtype) -> torch.Tensor | None:  # noqa: ARG002 - no file has panels
        """None: rows are always rearranged."""
        return None

    def place_weight(self, first_row: int, rows: torch.Tensor) -> None:
        """Pack `rows` [n, in_features] of any floating type."""
        assert rows.shape[1] == self._struct.k
        assert first_row + rows.shape[0] <= self._struct.n
        name = str(rows.dtype).removeprefix("torch.")
        if name not in SOURCE_TYPES:
            rows, name = rows.float(), "float32"
        rows = rows.contiguous()
        self._library.linear_pack(
            self._struct, first_row, rows.shape[0], rows.data_ptr(), SOURCE_TYPES[name]
        )

    def place_bias(self, first_row: int, values: torch.Tensor) -> None:
        """Place `values` [n] of any floating type."""
        assert self._struct.bias is not None
        values = values.float().contiguous()
        self._library.linear_place_bias(self._struct, first_row, values.shape[0], values.data_ptr())

    def build(self) -> PackedLinear:
        """The layer."""
        return PackedLinear(self._struct, self.storage, self._library)
