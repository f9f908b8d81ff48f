"""Grows the strategic model out of the trained tactical one, computing the same function at first.

Owns: where each of the small model's weights goes in the large one, and what the new ones start as.
Does not know: data and optimisers.

Why: what costs a small model most is finding how to look something up, count or carry at all. The
tactical model finds it at a tenth of the price per token; the strategic one starts from there and
spends its training on what the small one has no room for. (Chen, Goodfellow and Shlens, "Net2Net",
2016, is the idea; this is the simplest exact form of it for RMS-normed residual layers.)

How it stays exact: the small model's dimensions come first in the residual stream. Nothing writes
to the new dimensions, into or out of new heads, neurons and layers, so they are zero and add
nothing; what reads them is random, so the gradient reaches every one of them within two steps.
RMS norms divide by the wider root mean square, which their weights undo.
"""

from __future__ import annotations

import torch
from network import HEAD_DIM, Layer, PairModel, Shape
from torch import Tensor


def _rows_of_heads(small: Shape, large: Shape) -> Tensor:
    """Where the small model's query, key and value rows stand in the large one's fused matrix.

    A query head must stay in a group that reads its own key/value head.
    """
    small_group = small.num_heads // small.num_kv_heads
    large_group = large.num_heads // large.num_kv_heads
    assert small_group <= large_group, "a small group of query heads must fit into a large one"
    assert small.num_kv_heads <= large.num_kv_heads
    heads = [
        head // small_group * large_group + head % small_group for head in range(small.num_heads)
    ]
    heads += [large.num_heads + head for head in range(small.num_kv_heads)]
    heads += [large.num_heads + large.num_kv_heads + head for head in range(small.num_kv_heads)]
    return torch.cat([torch.arange(HEAD_DIM) + HEAD_DIM * head for head in heads])


def _grow_layer(small: Layer | None, large: Layer, norm_scale: float) -> None:
    """Fill a fresh layer so that it computes what `small` does, or nothing where that is None."""
    large.out.zero_()
    large.down.zero_()
    if small is None:
        return
    width = small.shape.hidden_size
    rows = _rows_of_heads(small.shape, large.shape)
    queries = rows[: small.shape.num_heads * HEAD_DIM]
    narrow, wide = small.shape.intermediate_size, large.shape.intermediate_size
    neurons = torch.cat([torch.arange(narrow), torch.arange(narrow) + wide])
    large.norm_in[:width] = small.norm_in * norm_scale
    large.norm_mid[:width] = small.norm_mid * norm_scale
    large.qkv[rows, :width] = small.qkv
    large.qkv_bias[rows] = small.qkv_bias
    large.out[:width, queries] = small.out
    large.gate_up[neurons, :width] = small.gate_up
    large.down[:width, :narrow] = small.down


@torch.no_grad()
def grow(small: PairModel, shape: Shape) -> PairModel:
    """A model of the larger `shape` with the logits of `small`, up to rounding.

    Padded ids that only the larger vocabulary has get the logits of the small one's last.
    """
    large = PairModel(shape)
    assert large.head is not None, "the large model's head is its own"
    width, vocab_size = small.shape.hidden_size, small.shape.vocab_size
    norm_scale = (width / shape.hidden_size) ** 0.5
    every = shape.num_layers // small.shape.num_layers
    for index, layer in enumerate(large.layers):
        assert isinstance(layer, Layer)
        source = small.layers[index // every] if index % every == 0 else None
        assert source is None or isinstance(source, Layer)
        _grow_layer(source, layer, norm_scale)
    large.embedding.zero_()
    large.embedding[:vocab_size, :width] = small.embedding
    head = small.embedding if small.head is None else small.head
    large.head[:vocab_size, :width] = head
    large.head[vocab_size:, :width] = head[-1]
    large.norm[:width] = small.norm * norm_scale
    return large
