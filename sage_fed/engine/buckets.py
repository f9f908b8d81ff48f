"""Which shapes of a step are prepared beforehand, and which of them a step is padded to.

Owns the choice of sizes and the search. A bucket is a batch of sequences with so many new tokens
each and a block table of such a width; what fits none of them is run as it comes.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

from sage_fed.steps import BLOCK_SIZE, Chunk

_BATCHES = (1, 2, 4, 8, 16, 24, 32, 48, 64)
_BATCHES_BEYOND = 32
"""Above the listed ones, every multiple: a padded row costs little beside so many others."""

_NARROWEST_BLOCKS = 16


@dataclass(frozen=True, slots=True)
class Bucket:
    """`batch` sequences, `tokens` new ones each, `blocks` of context each."""

    batch: int
    tokens: int
    blocks: int


class Buckets:
    """Every bucket up to the largest step.

    `tokens` are the numbers of new tokens: 1 is decoding, more is verifying. Beyond the
    narrowest, a bucket whose tables hold more than `capacity_blocks` is left out: gathering them
    would take more memory than a layer's whole cache, for padding that a ragged step does without.
    """

    def __init__(
        self,
        *,
        max_batch: int,
        max_context_tokens: int,
        capacity_blocks: int,
        tokens: Sequence[int] = (1,),
    ) -> None:
        self._batches = _batches(max_batch)
        self._tokens = sorted(tokens)
        self._widths = _widths(-(-max_context_tokens // BLOCK_SIZE))
        self.all = tuple(
            Bucket(batch, count, width)
            for width in self._widths
            for count in self._tokens
            for batch in self._batches
            if batch * width <= capacity_blocks or width == self._widths[0]
        )
        self._prepared = frozenset(self.all)

    def fit(self, chunks: Sequence[Chunk]) -> Bucket | None:
        """The smallest bucket that holds the chunks, where there is one worth its padding."""
        longest = max(len(chunk.token_ids) for chunk in chunks)
        width = max(-(-(c.start + len(c.token_ids)) // BLOCK_SIZE) for c in chunks)
        batch = _at_least(self._batches, len(chunks))
        tokens = _at_least(self._tokens, longest)
        blocks = _at_least(self._widths, width)
        if batch is None or tokens is None or blocks is None:
            return None
        real = sum(len(chunk.token_ids) for chunk in chunks)
        if tokens > 1 and 2 * real < len(chunks) * tokens:
            return None
        bucket = Bucket(batch, tokens, blocks)
        return bucket if bucket in self._prepared else None


def _batches(largest: int) -> list[int]:
    sizes = {size for size in _BATCHES if size < largest} | {largest}
    sizes.update(range(_BATCHES[-1] + _BATCHES_BEYOND, largest, _BATCHES_BEYOND))
    return sorted(sizes)


def _widths(largest: int) -> list[int]:
    """Powers of two, so that at most half of what is gathered is padding."""
    sizes = {largest}
    width = _NARROWEST_BLOCKS
    while width < largest:
        sizes.add(width)
        width *= 2
    return sorted(sizes)


def _at_least(sizes: Sequence[int], needed: int) -> int | None:
    index = bisect_left(sizes, needed)
    return sizes[index] if index < len(sizes) else None
