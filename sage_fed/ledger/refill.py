"""How much an account has refilled: integer arithmetic on a high-water mark.

Owns the formula. Pure: no clock, no SQL, no failure.
`rate` uATP/s over `elapsed` ns gives `rate * elapsed` billionths of a uATP; whole uATP are
credited and the rest is carried, so that refilling often and refilling rarely give the same sum.
"""

from __future__ import annotations

from dataclasses import dataclass

from sage_fed.ledger.clock import Now
from sage_fed.ledger.words import NS_PER_S

NS_PER_MS = 1_000_000


@dataclass(frozen=True, slots=True)
class Mark:
    """Until when refill has been counted; `remainder` is in 1e-9 uATP, below 1e9."""

    epoch: str
    ns: int
    remainder: int


@dataclass(frozen=True, slots=True)
class Accrual:
    """What came in since a mark, and the mark that follows.

    `capped`: the account was full at some time since, so what came later is lost.
    """

    amount_uatp: int
    mark: Mark
    elapsed_ns: int
    capped: bool


def accrue(mark: Mark, now: Now, *, rate_uatp_per_s: int, room_uatp: int) -> Accrual:
    """Count the refill since `mark`, at most `room_uatp` (below 0 counts as 0).

    Within an epoch the mark never goes back, so a clock that does cannot pay twice.
    Of another epoch nothing counts: no clock tells how long ago its mark was, and another
    machine's uptime says nothing about it.
    """
    same_epoch = mark.epoch == now.epoch
    elapsed_ns = max(0, now.ns - mark.ns) if same_epoch else 0
    next_ns = max(mark.ns, now.ns) if same_epoch else now.ns
    amount, remainder = divmod(rate_uatp_per_s * elapsed_ns + mark.remainder, NS_PER_S)
    room = max(0, room_uatp)
    capped = amount >= room
    if capped:
        amount, remainder = room, 0
    return Accrual(amount, Mark(now.epoch, next_ns, remainder), elapsed_ns, capped)


def wait_s(deficit_uatp: int, *, rate_uatp_per_s: int, remainder: int) -> float:
    """Seconds until `deficit_uatp` > 0 more have come in at a rate > 0, rounded up to 1 ms."""
    wait_ns = -(-(deficit_uatp * NS_PER_S - remainder) // rate_uatp_per_s)
    return -(-wait_ns // NS_PER_MS) / 1000
