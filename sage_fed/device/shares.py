"""What one account may cost another on a tier: places in the batch, and the length of steps.

`line` decides who starts, by what was served. That alone leaves two ways to stop others: to be
there first with as many sequences as the batch has places, and to make every step so long that
nobody else's tokens come.

Places: an account has an even share of them, `max_batch` over the accounts that are there. It may
have more while nobody asks; then what it has above its share gives way at once (`preemption`).
What another account has just used within its share is kept for its next sequence for a
while, so that short jobs in a row do not interrupt somebody each.

Steps: each account is to get a step in `k` times what one of its own would take, with `k` the
number of accounts or 2. An account that gets less is behind, and the next step has the sequences
of those that are behind only. Their own steps take at most the sum of what they take alone, so all
of them can be had; nobody starves, because who is left out falls behind. Where rows cost nearly
nothing (a GPU bound by its bandwidth) nobody is ever behind, and every step has everybody.

Knows no sequence and no clock. Cannot fail.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

KEPT_S = 2.0
"""For how long places wait for the account that has used them, at most."""

_KEPT_TIMES = 8.0
"""And that is so many times as long as they were used: enough for the round trip of a client, and
no more than a moment for one that was hardly there."""

_LEAST_SLOWDOWN = 2
"""How many times as long others may make an account's steps, however few accounts there are."""

_MAX_RUN = 64
"""Steps that somebody may be left out of in a row, at most: as many as the other tier's."""


def even_share(whole: int, num_accounts: int) -> int:
    """Return how much of it an account may claim from those that have more."""
    return max(whole // max(num_accounts, 1), 1)


@dataclass(frozen=True, slots=True)
class _Used:
    """The most places that an account has had at once lately; they are kept until `until_s`."""

    num_places: int
    until_s: float


class PlaceShares:
    """The places of a tier's batch, between accounts."""

    def __init__(self, max_batch: int) -> None:
        self._max_batch = max_batch
        self._used: dict[str, _Used] = {}

    def started(self, account: str, num_places: int, now: float) -> None:
        """Note that an account has come to run in so many places."""
        used = self._used.get(account)
        if used is None or num_places >= used.num_places or now > used.until_s:
            self._used[account] = _Used(num_places, now + KEPT_S)

    def left(self, account: str, lasted_s: float, now: float) -> None:
        """Note that an account has left a place, in which it has been for so long."""
        if (used := self._used.get(account)) is not None:
            kept_s = min(KEPT_S, _KEPT_TIMES * lasted_s)
            self._used[account] = _Used(used.num_places, now + kept_s)

    def kept_from(
        self, account: str, held: Mapping[str, int], served: Mapping[str, int], now: float
    ) -> int:
        """Return how many free places are kept for others; none from an account below its share.

        Nor for others that were served more than it. `held` are the places that each account has
        now, `served` what it was served, where that is remembered.
        """
        self._used = {a: used for a, used in self._used.items() if now <= used.until_s}
        others = self._used.keys() - {account}
        share = even_share(self._max_batch, len(others) + 1)
        if not others or held.get(account, 0) < share:
            return 0
        own = served.get(account, 0)
        return sum(
            max(min(self._used[other].num_places, share) - held.get(other, 0), 0)
            for other in others
            if served.get(other, 0) <= own
        )


class StepShares:
    """Which accounts are in the next step of a tier."""

    def __init__(self) -> None:
        self._behind_s: dict[str, float] = {}

    def next_accounts(self, present: Collection[str]) -> Collection[str] | None:
        """Return the accounts that the next step is for; None where it is for all `present`."""
        if len(present) < 2:
            return None
        behind = {a for a in present if self._behind_s.get(a, 0.0) > 0.0}
        return behind if 0 < len(behind) < len(present) else None

    def stepped(
        self, elapsed_s: float, present: Collection[str], alone_s: Mapping[str, float | None]
    ) -> None:
        """Take in a step.

        Args:
            elapsed_s: the device's time for it.
            present: the accounts that have running sequences.
            alone_s: of those that were in it, what it would have taken with theirs only; None
                where nothing is known of that, and it is taken for all of it.
        """
        slowdown = max(len(present), _LEAST_SLOWDOWN)
        behind_s = {}
        for account in present if len(present) > 1 else ():
            behind = self._behind_s.get(account, 0.0) + elapsed_s
            if account in alone_s:
                own_s = alone_s[account]
                due_s = slowdown * (elapsed_s if own_s is None else min(own_s, elapsed_s))
                # What was more than enough is not saved up beyond one step.
                behind = min(max(behind - due_s, -due_s), _MAX_RUN * due_s)
            behind_s[account] = behind
        self._behind_s = behind_s
