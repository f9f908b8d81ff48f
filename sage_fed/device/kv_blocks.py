"""Who owns which KV block of one tier, and which full blocks can be found again.

Owns the free list, the owners' count of each block, and the published blocks by key. Knows
nothing of sequences or of what is stored in a block. Fails only by assertion: taking more than
is available, or giving back what is not owned, is our bug.

A block that has no owner but is published is *kept*: it counts as available, because the
one that was left alone longest is forgotten when the free list is short.

A key (`BlockKeys`) stands for everything that a block's contents depend on: the account, and every
token id from the sequence's beginning to the block's end.

Keys are compared instead of token ids, so a collision would hand one prompt the keys and values
of another. 256 bits of BLAKE2b make that impossible in practice, by accident and on purpose
alike (Python's own `hash` of a tuple can be collided at will), and cost less than keeping and
comparing the ids. The account is hashed into the first key, so that no account can find, or by
its time to first token guess, what another one has asked.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from hashlib import blake2b

from sage_fed.steps import BLOCK_SIZE


def blocks_for(num_tokens: int) -> int:
    """Return how many whole blocks hold `num_tokens` tokens."""
    return -(-num_tokens // BLOCK_SIZE)


class BlockPool:
    """The KV blocks 0 to `num_blocks - 1`, each free, kept, or owned by one sequence or more."""

    def __init__(self, num_blocks: int) -> None:
        assert num_blocks > 0
        self.num_blocks = num_blocks
        # Last in, first out: the blocks in use stay few and low, and so warm in the caches.
        self._free = list(range(num_blocks - 1, -1, -1))
        self._owners: dict[int, int] = {}
        # Insertion order is the order of forgetting.
        self._kept: dict[int, None] = {}
        self._by_key: dict[bytes, int] = {}
        self._keys: dict[int, bytes] = {}

    @property
    def num_available(self) -> int:
        """Blocks that can be taken: free ones, and kept ones at the price of forgetting them."""
        return len(self._free) + len(self._kept)

    @property
    def num_owned(self) -> int:
        """Blocks that some sequence owns."""
        return len(self._owners)

    @property
    def num_kept(self) -> int:
        """Blocks without an owner that can be found again."""
        return len(self._kept)

    def find(self, keys: Iterable[bytes]) -> tuple[int, ...]:
        """Return the blocks published under `keys`, up to the first key without one."""
        found: list[int] = []
        for key in keys:
            block = self._by_key.get(key)
            if block is None:
                break
            found.append(block)
        return tuple(found)

    def num_spare(self, shared: Iterable[int]) -> int:
        """Return how many blocks can be taken besides sharing `shared`, some of them kept ones."""
        return self.num_available - sum(block in self._kept for block in shared)

    def fits(self, count: int, shared: Iterable[int] = ()) -> bool:
        """Whether `count` blocks can be taken besides sharing `shared`."""
        return count <= len(self._free) or count <= self.num_spare(shared)

    def share(self, blocks: Iterable[int]) -> None:
        """Own published `blocks` together with their other owners."""
        for block in blocks:
            assert block in self._keys, "only what was published can be shared"
            self._kept.pop(block, None)
            self._owners[block] = self._owners.get(block, 0) + 1

    def take(self, count: int) -> tuple[int, ...]:
        """Take `count` blocks for one owner; what was kept longest is forgotten if it must be."""
        assert count <= self.num_available, "admission is by what is available"
        taken = []
        for _ in range(count):
            block = self._free.pop() if self._free else self._forget_oldest()
            self._owners[block] = 1
            taken.append(block)
        return tuple(taken)

    def publish(self, block: int, key: bytes) -> None:
        """Let an owned, full block be found by `key` from now on; the first of a key stays it.

        Its owners must not write to it any more.
        """
        assert block in self._owners, "only its owner publishes a block"
        if key not in self._by_key and block not in self._keys:
            self._by_key[key] = block
            self._keys[block] = key

    def withdraw(self, blocks: Iterable[int]) -> None:
        """Let owned blocks be found no more: what is in them cannot be trusted."""
        for block in blocks:
            assert block in self._owners, "only its owner withdraws a block"
            if key := self._keys.pop(block, None):
                del self._by_key[key]

    def give_back(self, blocks: Sequence[int]) -> None:
        """End one owner's claim to `blocks`; published ones are kept once they have no owner.

        Of one sequence's kept blocks the last is forgotten first: without those before it, it
        could not be found.
        """
        for block in reversed(blocks):
            owners = self._owners.get(block, 0)
            assert owners, "a block is given back once by each owner"
            if owners > 1:
                self._owners[block] = owners - 1
                continue
            del self._owners[block]
            if block in self._keys:
                self._kept[block] = None
            else:
                self._free.append(block)

    def num_freed_by(self, blocks: Iterable[int]) -> int:
        """Return how many of an owner's `blocks` would be available without it."""
        return sum(self._owners[block] == 1 for block in blocks)

    def _forget_oldest(self) -> int:
        block = next(iter(self._kept))
        del self._kept[block]
        del self._by_key[self._keys.pop(block)]
        return block


_KEY_BYTES = 32


class BlockKeys:
    """The keys of one sequence's blocks in order, made when asked for and then remembered."""

    def __init__(self, account: str) -> None:
        self._chain = [blake2b(account.encode(), digest_size=_KEY_BYTES).digest()]

    def of(self, index: int, token_ids: Sequence[int]) -> bytes:
        """Return the key of block `index` of a sequence that begins with `token_ids`."""
        while len(self._chain) <= index + 1:
            start = (len(self._chain) - 1) * BLOCK_SIZE
            ids = token_ids[start : start + BLOCK_SIZE]
            assert len(ids) == BLOCK_SIZE, "only a full block has a key"
            parent = self._chain[-1]
            self._chain.append(blake2b(parent + array("q", ids), digest_size=_KEY_BYTES).digest())
        return self._chain[index + 1]
