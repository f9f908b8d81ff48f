"""Who is interrupted for whom: a pure choice among the running sequences.

Knows neither how a sequence is interrupted nor how it goes on. Chooses nobody in vain: either
the claimant fits without the chosen ones, or nobody is chosen.

A running sequence gives way to the head of the line
- of the same account: where the head has the higher priority and goes before it;
- of another account: where that account has waited `preempt_after_s` for a start, and would
  have been served less than the running one's even after the head had been served whole.
So nobody gains by interrupting in turn, and nothing is interrupted more than `max_preemptions`
times, however often it is claimed.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

from sage_fed.scheduler.blocks import BlockPool
from sage_fed.scheduler.limits import TierLimits
from sage_fed.scheduler.line import Line
from sage_fed.scheduler.sequence import Sequence


def make_way(
    head: Sequence,
    running: Collection[Sequence],
    *,
    line: Line,
    pool: BlockPool,
    limits: TierLimits,
    now: float,
) -> list[Sequence]:
    """Return the fewest of the weakest that have to give way to a head that does not fit."""
    yielding = [seq for seq in running if _yields(seq, head, line, limits, now)]
    if not yielding:
        return []
    shared = set(head.find(pool)) if limits.prefix_cache else set()
    missing = limits.blocks_to_start(head) - len(shared)
    spare = pool.num_spare(shared)
    places = limits.max_batch - len(running)
    chosen: list[Sequence] = []
    for seq in sorted(yielding, key=line.weakness, reverse=True):
        if places > 0 and missing <= spare:
            break
        chosen.append(seq)
        places += 1
        spare += pool.num_freed_by(block for block in seq.blocks if block not in shared)
    return chosen if places > 0 and missing <= spare else []


def weakest(running: Iterable[Sequence], line: Line, limits: TierLimits) -> Sequence:
    """Return who gives way where a running sequence, perhaps itself, finds no block."""
    unprotected = [seq for seq in running if not limits.protects(seq)]
    assert unprotected, "a protected sequence has all its blocks and never asks for one"
    return max(unprotected, key=line.weakness)


def _yields(seq: Sequence, head: Sequence, line: Line, limits: TierLimits, now: float) -> bool:
    if limits.protects(seq):
        return False
    if seq.spec.account == head.spec.account:
        return line.outranks(head, seq)
    patience_over = now - line.waits_since(head) >= limits.preempt_after_s
    return patience_over and line.lead_uatp(head, seq) > head.worst_uatp
