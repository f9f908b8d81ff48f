"""The forward pass of a dense decoder over a ragged batch.

Same arithmetic as `transformers` in fp32; in half precision norms are computed in fp32 and
rounded once. Knows nothing of sequences, sampling or files.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812 - the name that every reader of torch knows

from sage_fed.engine.architecture import ModelSpec
from sage_fed.engine.attention import AttentionGroup
from sage_fed.engine.batch import Batch
from sage_fed.engine.kv_cache import KVCache
from sage_fed.engine.rotary import rotate_
from sage_fed.engine.weights import LayerWeights, ModelWeights


class Decoder:
    """Embedding, layers, final norm and head of one model, with its cache.

    `rotary` is `rotary_table` for every position that will be served.
    """

    def __init__(
        self, spec: ModelSpec, weights: ModelWeights, cache: KVCache, rotary: torch.Tensor
    ) -> None:
        self._weights = weights
        self._cache = cache
        self._rotary = rotary
        self._eps = spec.rms_eps
        self._hidden = (spec.hidden_size,)
        self._head_dim = spec.head_dim
        self._num_heads = spec.num_heads
        self._rotated_heads = spec.num_heads + spec.num_kv_heads
        self._query_width = spec.num_heads * spec.head_dim

    def forward(self, batch: Batch) -> torch.Tensor:
        """Run every layer, extending the cache; returns hidden states [tokens, hidden_size]."""
        if batch.stale is not None:
            self._cache.clear(batch.stale)
        cos, sin = self._rotary.index_select(0, batch.positions).unbind(1)
        x = self._weights.embedding.lookup(batch.token_ids)
        for index, layer in enumerate(self._weights.layers):
            qkv = layer.qkv(F.rms_norm(x, self._hidden, layer.input_norm, self._eps))
            heads = qkv.view(qkv.shape[0], -1, self._head_dim)
            if layer.q_norm is not None:
                self._norm_heads_(heads, layer)
            rotate_(heads[:, : self._rotated_heads], cos, sin)
            self._cache.store(index, batch.slots, qkv[:, self._query_width :])
            x = layer.out.add_to(x, self._attend(index, heads, batch.groups))
            gate_up = layer.gate_up(F.rms_norm(x, self._hidden, layer.mlp_norm, self._eps))
            gate, up = gate_up.chunk(2, dim=-1)
            x = layer.down.add_to(x, F.silu(gate).mul_(up))
        return x

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits [rows, valid ids] of hidden states [rows, hidden_size], in the model's type."""
        return self._weights.head(F.rms_norm(hidden, self._hidden, self._weights.norm, self._eps))

    def _attend(
        self, index: int, heads: torch.Tensor, groups: tuple[AttentionGroup, ...]
    ) -> torch.Tensor:
        if len(groups) == 1:
            return groups[0].attend(index, heads, self._cache)
        return torch.cat([group.attend(index, heads, self._cache) for group in groups])

    def _norm_heads_(self, heads: torch.Tensor, layer: LayerWeights) -> None:
        """Normalise each query and key head in place (Qwen3)."""
        assert layer.q_norm is not None
        assert layer.k_norm is not None
        queries = heads[:, : self._num_heads]
        keys = heads[:, self._num_heads : self._rotated_heads]
        queries.copy_(F.rms_norm(queries, (self._head_dim,), layer.q_norm, self._eps))
        keys.copy_(F.rms_norm(keys, (self._head_dim,), layer.k_norm, self._eps))
