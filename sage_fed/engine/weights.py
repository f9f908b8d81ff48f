"""A decoder's weights on the device, and where each tensor of a checkpoint belongs in them.

Query, key and value projections are one layer, gate and up projections another: a step of a
small batch is bound by launches and memory traffic, so fewer and larger products are faster.
Knows tensor names; reads no files (`checkpoint` does). Allocates everything when constructed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from sage_fed.engine.architecture import ModelSpec
from sage_fed.engine.linear import DenseLinear, Linear, LinearBuilder, LinearFormat


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
    """The whole decoder; `embedding` is [vocab_size, hidden_size].

    `head` yields logits of the ids that the tokenizer knows only: the padding above them in
    the vocabulary is neither computed nor ever drawn.
    """

    embedding: torch.Tensor
    layers: tuple[LayerWeights, ...]
    norm: torch.Tensor
    head: Linear
    tied: bool
    parameters: int

    @property
    def nbytes(self) -> int:
        """Device memory of all weights; a tied head is the embedding's."""
        return self.step_nbytes + (0 if self.tied else self.embedding.nbytes)

    @property
    def step_nbytes(self) -> int:
        """Bytes that one step reads of the weights: of the embedding it looks up only rows."""
        head = self.embedding.nbytes if self.tied else self.head.nbytes
        return head + self.norm.nbytes + sum(layer.nbytes for layer in self.layers)


@dataclass(frozen=True, slots=True)
class Place:
    """Where one checkpoint tensor goes: the shape it must have, and what takes it."""

    shape: tuple[int, ...]
    put: Callable[[torch.Tensor], object]


class WeightsBuilder:
    """Allocates a decoder and lists the `places` of its tensors by checkpoint name."""

    def __init__(
        self,
        spec: ModelSpec,
        linears: LinearFormat,
        *,
        num_valid_ids: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._spec = spec
        self._linears = linears
        self._dtype = dtype
        self._device = device
        self.places: dict[str, Place] = {}
        self._embedding = self._tensor(
            "model.embed_tokens.weight", spec.vocab_size, spec.hidden_size
        )
        self._layers = [self._layer(f"model.layers.{i}") for i in range(spec.num_layers)]
        self._norm = self._tensor("model.norm.weight", spec.hidden_size)
        self._head: Callable[[], Linear]
        if spec.tied_embeddings:
            self._head = partial(DenseLinear, self._embedding[:num_valid_ids], None)
        else:
            head = linears.builder(num_valid_ids, spec.hidden_size, bias=False)
            self.places["lm_head.weight"] = Place(
                (spec.vocab_size, spec.hidden_size),
                lambda rows: head.place_weight(0, rows[:num_valid_ids]),
            )
            self._head = head.build

    def build(self) -> ModelWeights:
        """The decoder, once every place has been filled."""
        return ModelWeights(
            embedding=self._embedding,
            layers=tuple(layer() for layer in self._layers),
            norm=self._norm,
            head=self._head(),
            tied=self._spec.tied_embeddings,
            parameters=sum(torch.Size(place.shape).numel() for place in self.places.values()),
        )

    def _layer(self, name: str) -> Callable[[], LayerWeights]:
        spec, hidden = self._spec, self._spec.hidden_size
        q_rows, kv_rows = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
        attention, mlp = f"{name}.self_attn", f"{name}.mlp"
        qkv = self._fused(
            hidden,
            {
                f"{attention}.q_proj": q_rows,
                f"{attention}.k_proj": kv_rows,
                f"{attention}.v_proj": kv_rows,
            },
            bias=spec.qkv_bias,
        )
        out = self._fused(q_rows, {f"{attention}.o_proj": hidden}, bias=spec.out_bias)
        gate_up = self._fused(
            hidden,
            {f"{mlp}.{part}_proj": spec.intermediate_size for part in ("gate", "up")},
            bias=spec.mlp_bias,
        )
        down = self._fused(spec.intermediate_size, {f"{mlp}.down_proj": hidden}, bias=spec.mlp_bias)
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
        tensor = torch.empty(shape, dtype=self._dtype, device=self._device)
        self.places[name] = Place(shape, tensor.copy_)
        return tensor

    def _fused(self, in_features: int, pieces: dict[str, int], *, bias: bool) -> LinearBuilder:
        """One layer from the rows of several checkpoint layers, in the order of `pieces`."""
        layer = self._linears.builder(sum(pieces.values()), in_features, bias=bias)
        first = 0
        for name, rows in pieces.items():
            self.places[f"{name}.weight"] = Place(
                (rows, in_features), partial(layer.place_weight, first)
            )
            if bias:
                self.places[f"{name}.bias"] = Place((rows,), partial(layer.place_bias, first))
            first += rows
        return layer
