"""Who is interrupted for whom: a pure choice among the running sequences.

Knows neither how a sequence is interrupted nor how it goes on. Chooses nobody in vain: either
the claimant fits without the chosen ones, or nobody is chosen.

A running sequence gives way to the head of the line
- of the same account: where the head has the higher priority and goes before it;
- of another account: where that account has waited `preempt_after_s` for a start, and would
  have been served less than the running one's even after the head had been served whole;
- of another account, at once: where places (or blocks) are short, the running one's account has
  more than its even share of them, and the head's would have no more than its own.
So nobody gains by interrupting in turn. Nothing is interrupted more than `max_preemptions` times,
but for what is above a share: that may be again each time when it has got on by as much as it cost
to start it anew, so that it ends, however often it is claimed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable

from sage_fed.device.blocks import BlockPool
from sage_fed.device.limits import TierLimits
from sage_fed.device.line import Line
from sage_fed.device.sequence import Sequence
from sage_fed.device.shares import even_share


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
    shared = set(head.find(pool)) if limits.prefix_cache else set()
    missing = limits.blocks_to_start(head) - len(shared)
    spare = pool.num_spare(shared)
    places = limits.max_batch - len(running)
    if places > 0 and missing <= spare:
        return []
    place_share = even_share(limits.max_batch, line.num_accounts)
    block_share = even_share(limits.num_blocks, line.num_accounts)
    held = Counter(seq.spec.account for seq in running)
    owned: Counter[str] = Counter()
    for seq in running:
        owned[seq.spec.account] += len(seq.blocks)
    own = head.spec.account
    claims_place = held[own] < place_share
    claims_blocks = owned[own] + missing <= block_share
    chosen: list[Sequence] = []
    for seq in sorted(running, key=line.weakness, reverse=True):
        if places > 0 and missing <= spare:
            break
        account = seq.spec.account
        has_too_much = account != own and (
            (places <= 0 and claims_place and held[account] > place_share)
            or (missing > spare and claims_blocks and owned[account] > block_share)
        )
        if limits.protects(seq):
            # Else an account could make its places its own by interrupting itself.
            gives_way = has_too_much and seq.has_repaid
        else:
            gives_way = has_too_much or _yields(seq, head, line, limits, now)
        if not gives_way:
            continue
        chosen.append(seq)
        places += 1
        spare += pool.num_freed_by(block for block in seq.blocks if block not in shared)
        held[account] -= 1
        owned[account] -= len(seq.blocks)
    return chosen if places > 0 and missing <= spare else []


def weakest(running: Iterable[Sequence], line: Line, limits: TierLimits) -> Sequence:
    """Return who gives way where a running sequence, perhaps itself, finds no block."""
    unprotected = [seq for seq in running if not limits.protects(seq)]
    assert unprotected, "a protected sequence has all its blocks and never asks for one"
    return max(unprotected, key=line.weakness)


def _yields(seq: Sequence, head: Sequence, line: Line, limits: TierLimits, now: float) -> bool:
    if seq.spec.account == head.spec.account:
        return line.outranks(head, seq)
    patience_over = now - line.waits_since(head) >= limits.preempt_after_s
    return patience_over and line.lead_uatp(head, seq) > head.worst_uatp
