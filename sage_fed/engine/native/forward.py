"""A step as one call into the native kernels, and the packed panels that they stream.

Owns the description of the model that the kernels keep, and through it the lifetime of every
buffer in it. A layer's memory is claimed when its builder is made and filled row range by row
range, so the model is in memory once; quantisation is the canonical one (see `quantised`), done in
C++. Knows no sampling and no files. The GIL is released for the whole pass.
Fails with torch's own out-of-memory error where there was no room for a step's activations;
the cache is then as good as before.
"""

from __future__ import annotations

import ctypes
import weakref
from array import array
from collections.abc import Mapping, Sequence
from ctypes import byref
from dataclasses import dataclass

import torch

from sage_fed.engine.attention import KVCache
from sage_fed.engine.batch import blocks_used, check
from sage_fed.engine.configuration import ModelSpec
from sage_fed.engine.decoder import Forwarded, Pass
from sage_fed.engine.machine import allocate
from sage_fed.engine.native.library import (
    KINDS,
    SOURCE_TYPES,
    LayerStruct,
    Library,
    LinearStruct,
    ModelStruct,
    StepStruct,
)
from sage_fed.engine.weights import LayerWeights, ModelWeights
from sage_fed.steps import BLOCK_SIZE, Chunk

_ALONE_US = 100.0
"""Shorter steps stay on the caller's thread: to wait for another one costs more where the cores
have other things to do, as those of a daemon do."""


class NativeForward:
    """The pass of one model on the CPU; every linear layer of `weights` is a `PackedLinear`.

    `rotary` is fp32, as `rotary_table` makes it, for every position that will be served.
    """

    def __init__(
        self,
        library: Library,
        spec: ModelSpec,
        weights: ModelWeights,
        cache: KVCache,
        rotary: torch.Tensor,
        *,
        num_valid_ids: int,
    ) -> None:
        self._library = library
        self._cache = cache
        self._num_layers = spec.num_layers
        self._num_ids = weights.embedding.num_ids
        self._num_valid_ids = num_valid_ids
        self._max_context_tokens = rotary.shape[0]
        self._logits = torch.empty(0)
        description = _Description(spec, weights, cache, rotary, num_valid_ids)
        self._kept = description.kept
        self._session = library.session_new(description.model)
        self._close = weakref.finalize(self, library.session_free, self._session)

    @property
    def num_parts(self) -> int:
        """The layers."""
        return self._num_layers

    def begin(self, chunks: Sequence[Chunk]) -> Pass:
        """Begin; see `Forward`. The logits are good until the next pass."""
        token_ids, blocks, described = array("q"), array("q"), array("q")
        drawing: list[int] = []
        for index, chunk in enumerate(chunks):
            check(chunk, 0, self._num_ids, self._max_context_tokens)
            described.extend((chunk.start, len(chunk.token_ids), len(blocks), len(chunk.draws)))
            token_ids.extend(chunk.token_ids)
            blocks.extend(chunk.blocks[: blocks_used(chunk)])
            drawing += [index] * len(chunk.draws)
        logits = self._logits_of(len(drawing))
        best = torch.empty(len(drawing), dtype=torch.int64)
        step = StepStruct(
            token_ids=token_ids.buffer_info()[0],
            chunks=described.buffer_info()[0],
            blocks=blocks.buffer_info()[0],
            num_tokens=len(token_ids),
            num_chunks=len(chunks),
            logits=logits.data_ptr(),
            best=best.data_ptr(),
        )
        draws_of = tuple(draw for chunk in chunks for draw in chunk.draws)
        leaves = Forwarded(
            logits if drawing else None, draws_of, tuple(drawing), best, self._library
        )
        kept = (token_ids, described, blocks, best)
        return _NativePass(self._library, self._session, step, leaves, kept)

    def _logits_of(self, rows: int) -> torch.Tensor:
        """A buffer that is kept: fresh pages every step would cost as much as sampling does."""
        if self._logits.shape[0] < rows:
            self._logits = torch.empty(rows, self._num_valid_ids)
        return self._logits[:rows]


class _NativePass:
    """A step that a session goes on with; `kept` is what `step` points to."""

    def __init__(
        self,
        library: Library,
        session: int,
        step: StepStruct,
        leaves: Forwarded,
        kept: tuple[object, ...],
    ) -> None:
        self._library = library
        self._session = session
        self._step: StepStruct | None = step
        self._leaves = leaves
        self._kept = kept

    def advance(self, pause_after_s: float | None) -> Forwarded | None:
        """Go on; see `Pass`."""
        done = self._library.session_run(self._session, self._step, pause_after_s)
        self._step = None
        return self._leaves if done else None


class _Description:
    """A `ModelStruct`, and in `kept` what its pointers point to."""

    def __init__(
        self,
        spec: ModelSpec,
        weights: ModelWeights,
        cache: KVCache,
        rotary: torch.Tensor,
        num_valid_ids: int,
    ) -> None:
        assert rotary.dtype == torch.float32
        self.kept: list[object] = [weights]
        layers = (LayerStruct * spec.num_layers)(
            *(self._layer(layer, cache.pool[i]) for i, layer in enumerate(weights.layers))
        )
        table = weights.embedding.table
        self.model = ModelStruct(
            num_layers=spec.num_layers,
            num_heads=spec.num_heads,
            num_kv_heads=spec.num_kv_heads,
            head_dim=spec.head_dim,
            hidden=spec.hidden_size,
            intermediate=spec.intermediate_size,
            valid_ids=num_valid_ids,
            eps=spec.rms_eps,
            block_size=BLOCK_SIZE,
            alone_us=_ALONE_US,
            fp32=cache.pool.dtype == torch.float32,
            embedding_type=0 if table is None else _source_type(table),
            embedding=None if table is None else self._address(table),
            norm=self._floats(weights.norm),
            rotary=self._address(rotary.contiguous()),
            layers=ctypes.cast(layers, ctypes.POINTER(LayerStruct)),
            head=_struct(weights.head),
        )
        self.kept.append(layers)

    def _layer(self, layer: LayerWeights, pool: torch.Tensor) -> LayerStruct:
        return LayerStruct(
            qkv=_struct(layer.qkv),
            out=_struct(layer.out),
            gate_up=_struct(layer.gate_up),
            down=_struct(layer.down),
            input_norm=self._floats(layer.input_norm),
            mlp_norm=self._floats(layer.mlp_norm),
            q_norm=self._floats(layer.q_norm),
            k_norm=self._floats(layer.k_norm),
            kv=pool.data_ptr(),
        )

    def _floats(self, values: torch.Tensor | None) -> int | None:
        return None if values is None else self._address(values.float().contiguous())

    def _address(self, values: torch.Tensor) -> int:
        self.kept.append(values)
        return values.data_ptr()


def _struct(linear: object) -> LinearStruct:
    assert isinstance(linear, PackedLinear)
    return linear.struct


def _source_type(values: torch.Tensor) -> int:
    return SOURCE_TYPES[str(values.dtype).removeprefix("torch.")]


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

    def rows(self, indices: torch.Tensor) -> torch.Tensor:
        """Rows of the weights, fp32; the pass itself looks them up in C++."""
        rows = torch.empty(len(indices), self.struct.k)
        for row, index in zip(rows, indices.tolist(), strict=True):
            self.library.dll.sf_linear_row(byref(self.struct), index, row.data_ptr())
        return rows


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
        floats = 4 * library.dll.sf_linear_columns(byref(struct))
        storage = {"panels": arena.claim(library.dll.sf_linear_nbytes(byref(struct)))}
        struct.data = storage["panels"].data_ptr()
        if struct.kind == KINDS["int8"]:
            storage["scales"] = arena.claim(floats)
            struct.scales = storage["scales"].data_ptr()
        if bias:
            storage["bias"] = arena.claim(floats)
            struct.bias = storage["bias"].data_ptr()
        library.dll.sf_linear_clear(byref(struct))
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
        self._library.dll.sf_linear_place_bias(
            byref(self._struct), first_row, values.shape[0], values.data_ptr()
        )

    def build(self) -> PackedLinear:
        """The layer."""
        return PackedLinear(self._struct, self.storage, self._library)
