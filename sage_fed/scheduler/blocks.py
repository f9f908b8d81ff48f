"""Who owns which KV block of one tier.

Owns the free list. Knows nothing of sequences or of what is stored in a block.
Fails only by assertion: taking more than is free, or giving back what is not owned, is our bug.
"""

from __future__ import annotations

from sage_fed.steps import BLOCK_SIZE


def blocks_for(num_tokens: int) -> int:
    """Return how many whole blocks hold `num_tokens` tokens."""
    return -(-num_tokens // BLOCK_SIZE)


class BlockPool:
    """The KV blocks 0 to `num_blocks - 1`, each free or owned exactly once."""

    def __init__(self, num_blocks: int) -> None:
        assert num_blocks > 0
        self.num_blocks = num_blocks
        # Last in, first out: the blocks in use stay few and low, and so warm in the caches.
        self._free = list(range(num_blocks - 1, -1, -1))
        self._owned: set[int] = set()

    @property
    def num_free(self) -> int:
        """Blocks that nobody owns."""
        return len(self._free)

    @property
    def num_owned(self) -> int:
        """Blocks that some sequence owns."""
        return len(self._owned)

    def take(self, count: int) -> tuple[int, ...]:
        """Take `count` blocks, which must be free."""
        assert count <= len(self._free), "admission is by worst case and cannot run out"
        taken = tuple(self._free.pop() for _ in range(count))
        self._owned.update(taken)
        return taken

    def give_back(self, blocks: tuple[int, ...]) -> None:
        """Free `blocks`, which must be owned."""
        assert self._owned.issuperset(blocks), "a block is given back once, by its owner"
        self._owned.difference_update(blocks)
        self._free.extend(reversed(blocks))
