"""Keys under which full KV blocks are found again by a later sequence.

Owns the hash. Knows no blocks. A key stands for everything that a block's contents depend on:
the account, and every token id from the sequence's beginning to the block's end.

Keys are compared instead of token ids, so a collision would hand one prompt the keys and values
of another. 256 bits of BLAKE2b make that impossible in practice, by accident and on purpose
alike (Python's own `hash` of a tuple can be collided at will), and cost less than keeping and
comparing the ids. The account is hashed into the first key, so that no account can find, or by
its time to first token guess, what another one has asked.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from hashlib import blake2b

from sage_fed.steps import BLOCK_SIZE

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
