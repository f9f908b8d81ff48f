"""Which sequence starts next, and what one account may cost another on a tier.

Owns the waiting sequences and each account's counter of what it was served. Knows no blocks,
no batch and no clock: `now` is given. Cannot fail.

Between accounts (`RequestQueue`): the one that was served least goes first (the virtual token
counter of Sheng et al., "Fairness in Serving Large Language Models", OSDI 2024, with prices as
weights). The prompt counts when a sequence starts, each output token when it is delivered. An
account that comes back is lifted to the least counter of those that are here: waiting saves nothing
up. A debt is remembered as long as it exceeds that least counter.

Within an account a sequence ranks by the time it was submitted, less `ageing_s` for each level of
priority. So an account's priorities order its own work and cost others nothing.

The bound: an account of which nothing started for `overdue_s` while it waited goes before every
account that has waited less, whatever the counters say. From then on at most one sequence of each
other account that waits at that moment starts before its own first one; within the account only
what was submitted at most `2 * ageing_s` later can pass. The head is never passed by a
smaller one behind it: a long prompt would otherwise wait for ever.

That alone leaves two ways to stop others: to be there first with as many sequences as the batch
has places, and to make every step so long that the others' tokens do not come.

Places (`PlaceShares`): an account has an even share of them, `max_batch` over the accounts that are
there. It may have more while no other asks; then what it has above its share gives way at once.
What another account has just used within its share is kept for its next sequence for a
while, so that short jobs in a row do not interrupt a sequence each.

Steps (`StepShares`): each account is to get a step in `k` times what one of its own would take,
with `k` the number of accounts or 2. An account that gets less is behind, and the next step has the
sequences of those that are behind only. Their own steps take at most the sum of what they take
alone, so all of them can be had; none starves, because one that is left out falls behind. Where
rows cost nearly nothing (a GPU bound by its bandwidth) none is ever behind, and every step has all.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field

from sage_fed.device.sequence import Sequence


@dataclass(slots=True, eq=False)
class _Account:
    """`served` is what it was served; `live` its sequences, waiting (in rank) and running."""

    served: int
    live: int = 0
    waiting: list[Sequence] = field(default_factory=list)
    waits_since: float = 0.0


class RequestQueue:
    """The sequences of one tier that wait, and the accounts of those and of the running ones."""

    def __init__(self, *, ageing_s: float, overdue_s: float) -> None:
        self._ageing_s = ageing_s
        self._overdue_s = overdue_s
        self._accounts: dict[str, _Account] = {}
        self._waiting: dict[str, _Account] = {}
        self._length = 0
        self.prefill_left = 0
        """Tokens that the waiting sequences have yet to be fed."""

    def __len__(self) -> int:
        """How many wait."""
        return self._length

    def __iter__(self) -> Iterator[Sequence]:
        """Those that wait, account by account."""
        for account in self._waiting.values():
            yield from account.waiting

    @property
    def num_accounts(self) -> int:
        """Accounts that have sequences here, waiting or running."""
        return sum(account.live > 0 for account in self._accounts.values())

    @property
    def served(self) -> dict[str, int]:
        """What each account was served, in uATP, as far as it is remembered."""
        return {name: account.served for name, account in self._accounts.items()}

    def find(self, seq_id: int) -> Sequence | None:
        """Return the waiting sequence of that id."""
        return next((seq for seq in self if seq.spec.seq_id == seq_id), None)

    def add(self, seq: Sequence) -> None:
        """Queue a new sequence."""
        name = seq.spec.account
        account = self._accounts.setdefault(name, _Account(0))
        if not account.live:
            account.served = max(account.served, self._least_served())
        account.live += 1
        self._queue(seq, seq.submitted_s)

    def put_back(self, seq: Sequence, now: float) -> None:
        """Queue a sequence that was interrupted; it keeps its rank."""
        self._queue(seq, now)

    def head(self, now: float, passed: Collection[str] = ()) -> Sequence | None:
        """Return the sequence that starts next; none of the accounts that are `passed` over."""
        waiting = self._waiting
        if passed:
            waiting = {name: account for name, account in waiting.items() if name not in passed}
        if not waiting:
            return None
        first = min(waiting.values(), key=lambda account: self._claim(account, now))
        return first.waiting[0]

    def start(self, seq: Sequence, now: float) -> None:
        """Take a sequence, which is the first of its account, out of the queue to run."""
        account = self._dequeue(seq)
        account.waits_since = now
        self.count(seq)

    def count(self, seq: Sequence) -> None:
        """Count what a running sequence was served by now, and its whole prompt."""
        self._count(seq, seq.promised_uatp)

    def end(self, seq: Sequence) -> None:
        """Forget a sequence that waited or ran; its account only paid for what was done."""
        name = seq.spec.account
        account = self._accounts[name]
        if seq in account.waiting:
            self._dequeue(seq)
        self._count(seq, seq.served_uatp)
        account.live -= 1
        if not account.live:
            self._forget_debts()

    def outranks(self, seq: Sequence, other: Sequence) -> bool:
        """Whether `seq` has the higher priority and goes before `other` of the same account."""
        higher = seq.spec.priority > other.spec.priority
        return higher and self._rank(seq) < self._rank(other)

    def lead_uatp(self, seq: Sequence, other: Sequence) -> int:
        """Return by how much `other`'s account was served more than `seq`'s."""
        return self._accounts[other.spec.account].served - self._accounts[seq.spec.account].served

    def waits_since(self, seq: Sequence) -> float:
        """Return since when nothing of a waiting sequence's account has started."""
        return max(self._accounts[seq.spec.account].waits_since, seq.submitted_s)

    def interruption_key(self, seq: Sequence) -> tuple[int, float, int]:
        """Return a key that grows with the claims of others: the greatest is interrupted first."""
        return (self._accounts[seq.spec.account].served, *self._rank(seq))

    def _claim(self, account: _Account, now: float) -> tuple[bool, float, float, int]:
        head = account.waiting[0]
        if now - account.waits_since >= self._overdue_s:
            return (False, account.waits_since, 0.0, head.order)
        return (True, account.served, head.submitted_s, head.order)

    def _rank(self, seq: Sequence) -> tuple[float, int]:
        return (seq.submitted_s - seq.spec.priority * self._ageing_s, seq.order)

    def _queue(self, seq: Sequence, since: float) -> None:
        name = seq.spec.account
        account = self._accounts[name]
        if not account.waiting:
            account.waits_since = since
            self._waiting[name] = account
        insort(account.waiting, seq, key=self._rank)
        self._length += 1
        self.prefill_left += seq.prefill_left

    def _dequeue(self, seq: Sequence) -> _Account:
        account = self._accounts[seq.spec.account]
        account.waiting.remove(seq)
        if not account.waiting:
            del self._waiting[seq.spec.account]
        self._length -= 1
        self.prefill_left -= seq.prefill_left
        return account

    def _count(self, seq: Sequence, uatp: int) -> None:
        self._accounts[seq.spec.account].served += uatp - seq.counted_uatp
        seq.counted_uatp = uatp

    def _least_served(self) -> int:
        return min((a.served for a in self._accounts.values() if a.live), default=0)

    def _forget_debts(self) -> None:
        """Drop the absent accounts that would be lifted above their counter if they came back."""
        least = self._least_served()
        any_live = any(account.live for account in self._accounts.values())
        self._accounts = {
            name: account
            for name, account in self._accounts.items()
            if account.live or (any_live and account.served > least)
        }


KEPT_S = 2.0
"""For how long places wait for the account that has used them, at most."""

_KEPT_TIMES = 8.0
"""And that is so many times as long as they were used: enough for the round trip of a client, and
no more than a moment for one that was hardly there."""

_LEAST_SLOWDOWN = 2
"""How many times as long others may make an account's steps, however few accounts there are."""

_MAX_RUN = 64
"""Steps that an account may be left out of in a row, at most: as many as the other tier's."""


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
