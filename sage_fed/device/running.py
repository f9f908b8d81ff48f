"""The running sequences of one tier and the blocks they run in: who joins, gives way, leaves.

Owns the running set. Knows no steps beyond whether one is in flight: nobody is interrupted while
the device may still write to their blocks.

Who starts next is `line`'s decision, who is interrupted `preemption`'s. An interrupted sequence
loses its blocks, waits with its rank, and later feeds its prompt and output again (what the prefix
cache still has of them is not even computed); its next token is drawn with the same seed and
index, so its reader notices a pause and nothing else.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection

from sage_fed.device.blocks import BlockPool
from sage_fed.device.limits import TierLimits
from sage_fed.device.line import Line
from sage_fed.device.preemption import make_way, weakest
from sage_fed.device.sequence import Sequence
from sage_fed.device.shares import PlaceShares


class Running:
    """Sequences by id, in the order in which they started; they come from `line`."""

    def __init__(self, line: Line, pool: BlockPool, limits: TierLimits) -> None:
        self.by_id: dict[int, Sequence] = {}
        self._line = line
        self._pool = pool
        self._limits = limits
        self._places = PlaceShares(limits.max_batch)
        self._claimant: int | None = None
        """Whom others have been interrupted for: it starts next, whoever was served less."""

    def num_by_account(self) -> Counter[str]:
        """Count the running sequences of each account."""
        return Counter(seq.spec.account for seq in self.by_id.values())

    def make_room(self, now: float, *, in_flight: bool) -> int | None:
        """Interrupt whoever has to be, and return how many.

        None, and nobody is interrupted, where a step in flight has to land before that.
        """
        num_interrupted = self._grow(now, in_flight) if self._limits.kv_overcommit > 1.0 else 0
        head = self._line.head(now)
        if num_interrupted is None or head is None:
            return num_interrupted
        victims = make_way(
            head,
            self.by_id.values(),
            line=self._line,
            pool=self._pool,
            limits=self._limits,
            now=now,
        )
        if victims and in_flight:
            return None
        for seq in victims:
            self._interrupt(seq, now)
        if victims:
            self._claimant = head.spec.seq_id
        return num_interrupted + len(victims)

    def start_head(self, now: float, accounts: Collection[str] | None = None) -> Sequence | None:
        """Start the first in line, if there is a place and there are blocks for it.

        Accounts whose places are kept for others are passed over. With `accounts` the first is
        not started where it is of another account that runs already: the step is not for it.
        """
        free = self._limits.max_batch - len(self.by_id)
        if free <= 0 or not self._line:
            return None
        held = self.num_by_account()
        seq = None if self._claimant is None else self._line.find(self._claimant)
        if seq is None:
            self._claimant = None
            served = self._line.served
            kept_from = [a for a in held if free <= self._places.kept_from(a, held, served, now)]
            seq = self._line.head(now, kept_from)
            if seq is None:
                return None
            other = accounts is not None and seq.spec.account not in accounts
            if other and held[seq.spec.account]:
                return None
        shared = seq.find(self._pool) if self._limits.prefix_cache else ()
        num_own = self._limits.blocks_to_start(seq) - len(shared)
        if not self._pool.fits(num_own, shared):
            return None
        self._claimant = None
        self._line.start(seq, now)
        self._pool.share(shared)
        seq.begin(shared, self._pool.take(num_own), now)
        self.by_id[seq.spec.seq_id] = seq
        self._places.started(seq.spec.account, held[seq.spec.account] + 1, now)
        return seq

    def leave(self, seq: Sequence, now: float) -> None:
        """Free the blocks of a sequence that ends; one that only waited has none."""
        if self.by_id.pop(seq.spec.seq_id, None):
            self._pool.give_back(seq.blocks)
            assert seq.started_s is not None, "it runs"
            self._places.left(seq.spec.account, now - seq.started_s, now)

    def _grow(self, now: float, in_flight: bool) -> int | None:
        """Give each sequence the block of its next token, where it has none.

        Returns how many were interrupted for that; None where it waits for the step in flight.
        """
        num_interrupted = 0
        for seq in tuple(self.by_id.values()):
            while seq.spec.seq_id in self.by_id and seq.blocks_missing > 0:
                if self._pool.num_available:
                    seq.blocks += self._pool.take(1)
                elif in_flight:
                    return None
                else:
                    self._interrupt(weakest(self.by_id.values(), self._line, self._limits), now)
                    num_interrupted += 1
        return num_interrupted

    def _interrupt(self, seq: Sequence, now: float) -> None:
        del self.by_id[seq.spec.seq_id]
        self._pool.give_back(seq.interrupt())
        self._line.put_back(seq, now)
