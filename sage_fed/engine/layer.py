"""A decoder layer on both sides of its attention, as pure functions of tensors.

Owns the arithmetic between the cache and the cache: norms, projections, rotation, activation,
residuals. Nothing here changes what it was given, so all of it can be compiled: then what lies
between two products is one kernel, not five. Layers of one model have equal shapes and share
the compiled code.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F  # noqa: N812 - the name that every reader of torch knows

from sage_fed.engine.architecture import ModelSpec
from sage_fed.engine.linear import Linear
from sage_fed.engine.rotary import rotate_
from sage_fed.engine.weights import LayerWeights


@dataclass(frozen=True, slots=True)
class LayerShape:
    """What a layer's arithmetic has to know besides its weights.

    Queries come first, then keys (rotated with them), then values.
    """

    eps: float
    head_dim: int
    num_heads: int
    rotated_heads: int

    @classmethod
    def of(cls, spec: ModelSpec) -> LayerShape:
        """That of one model."""
        return cls(spec.rms_eps, spec.head_dim, spec.num_heads, spec.num_heads + spec.num_kv_heads)


def project(
    layer: LayerWeights, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, shape: LayerShape
) -> torch.Tensor:
    """Queries, keys and values of hidden states [tokens, hidden_size], rotated, side by side."""
    qkv = layer.qkv(F.rms_norm(x, x.shape[-1:], layer.input_norm, shape.eps))
    heads = qkv.view(qkv.shape[0], -1, shape.head_dim)
    if layer.q_norm is not None:
        _norm_heads_(heads, layer, shape)
    rotate_(heads[:, : shape.rotated_heads], cos, sin)
    return qkv


def finish(
    layer: LayerWeights, x: torch.Tensor, attended: torch.Tensor, shape: LayerShape
) -> torch.Tensor:
    """The layer's hidden states, from those before it and what its attention found."""
    x = layer.out.add_to(x, attended)
    gate_up = layer.gate_up(F.rms_norm(x, x.shape[-1:], layer.mlp_norm, shape.eps))
    gate, up = gate_up.chunk(2, dim=-1)
    return layer.down.add_to(x, F.silu(gate).mul_(up))


def logits(head: Linear, x: torch.Tensor, norm: torch.Tensor, shape: LayerShape) -> torch.Tensor:
    """Logits [rows, ids] of the last layer's hidden states."""
    return head(F.rms_norm(x, x.shape[-1:], norm, shape.eps))


@dataclass(frozen=True, slots=True)
class Body:
    """The three functions, as they are or compiled."""

    project: Callable[..., torch.Tensor] = field(default=project)
    finish: Callable[..., torch.Tensor] = field(default=finish)
    logits: Callable[..., torch.Tensor] = field(default=logits)


def _norm_heads_(heads: torch.Tensor, layer: LayerWeights, shape: LayerShape) -> None:
    """Normalise each query and key head in place (Qwen3)."""
    assert layer.q_norm is not None
    assert layer.k_norm is not None
    queries = heads[:, : shape.num_heads]
    keys = heads[:, shape.num_heads : shape.rotated_heads]
    queries.copy_(F.rms_norm(queries, (shape.head_dim,), layer.q_norm, shape.eps))
    keys.copy_(F.rms_norm(keys, (shape.head_dim,), layer.k_norm, shape.eps))
