"""The paged KV cache of one model, and attention of a ragged batch over it.

Owns the layout of the pool, which is claimed once, at load, as so many bytes: per layer
[num_blocks * BLOCK_SIZE, 2 * kv_heads * head_dim], a token's keys and then its values, so that one
scatter stores a step's tokens and one gather reads a context. A group is a run of the batch's rows
that one kernel call can serve; what does not change from layer to layer (block tables, masks) is
prepared once a step. The scheduler decides who owns which block.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
import torch.nn.functional as F  # noqa: N812 - the name that every reader of torch knows

from sage_fed.engine.configuration import ModelSpec
from sage_fed.engine.machine import allocate
from sage_fed.errors import ModelLoadError
from sage_fed.steps import BLOCK_SIZE


def bytes_per_token(spec: ModelSpec, dtype: torch.dtype) -> int:
    """Bytes that one token's keys and values take over all layers."""
    return spec.num_layers * spec.kv_width * dtype.itemsize


def bytes_per_block(spec: ModelSpec, dtype: torch.dtype) -> int:
    """Bytes that one block takes over all layers."""
    return BLOCK_SIZE * bytes_per_token(spec, dtype)


def blocks_in_budget(
    spec: ModelSpec, dtype: torch.dtype, budget_bytes: int, max_context_tokens: int
) -> int:
    """Blocks that fit in `budget_bytes`.

    Raises:
        ModelLoadError: the budget does not hold one context; the text says what would.
    """
    block_bytes = bytes_per_block(spec, dtype)
    num_blocks = budget_bytes // block_bytes
    needed = -(-max_context_tokens // BLOCK_SIZE)
    if num_blocks < needed:
        raise ModelLoadError(
            f"a KV budget of {budget_bytes} bytes holds {num_blocks * BLOCK_SIZE} tokens, less "
            f"than one context of {max_context_tokens}; {needed * block_bytes} bytes would do, "
            "or a smaller max_context_tokens"
        )
    return num_blocks


class KVCache:
    """Keys and values of every sequence of one model.

    Raises:
        ModelLoadError: the device has no memory for it.
    """

    def __init__(
        self, spec: ModelSpec, num_blocks: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        slots = num_blocks * BLOCK_SIZE
        nbytes = num_blocks * bytes_per_block(spec, dtype)
        try:
            # Written, not only reserved: a page that the kernel has yet to find is a promise
            # that another process may break, and a process that seems to grow for hours.
            self._pool = allocate((spec.num_layers, slots, spec.kv_width), dtype, device).zero_()
        except (
            RuntimeError,
            MemoryError,
        ) as error:  # torch's and the host's out-of-memory errors on every device
            raise ModelLoadError(
                f"{device} has no memory for a KV pool of {nbytes} bytes"
            ) from error
        self._by_slot = self._pool.unbind(0)
        self._by_block = self._pool.view(spec.num_layers, num_blocks, -1).unbind(0)
        self._split = (2, spec.num_kv_heads, spec.head_dim)

    @property
    def nbytes(self) -> int:
        """Device memory of the pool."""
        return self._pool.nbytes

    @property
    def pool(self) -> torch.Tensor:
        """The whole pool [layers, slots, 2 * kv_heads * head_dim]."""
        return self._pool

    def clear(self, slots: torch.Tensor) -> None:
        """Zero `slots` in every layer.

        What a block's last owner left behind is masked, but masking does not survive a NaN:
        0 * NaN is NaN, and one sequence's overflow would spread to strangers.
        """
        self._pool.index_fill_(1, slots, 0.0)

    def store(self, layer: int, slots: torch.Tensor, kv: torch.Tensor) -> None:
        """Write `kv` [tokens, 2 * kv_heads * head_dim] to `slots` [tokens]."""
        self._by_slot[layer].index_copy_(0, slots, kv)

    def gather(
        self, layer: int, blocks: torch.Tensor, sequences: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values, each [sequences, kv_heads, tokens, head_dim], of whole blocks.

        `blocks` is [sequences * blocks_each]. The results are strided views of one copy.
        """
        kv = self._by_block[layer].index_select(0, blocks).view(sequences, -1, *self._split)
        keys, values = kv.transpose(1, 3).unbind(2)
        return keys, values


class AttentionGroup(Protocol):
    """Rows of the batch that attend together."""

    def attend(self, layer: int, qkv: torch.Tensor, cache: KVCache) -> torch.Tensor:
        """Attend for the group's rows of `qkv` [tokens, heads + 2 * kv_heads, head_dim].

        Queries and keys are rotated already. Returns [rows, heads * head_dim].
        """


class Heads:
    """How the fused projection splits into queries, keys and values."""

    __slots__ = ("group", "kv", "query")

    def __init__(self, num_heads: int, num_kv_heads: int) -> None:
        self.query = num_heads
        self.kv = num_kv_heads
        self.group = num_heads // num_kv_heads


class DecodeGroup:
    """Sequences that add one token each.

    `blocks` is int64 [sequences * blocks_each], every sequence's table padded to the longest;
    `lengths` int64 [sequences] counts the tokens to attend to, the new one included.
    Query heads that share a KV head are treated as that head's queries, so nothing is repeated.
    `uniform_length` is the length where all are equal: then there is nothing to mask. Without
    it every shape follows from `sequences` and `blocks_each` alone, as a CUDA graph needs.
    """

    def __init__(
        self,
        rows: slice,
        heads: Heads,
        blocks: torch.Tensor,
        lengths: torch.Tensor,
        *,
        context_slots: int,
        uniform_length: int | None,
        dtype: torch.dtype,
    ) -> None:
        self._rows = rows
        self._heads = heads
        self._blocks = blocks
        self._sequences = rows.stop - rows.start
        self._length = uniform_length or context_slots
        self._mask: torch.Tensor | None = None
        if uniform_length is None:
            positions = torch.arange(context_slots, device=blocks.device)
            hidden = positions >= lengths[:, None]
            mask = torch.zeros(hidden.shape, dtype=dtype, device=blocks.device)
            self._mask = mask.masked_fill_(hidden, -math.inf)[:, None, None]

    def attend(self, layer: int, qkv: torch.Tensor, cache: KVCache) -> torch.Tensor:
        """Attend; see `AttentionGroup`."""
        heads = self._heads
        queries = qkv[self._rows, : heads.query].view(self._sequences, heads.kv, heads.group, -1)
        keys, values = cache.gather(layer, self._blocks, self._sequences)
        if self._mask is None:
            keys, values = keys[:, :, : self._length], values[:, :, : self._length]
        out = F.scaled_dot_product_attention(queries, keys, values, attn_mask=self._mask)
        return out.reshape(self._sequences, -1)


class PromptGroup:
    """The first tokens of one sequence: they attend to themselves only, cache unread."""

    def __init__(self, rows: slice, heads: Heads) -> None:
        self._rows = rows
        self._heads = heads

    def attend(self, layer: int, qkv: torch.Tensor, cache: KVCache) -> torch.Tensor:  # noqa: ARG002
        """Attend; see `AttentionGroup`."""
        heads = self._heads
        own = qkv[self._rows].transpose(0, 1)
        queries, keys, values = own.split_with_sizes((heads.query, heads.kv, heads.kv))
        out = F.scaled_dot_product_attention(
            queries[None], keys[None], values[None], is_causal=True, enable_gqa=heads.group > 1
        )
        return out[0].transpose(0, 1).flatten(1)


class ContextGroup:
    """Later tokens of one sequence: they attend to its cached prefix and to themselves.

    `blocks` int64 [blocks] covers all of the sequence up to its newest token.
    """

    def __init__(
        self, rows: slice, heads: Heads, blocks: torch.Tensor, start: int, dtype: torch.dtype
    ) -> None:
        self._rows = rows
        self._heads = heads
        self._blocks = blocks
        tokens = rows.stop - rows.start
        self._length = start + tokens
        mask = torch.full((tokens, self._length), -math.inf, dtype=dtype, device=blocks.device)
        self._mask = mask.triu_(start + 1)

    def attend(self, layer: int, qkv: torch.Tensor, cache: KVCache) -> torch.Tensor:
        """Attend; see `AttentionGroup`."""
        heads = self._heads
        queries = qkv[self._rows, : heads.query].transpose(0, 1)[None]
        keys, values = cache.gather(layer, self._blocks, 1)
        keys, values = keys[:, :, : self._length], values[:, :, : self._length]
        share = heads.group > 1
        if share and qkv.is_cuda:
            # With a mask and shared heads CUDA falls back to the kernel that materialises
            # tokens x context scores; repeating the heads costs far less.
            keys = keys.repeat_interleave(heads.group, dim=1)
            values = values.repeat_interleave(heads.group, dim=1)
            share = False
        out = F.scaled_dot_product_attention(
            queries, keys, values, attn_mask=self._mask, enable_gqa=share
        )
        return out[0].transpose(0, 1).flatten(1)
