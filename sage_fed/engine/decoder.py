"""The forward pass of a dense decoder over a ragged batch.

Same arithmetic as `transformers` in fp32; in half precision norms are computed in fp32 and
rounded once. Owns the order: a layer's arithmetic is `layer`'s, its cache `kv_cache`'s.
Knows nothing of sequences, sampling or files.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

import torch

from sage_fed.engine.architecture import ModelSpec
from sage_fed.engine.attention import AttentionGroup
from sage_fed.engine.batch import Batch
from sage_fed.engine.kv_cache import KVCache
from sage_fed.engine.layer import Body, LayerShape
from sage_fed.engine.weights import ModelWeights


class Decoder:
    """Embedding, layers, final norm and head of one model, with its cache.

    `rotary` is `rotary_table` for every position that will be served. `body` are the layers'
    functions.
    """

    def __init__(
        self,
        spec: ModelSpec,
        weights: ModelWeights,
        cache: KVCache,
        rotary: torch.Tensor,
        body: Body | None = None,
    ) -> None:
        self._weights = weights
        self._cache = cache
        self._rotary = rotary
        self._body = body or Body()
        self._shape = LayerShape.of(spec)
        self._query_width = spec.num_heads * spec.head_dim

    @property
    def num_layers(self) -> int:
        """Layers of the model; at least one."""
        return len(self._weights.layers)

    def forward(self, batch: Batch) -> torch.Tensor:
        """Run every layer, extending the cache; returns hidden states [tokens, hidden_size]."""
        # Only the last is kept: those before it are memory that the next layers need.
        (hidden,) = deque(self.layers(batch), maxlen=1)
        return hidden

    def layers(self, batch: Batch) -> Iterator[torch.Tensor]:
        """Run one layer after the other; yields the hidden states after each."""
        body, shape = self._body, self._shape
        if batch.stale is not None:
            self._cache.clear(batch.stale)
        cos, sin = self._rotary.index_select(0, batch.positions).unbind(1)
        x = self._weights.embedding.lookup(batch.token_ids)
        for index, layer in enumerate(self._weights.layers):
            qkv = body.project(layer, x, cos, sin, shape)
            self._cache.store(index, batch.slots, qkv[:, self._query_width :])
            heads = qkv.view(qkv.shape[0], -1, shape.head_dim)
            x = body.finish(layer, x, self._attend(index, heads, batch.groups), shape)
            yield x

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits [rows, valid ids] of hidden states [rows, hidden_size], in the model's type."""
        weights = self._weights
        return self._body.logits(weights.head, hidden, weights.norm, self._shape)

    def _attend(
        self, index: int, heads: torch.Tensor, groups: tuple[AttentionGroup, ...]
    ) -> torch.Tensor:
        if len(groups) == 1:
            return groups[0].attend(index, heads, self._cache)
        return torch.cat([group.attend(index, heads, self._cache) for group in groups])
