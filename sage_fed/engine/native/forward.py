"""A step as one call into the kernels: chunks become a few integer arrays, and logits come back.

Owns the description of the model that the kernels keep, and through it the lifetime of every
buffer in it. Knows no sampling and no files. The GIL is released for the whole pass.
Fails with torch's own out-of-memory error where there was no room for a step's activations;
the cache is then as good as before.
"""

from __future__ import annotations

import ctypes
import weakref
from array import array
from collections.abc import Sequence

import torch

from sage_fed.engine.architecture import ModelSpec
from sage_fed.engine.embedding import TableEmbedding
from sage_fed.engine.forward import Forwarded, Pass
from sage_fed.engine.kv_cache import KVCache
from sage_fed.engine.native.library import (
    SOURCE_TYPES,
    LayerStruct,
    Library,
    LinearStruct,
    ModelStruct,
    StepStruct,
)
from sage_fed.engine.native.linear import PackedLinear
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
            end = chunk.start + len(chunk.token_ids)
            used = -(-end // BLOCK_SIZE)
            # The kernels trust what they are given: an index out of bounds would be a crash.
            assert chunk.token_ids, "a chunk without tokens"
            assert min(chunk.token_ids) >= 0, "a token id below the vocabulary"
            assert max(chunk.token_ids) < self._num_ids, "a token id beyond the vocabulary"
            assert used <= len(chunk.blocks), "a chunk without blocks for its tokens"
            assert end <= self._max_context_tokens, "a chunk beyond the context"
            draws = chunk.draw is not None
            described.extend((chunk.start, len(chunk.token_ids), len(blocks), draws))
            token_ids.extend(chunk.token_ids)
            blocks.extend(chunk.blocks[:used])
            if draws:
                drawing.append(index)
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
        draws_of = tuple(draw for chunk in chunks if (draw := chunk.draw) is not None)
        leaves = Forwarded(logits if drawing else None, draws_of, tuple(drawing), best)
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
        table = weights.embedding.table if isinstance(weights.embedding, TableEmbedding) else None
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
