"""A bucket's batch as tensors that stay where they are, so that a graph can be made over them.

Owns the static inputs and the padding. Padding rows are whole: they are token 0 at position 0 of
a scratch block that belongs to no sequence, so they compute ordinary numbers, write where nobody
reads, and are cut off from the results. Knows no weights.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence

import torch
import torch.nn.functional as F  # noqa: N812 - the name that every reader of torch knows

from sage_fed.engine.attention import Heads
from sage_fed.engine.batch import Batch, add_slots, blocks_used
from sage_fed.engine.buckets import Bucket
from sage_fed.engine.kv_cache import KVCache
from sage_fed.engine.staging import pinned_like
from sage_fed.steps import BLOCK_SIZE, Chunk

_STALE_SLOTS = BLOCK_SIZE - 1
"""A sequence's newest block was entered with at least one token."""


class StaticGroup:
    """Attention of `batch` sequences with `tokens` new ones each; see `AttentionGroup`.

    Every shape follows from the bucket. Who attends to what follows from the positions, on the
    device; `prepare` works it out once a step. `tables` is int64 [batch * blocks].
    """

    def __init__(
        self,
        bucket: Bucket,
        heads: Heads,
        positions: torch.Tensor,
        tables: torch.Tensor,
        dtype: torch.dtype,
    ) -> None:
        self._bucket = bucket
        self._heads = heads
        self._positions = positions
        self._tables = tables
        self._dtype = dtype
        self._mask: torch.Tensor | None = None

    def prepare(self) -> None:
        """Make the step's mask [batch, 1, group * tokens or 1, slots]."""
        bucket = self._bucket
        slots = torch.arange(bucket.blocks * BLOCK_SIZE, device=self._positions.device)
        hidden = slots > self._positions.view(bucket.batch, bucket.tokens, 1)
        mask = torch.zeros(hidden.shape, dtype=self._dtype, device=hidden.device)
        mask = mask.masked_fill_(hidden, -math.inf)
        if bucket.tokens > 1:
            mask = mask.repeat(1, self._heads.group, 1)
        self._mask = mask[:, None]

    def release(self) -> None:
        """Forget the mask: a graph that was captured has its own."""
        self._mask = None

    def attend(self, layer: int, qkv: torch.Tensor, cache: KVCache) -> torch.Tensor:
        """Attend; see `AttentionGroup`."""
        batch, tokens, heads = self._bucket.batch, self._bucket.tokens, self._heads
        shape = (batch, tokens, heads.kv, heads.group, qkv.shape[-1])
        queries = qkv[:, : heads.query].view(shape).permute(0, 2, 3, 1, 4)
        keys, values = cache.gather(layer, self._tables, batch)
        # A KV head's query heads, at each of the tokens, are that head's queries.
        out = F.scaled_dot_product_attention(
            queries.reshape(batch, heads.kv, heads.group * tokens, -1),
            keys,
            values,
            attn_mask=self._mask,
        )
        out = out.view(batch, heads.kv, heads.group, tokens, -1).permute(0, 3, 1, 2, 4)
        return out.reshape(batch * tokens, -1)


class StaticBatch:
    """The inputs of one bucket in one buffer, which one copy fills."""

    def __init__(
        self,
        bucket: Bucket,
        heads: Heads,
        *,
        scratch_block: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._bucket = bucket
        self._scratch_block = scratch_block
        rows = bucket.batch * bucket.tokens
        sizes = (
            rows, rows, rows, bucket.batch * bucket.blocks, bucket.batch * _STALE_SLOTS,
            bucket.batch,
        )  # fmt: skip
        self._buffer = torch.empty(sum(sizes), dtype=torch.int64, device=device)
        token_ids, positions, slots, tables, stale, last = self._buffer.split_with_sizes(sizes)
        self.group = StaticGroup(bucket, heads, positions, tables, dtype)
        self.batch = Batch(
            token_ids=token_ids,
            positions=positions,
            slots=slots,
            stale=stale,
            groups=(self.group,),
            rows=last if bucket.tokens > 1 else None,
            draws=(),
            drawing=(),
            pending=True,
        )
        self.fill(())

    def fill(self, chunks: Sequence[Chunk]) -> None:
        """Queue the inputs of `chunks`, and of as many padding rows as are left."""
        bucket, scratch = self._bucket, self._scratch_block
        token_ids, positions, slots = array("q"), array("q"), array("q")
        tables, stale, last = array("q"), array("q"), array("q")
        for chunk in chunks:
            count = len(chunk.token_ids)
            padding = bucket.tokens - count
            last.append(len(token_ids) + count - 1)
            token_ids.extend((*chunk.token_ids, *(0,) * padding))
            positions.extend((*range(chunk.start, chunk.start + count), *(0,) * padding))
            own: list[int] = []
            behind: list[int] = []
            add_slots(chunk, own, behind)
            slots.extend((*own, *(scratch * BLOCK_SIZE,) * padding))
            stale.extend(behind)
            used = chunk.blocks[: blocks_used(chunk)]
            # Padded with the sequence's own first block: what strangers left in others must
            # not be read, not even to be masked.
            tables.extend((*used, *used[:1] * (bucket.blocks - len(used))))
        empty = bucket.batch - len(chunks)
        last.extend(range(len(token_ids), len(token_ids) + empty * bucket.tokens, bucket.tokens))
        token_ids.extend((0,) * (empty * bucket.tokens))
        positions.extend((0,) * (empty * bucket.tokens))
        slots.extend((scratch * BLOCK_SIZE,) * (empty * bucket.tokens))
        tables.extend((scratch,) * (empty * bucket.blocks))
        stale.extend((scratch * BLOCK_SIZE,) * (bucket.batch * _STALE_SLOTS - len(stale)))
        for more in (positions, slots, tables, stale, last):
            token_ids.extend(more)
        packed = torch.frombuffer(token_ids, dtype=torch.int64)
        if self._buffer.is_cuda:
            packed = pinned_like(packed).copy_(packed)
        self._buffer.copy_(packed, non_blocking=True)
