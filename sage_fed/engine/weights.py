"""A decoder's weights on the device, and where each tensor of a checkpoint belongs in them.

Query, key and value projections are one layer, gate and up projections another: a step of a
small batch is bound by launches and memory traffic, so fewer and larger products are faster.
Knows tensor names; reads no files (`checkpoint` does). Allocates everything when constructed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from sage_fed.engine.configuration import ModelSpec
from sage_fed.engine.linear import DenseBuilder, Formats, Linear, LinearBuilder
from sage_fed.engine.machine import allocate
from sage_fed.errors import ModelLoadError


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
    `memory(first_row, num_rows, dtype)` is host memory to read them to instead, or None. Both
    count from `offset`, the row of what they fill at which this tensor begins.
    """

    shape: tuple[int, ...]
    num_rows: int
    take: Callable[[int, torch.Tensor], object]
    memory: Callable[[int, int, torch.dtype], torch.Tensor | None] | None = None
    offset: int = 0

    def put(self, tensor: torch.Tensor) -> None:
        """Take the whole tensor."""
        self.take(self.offset, tensor[: self.num_rows])


class WeightsBuilder:
    """Allocates a decoder and lists the `places` of its tensors by checkpoint name.

    `storage` names every tensor that the places fill: a copy of all of them, made by a builder
    of the same `Formats.layout`, may be read into them instead. `compute` is the type of norms
    and of an embedding of its own. `shared_table` names the one tensor that is both embedding
    and head, where they are not two.

    Raises:
        ModelLoadError: the device has no memory for it.
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
        self._num_valid_ids = num_valid_ids
        self._table: torch.Tensor | None = None
        try:
            self._allocate(shared_table)
        except (RuntimeError, MemoryError) as error:  # torch's and the host's own
            raise ModelLoadError(f"{device} has no memory for the weights") from error

    def build(self) -> ModelWeights:
        """The decoder, once every place has been filled."""
        head = self._head.build()
        num_ids = self._num_valid_ids if self._table is None else self._table.shape[0]
        return ModelWeights(
            embedding=Embedding(self._table, head, num_ids),
            layers=tuple(layer() for layer in self._layers),
            norm=self._norm,
            head=head,
            parameters=sum(torch.Size(place.shape).numel() for place in self.places.values()),
        )

    def _allocate(self, shared_table: str | None) -> None:
        spec, num_valid_ids = self._spec, self._num_valid_ids
        self._layers = [self._layer(f"model.layers.{i}") for i in range(spec.num_layers)]
        self._norm = self._tensor("model.norm.weight", spec.hidden_size)
        table = (spec.vocab_size, spec.hidden_size)
        if shared_table is None:
            self._table = self._tensor("model.embed_tokens.weight", *table)
        self._head = self._formats.head.builder(num_valid_ids, spec.hidden_size, bias=False)
        head = shared_table or "lm_head.weight"
        self._keep(head.removesuffix(".weight"), self._head)
        self.places[head] = Place(table, num_valid_ids, self._head.place_weight, self._head.memory)

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
        self.places[name] = place_of(tensor)
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
                (rows, in_features), rows, layer.place_weight, layer.memory, first
            )
            if bias:  # a vector is not worth reading in place
                self.places[f"{piece}.bias"] = Place((rows,), rows, layer.place_bias, offset=first)
            first += rows
        return layer

    def _keep(self, name: str, layer: LinearBuilder) -> None:
        self.storage |= {f"{name}.{part}": tensor for part, tensor in layer.storage.items()}


def place_of(tensor: torch.Tensor) -> Place:
    """A tensor as the place of one that is its like."""
    rows = DenseBuilder(tensor)
    return Place(tuple(tensor.shape), tensor.shape[0], rows.place_weight, rows.memory)


@dataclass(frozen=True, slots=True)
class Embedding:
    """Vectors of ids below `num_ids`: rows of `table` [num_ids, hidden_size], or of the head.

    Without a table there is no second copy of what the head is stored in.
    """

    table: torch.Tensor | None
    head: Linear
    num_ids: int

    @property
    def nbytes(self) -> int:
        """Device memory of its own."""
        return 0 if self.table is None else self.table.nbytes

    def lookup(self, ids: torch.Tensor) -> torch.Tensor:
        """Vectors [tokens, hidden_size] of int64 [tokens], freshly allocated."""
        return self.head.rows(ids) if self.table is None else self.table.index_select(0, ids)
