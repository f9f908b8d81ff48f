"""A decoder's weights on the device, and where each tensor of a checkpoint belongs in them.

Query, key and value projections are one layer, gate and up projections another: a step of a
small batch is bound by launches and memory traffic, so fewer and larger products are faster.
Knows tensor names; reads no files (`checkpoint` does). Allocates everything when constructed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch

from sage_fed.engine.configuration import ModelSpec
from sage_fed.engine.linear import Formats, Linear, LinearBuilder
from sage_fed.engine.machine import allocate


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One decoder layer; norms are [hidden_size] or, of queries and keys, [head_dim]."""

    input_norm: torch.Tensor
    qkv: Linear
    q_norm: torch.Tensor | None
    k_norm: torch.Tensor | None
    out: Linear
    mlp_norm: torch.Tensor
    gate_up: Linear
    down: Linear

    @property
    def nbytes(self) -> int:
        """Device memory of the layer."""
        norms = (self.input_norm, self.q_norm, self.k_norm, self.mlp_norm)
        linears = (self.qkv, self.out, self.gate_up, self.down)
        return sum(n.nbytes for n in norms if n is not None) + sum(x.nbytes for x in linears)


@dataclass(frozen=True, slots=True)
class ModelWeights:
    """The whole decoder.

    `head` yields logits of the ids that the tokenizer knows only: the padding above them in
    the vocabulary is neither computed nor ever drawn.
    """

    embedding: Embedding
    layers: tuple[LayerWeights, ...]
    norm: torch.Tensor
    head: Linear
    parameters: int

    @property
    def nbytes(self) -> int:
        """Device memory of all weights."""
        return self.step_nbytes + self.embedding.nbytes

    @property
    def step_nbytes(self) -> int:
        """Bytes that one step reads of the weights: of an embedding it looks up only rows."""
        return self.head.nbytes + self.norm.nbytes + sum(layer.nbytes for layer in self.layers)


@dataclass(frozen=True, slots=True)
class Place:
    """Where one checkpoint tensor goes, row range by row range.

    `shape` is what the checkpoint must have; of its rows (elements, where it is a vector) the
    first `num_rows` are wanted. `take(first_row, rows)` takes some of them, a host tensor of
    any floating type that is only valid during the call, or until the device has caught up.
    `memory(first_row, num_rows, dtype)` is host memory to read them to instead, or None.
    """

    shape: tuple[int, ...]
    num_rows: int
    take: Callable[[int, torch.Tensor], object]
    memory: Callable[[int, int, torch.dtype], torch.Tensor | None]

    def put(self, tensor: torch.Tensor) -> None:
        """Take the whole tensor."""
        self.take(0, tensor[: self.num_rows])


class WeightsBuilder:
    """Allocates a decoder and lists the `places` of its tensors by checkpoint name.

    `storage` names every tensor that the places fill: a copy of all of them, made by a builder
    of the same `Formats.layout`, may be read into them instead. `compute` is the type of norms
    and of an embedding of its own. `shared_table` names the one tensor that is both embedding
    and head, where they are not two.
    """

    def __init__(
        self,
        spec: ModelSpec,
        formats: Formats,
        *,
        shared_table: str | None,
        num_valid_ids: int,
        compute: torch.dtype,
        device: torch.device,
    ) -> None:
        self._spec = spec
        self._formats = formats
        self._compute = compute
        self._device = device
        self.places: dict[str, Place] = {}
        self.storage: dict[str, torch.Tensor] = {}
        self._layers = [self._layer(f"model.layers.{i}") for i in range(spec.num_layers)]
        self._norm = self._tensor("model.norm.weight", spec.hidden_size)
        table = (spec.vocab_size, spec.hidden_size)
        self._table: torch.Tensor | None = None
        if shared_table is None:
            self._table = self._tensor("model.embed_tokens.weight", *table)
        self._num_valid_ids = num_valid_ids
        self._head = formats.head.builder(num_valid_ids, spec.hidden_size, bias=False)
        head = shared_table or "lm_head.weight"
        self._keep(head.removesuffix(".weight"), self._head)
        self.places[head] = Place(table, num_valid_ids, self._head.place_weight, self._head.memory)

    def build(self) -> ModelWeights:
        """The decoder, once every place has been filled."""
        head = self._head.build()
        embedding: Embedding = TiedEmbedding(head, self._num_valid_ids)
        if self._table is not None:
            embedding = TableEmbedding(self._table)
        return ModelWeights(
            embedding=embedding,
            layers=tuple(layer() for layer in self._layers),
            norm=self._norm,
            head=head,
            parameters=sum(torch.Size(place.shape).numel() for place in self.places.values()),
        )

    def _layer(self, name: str) -> Callable[[], LayerWeights]:
        spec, hidden = self._spec, self._spec.hidden_size
        q_rows, kv_rows = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
        attention, mlp = f"{name}.self_attn", f"{name}.mlp"
        qkv = self._fused(
            f"{attention}.qkv",
            hidden,
            {
                f"{attention}.q_proj": q_rows,
                f"{attention}.k_proj": kv_rows,
                f"{attention}.v_proj": kv_rows,
            },
            bias=spec.qkv_bias,
        )
        out = self._fused(
            f"{attention}.out", q_rows, {f"{attention}.o_proj": hidden}, bias=spec.out_bias
        )
        gate_up = self._fused(
            f"{mlp}.gate_up",
            hidden,
            {f"{mlp}.{part}_proj": spec.intermediate_size for part in ("gate", "up")},
            bias=spec.mlp_bias,
            gated=True,
        )
        down = self._fused(
            f"{mlp}.down", spec.intermediate_size, {f"{mlp}.down_proj": hidden}, bias=spec.mlp_bias
        )
        input_norm = self._tensor(f"{name}.input_layernorm.weight", hidden)
        mlp_norm = self._tensor(f"{name}.post_attention_layernorm.weight", hidden)
        q_norm = k_norm = None
        if spec.qk_norm:
            q_norm = self._tensor(f"{attention}.q_norm.weight", spec.head_dim)
            k_norm = self._tensor(f"{attention}.k_norm.weight", spec.head_dim)
        return lambda: LayerWeights(
            input_norm=input_norm,
            qkv=qkv.build(),
            q_norm=q_norm,
            k_norm=k_norm,
            out=out.build(),
            mlp_norm=mlp_norm,
            gate_up=gate_up.build(),
            down=down.build(),
        )

    def _tensor(self, name: str, *shape: int) -> torch.Tensor:
        tensor = allocate(shape, self._compute, self._device)
        self.storage[name] = tensor
        self.places[name] = Place(shape, shape[0], partial(_copy, tensor), partial(_part, tensor))
        return tensor

    def _fused(
        self,
        name: str,
        in_features: int,
        pieces: dict[str, int],
        *,
        bias: bool,
        gated: bool = False,
    ) -> LinearBuilder:
        """One layer from the rows of several checkpoint layers, in the order of `pieces`."""
        layer = self._formats.layers.builder(
            sum(pieces.values()), in_features, bias=bias, gated=gated
        )
        self._keep(name, layer)
        first = 0
        for piece, rows in pieces.items():
            self.places[f"{piece}.weight"] = Place(
                (rows, in_features),
                rows,
                partial(_from, first, layer.place_weight),
                partial(_memory_from, first, layer.memory),
            )
            if bias:
                self.places[f"{piece}.bias"] = Place(
                    (rows,), rows, partial(_from, first, layer.place_bias), _no_memory
                )
            first += rows
        return layer

    def _keep(self, name: str, layer: LinearBuilder) -> None:
        self.storage |= {f"{name}.{part}": tensor for part, tensor in layer.storage.items()}


def _copy(tensor: torch.Tensor, first_row: int, rows: torch.Tensor) -> None:
    tensor[first_row : first_row + rows.shape[0]].copy_(rows, non_blocking=True)


def _part(
    tensor: torch.Tensor, first_row: int, num_rows: int, dtype: torch.dtype
) -> torch.Tensor | None:
    if tensor.device.type != "cpu" or tensor.dtype != dtype:
        return None
    return tensor[first_row : first_row + num_rows]


def _from(
    offset: int, take: Callable[[int, torch.Tensor], object], first_row: int, rows: torch.Tensor
) -> None:
    take(offset + first_row, rows)


def _memory_from(
    offset: int,
    memory: Callable[[int, int, torch.dtype], torch.Tensor | None],
    first_row: int,
    num_rows: int,
    dtype: torch.dtype,
) -> torch.Tensor | None:
    return memory(offset + first_row, num_rows, dtype)


def _no_memory(first_row: int, num_rows: int, dtype: torch.dtype) -> torch.Tensor | None:  # noqa: ARG001 - vectors are not worth it
    return None


class Embedding(Protocol):
    """Vectors by token id."""

    @property
    def nbytes(self) -> int:
        """Device memory of its own."""

    @property
    def num_ids(self) -> int:
        """Ids from 0 on that have a vector."""

    def lookup(self, ids: torch.Tensor) -> torch.Tensor:
        """Vectors [tokens, hidden_size] of int64 [tokens], freshly allocated."""


class TableEmbedding:
    """A table [vocab_size, hidden_size] in the compute type."""

    def __init__(self, table: torch.Tensor) -> None:
        self.table = table

    @property
    def nbytes(self) -> int:
        """Device memory of the table."""
        return self.table.nbytes

    @property
    def num_ids(self) -> int:
        """The whole vocabulary."""
        return self.table.shape[0]

    def lookup(self, ids: torch.Tensor) -> torch.Tensor:
        """Rows of the table."""
        return self.table.index_select(0, ids)


class TiedEmbedding:
    """The rows of a head, whatever it is stored in: there is no second copy."""

    def __init__(self, head: Linear, num_ids: int) -> None:
        self._head = head
        self._num_ids = num_ids

    @property
    def nbytes(self) -> int:
        """Nothing: the head has it."""
        return 0

    @property
    def num_ids(self) -> int:
        """The ids that the head has logits for."""
        return self._num_ids

    def lookup(self, ids: torch.Tensor) -> torch.Tensor:
        """Rows of the head."""
        return self._head.rows(ids)
