"""Accounts: their balances, terms and refill.

Owns the `account` table and every entry's insertion (`post`). Knows no jobs or threads; runs
inside the caller's transaction. Fails with `NoSuchAccount` and `InvalidField`.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import apsw

from sage_fed.core import Budget
from sage_fed.errors import InvalidField, NoSuchAccount
from sage_fed.ledger.clock import Now
from sage_fed.ledger.refill import Accrual, Mark, accrue, wait_s
from sage_fed.ledger.words import (
    MAX_LIFETIME_UATP,
    MOVES,
    NS_PER_S,
    AccountTerms,
    BudgetChange,
    EntryKind,
    require_amount,
    require_text,
)

REFILL_QUANTUM_NS = NS_PER_S
"""Refill younger than this is not written unless it is needed: at most about one entry a second."""

MARK_AGE_NS = 60 * NS_PER_S
"""Refill older than this is written by `keep_marks`, so a crash and reboot lose at most this."""

MARKS_STEP = 256
"""How many accounts one step of `keep_marks` looks at."""

_TERMS = ("capacity_uatp", "refill_uatp_per_s", "strategic_floor_uatp")
"""What the settings and an operator both have a word on."""

_log = logging.getLogger(__name__)

COLUMNS = (
    "account, charged_uatp, held_uatp, discharged_uatp, capacity_uatp, refill_uatp_per_s, "
    "strategic_floor_uatp, refill_epoch, refill_ns, refill_remainder"
)


@dataclass(frozen=True, slots=True)
class Account:
    """One row, as of its refill mark."""

    account: str
    charged_uatp: int
    held_uatp: int
    discharged_uatp: int
    capacity_uatp: int
    refill_uatp_per_s: int
    strategic_floor_uatp: int
    refill_epoch: str
    refill_ns: int
    refill_remainder: int

    def accrual(self, now: Now) -> Accrual:
        """Refill since the mark. Held amounts count: voiding them must not pass the capacity."""
        outstanding = self.charged_uatp + self.held_uatp
        return accrue(
            Mark(self.refill_epoch, self.refill_ns, self.refill_remainder),
            now,
            rate_uatp_per_s=self.refill_uatp_per_s,
            room_uatp=min(
                self.capacity_uatp - outstanding,
                MAX_LIFETIME_UATP - outstanding - self.discharged_uatp,
            ),
        )

    def available_uatp(self, now: Now) -> int:
        """What may be held now, refill included."""
        return self.charged_uatp + self.accrual(now).amount_uatp

    def budget(self, now: Now) -> Budget:
        """The books with refill counted until now."""
        return Budget(
            account=self.account,
            balance_uatp=self.available_uatp(now),
            held_uatp=self.held_uatp,
            discharged_uatp=self.discharged_uatp,
            capacity_uatp=self.capacity_uatp,
            refill_uatp_per_s=self.refill_uatp_per_s,
            strategic_floor_uatp=self.strategic_floor_uatp,
        )

    def retry_after_s(self, needed_uatp: int, now: Now) -> float | None:
        """When refill will have covered `needed_uatp`; None where it never will."""
        if self.refill_uatp_per_s == 0 or needed_uatp > self.capacity_uatp:
            return None
        accrual = self.accrual(now)
        deficit = needed_uatp - self.charged_uatp - accrual.amount_uatp
        assert deficit > 0, "only a refused amount has a wait"
        return wait_s(
            deficit, rate_uatp_per_s=self.refill_uatp_per_s, remainder=accrual.mark.remainder
        )


class Accounts:
    """The `account` table on one connection."""

    def __init__(self, db: apsw.Connection) -> None:
        self._db = db

    def find(self, account: str) -> Account | None:
        """The row, or None."""
        row = self._db.execute(
            f"SELECT {COLUMNS} FROM account WHERE account = ?",  # noqa: S608 - a constant
            (account,),
        ).fetchone()
        return None if row is None else Account(*cast("tuple[Any, ...]", row))

    def read(self, account: str) -> Account:
        """The row; `NoSuchAccount` where there is none."""
        row = self.find(account)
        if row is None:
            raise NoSuchAccount("this account has no budget; ask the operator for one")
        return row

    def budget(self, account: str, now: Now) -> Budget:
        """The books of an account with refill counted until now, without writing it."""
        return self.read(account).budget(now)

    def post(
        self, account: str, kind: EntryKind, amount_uatp: int, now: Now, job_id: str | None = None
    ) -> None:
        """Add an entry, which moves the balances; an amount of 0 moves nothing."""
        assert amount_uatp >= 0, "an entry only ever moves forward"
        if amount_uatp == 0:
            return
        self._db.execute(
            "INSERT INTO entry (entry_id, number, time_ns, account, kind, job_id, amount_uatp, "
            "debit, credit) SELECT last_entry_id + 1, last_number + 1, ?, account, ?, ?, ?, ?, ? "
            "FROM book, account WHERE account = ?",
            (now.wall_ns, kind.value, job_id, amount_uatp, *MOVES[kind], account),
        )
        assert self._db.changes() == 1, "the account was read before"

    def write_refill(self, row: Account, now: Now, *, needed_uatp: int = 0) -> None:
        """Write the refill since the mark, before an operation that moves this account.

        Left for later where that changes no sum: the account was never full since its mark,
        `needed_uatp` is there already, and the mark is younger than `REFILL_QUANTUM_NS`.
        """
        accrual = row.accrual(now)
        if (
            not accrual.capped
            and needed_uatp <= row.charged_uatp
            and accrual.elapsed_ns < REFILL_QUANTUM_NS
            and now.epoch == row.refill_epoch
        ):
            return
        self._write(row, accrual, now)

    def begin_epoch(self, now: Now) -> None:
        """Begin to count here and now for every account that was last counted on another boot."""
        self._db.execute(
            "UPDATE account SET refill_epoch = ?, refill_ns = ? WHERE refill_epoch <> ?",
            (now.epoch, now.ns, now.epoch),
        )

    def keep_marks(self, now: Now, *, age_ns: int = MARK_AGE_NS, after: str = "") -> str:
        """Write the refill of accounts whose mark is at least `age_ns` old; one step.

        Looks at so many accounts behind the name `after`; the last one's name, "" at the end.
        """
        rows = self._db.execute(
            f"SELECT {COLUMNS} FROM account WHERE account > ? "  # noqa: S608 - a constant
            "ORDER BY account LIMIT ?",
            (after, MARKS_STEP),
        ).fetchall()
        seen = [Account(*cast("tuple[Any, ...]", values)) for values in rows]
        for row in seen:
            accrual = row.accrual(now)
            if row.refill_uatp_per_s and (
                accrual.elapsed_ns >= age_ns or now.epoch != row.refill_epoch
            ):
                self._write(row, accrual, now)
        return seen[-1].account if len(seen) == MARKS_STEP else ""

    def keep_all_marks(self, now: Now) -> None:
        """Write the refill of every account, for the end."""
        after = self.keep_marks(now, age_ns=0)
        while after:
            after = self.keep_marks(now, age_ns=0, after=after)

    def ensure(self, account: str, terms: AccountTerms, now: Now) -> Budget:
        """Create the account, or apply what the settings have changed.

        The last word on a term holds: the operator's, until the settings say something else of
        it than they did when they were last applied or the operator spoke.
        """
        require_text("account", account)
        for name in AccountTerms.__slots__:
            require_amount(name, getattr(terms, name))
        row = self.find(account)
        declared = (terms.capacity_uatp, terms.refill_uatp_per_s, terms.strategic_floor_uatp)
        if row is None:
            self._create(account, BudgetChange(terms.initial_uatp, *declared), now)
        else:
            before = self._db.execute(
                "SELECT declared_capacity_uatp, declared_refill_uatp_per_s, declared_floor_uatp "
                "FROM account WHERE account = ?",
                (account,),
            ).fetchone()
            assert before is not None, "the row was just read"
            # None: an operator made it, before this program kept what the settings said then.
            changed = [
                new if old is not None and new != old else None
                for new, old in zip(declared, before, strict=True)
            ]
            for name, new, old in zip(_TERMS, changed, before, strict=True):
                if new is not None and getattr(row, name) not in (old, new):
                    _log.warning(
                        "account %s: the settings have changed its %s, so that %d uATP replace the "
                        "%d that an operator had set; `sage-fed admin set-budget` sets it again",
                        account, name, new, getattr(row, name),
                    )  # fmt: skip
            self._change(row, BudgetChange(None, *changed), now)
        self._declare(account, declared)
        return self.budget(account, now)

    def set_budget(
        self, account: str, change: BudgetChange, now: Now, terms: AccountTerms | None = None
    ) -> Budget:
        """Create the account or change it; what a new one is not told is 0.

        `terms` are what the settings say of the account now: over what it sets here the operator
        has had the last word, see `ensure`.
        Raises `InvalidField` on amounts out of range.
        """
        require_text("account", account)
        for name in BudgetChange.__slots__:
            amount = getattr(change, name)
            if amount is not None:
                require_amount(name, amount)
        row = self.find(account)
        if row is None:
            self._create(account, change, now)
        else:
            self._change(row, change, now)
        if terms is not None:
            # A new account is the operator's in every term, an old one's only in those named.
            named = [
                getattr(terms, name) if row is None or getattr(change, name) is not None else None
                for name in _TERMS
            ]
            self._declare(account, named)
        return self.budget(account, now)

    def _declare(self, account: str, terms: Sequence[int | None]) -> None:
        """Remember what the settings say of capacity, refill and floor; None: as it was."""
        self._db.execute(
            "UPDATE account SET "
            "declared_capacity_uatp = coalesce(?, declared_capacity_uatp), "
            "declared_refill_uatp_per_s = coalesce(?, declared_refill_uatp_per_s), "
            "declared_floor_uatp = coalesce(?, declared_floor_uatp) WHERE account = ?",
            (*terms, account),
        )

    def _create(self, account: str, terms: BudgetChange, now: Now) -> None:
        self._db.execute(
            "INSERT INTO account (account, capacity_uatp, refill_uatp_per_s, "
            "strategic_floor_uatp, refill_epoch, refill_ns, refill_remainder) "
            "VALUES (?, ?, ?, ?, ?, ?, 0)",
            (
                account,
                terms.capacity_uatp or 0,
                terms.refill_uatp_per_s or 0,
                terms.strategic_floor_uatp or 0,
                now.epoch,
                now.ns,
            ),
        )
        self.post(account, EntryKind.GRANT, terms.balance_uatp or 0, now)

    def _change(self, row: Account, change: BudgetChange, now: Now) -> None:
        # The time until now was lived under the old terms.
        self._write(row, row.accrual(now), now)
        row = self.read(row.account)
        if change.balance_uatp is not None:
            rise_uatp = change.balance_uatp - row.charged_uatp
            if change.balance_uatp + row.held_uatp + row.discharged_uatp > MAX_LIFETIME_UATP:
                raise InvalidField("balance_uatp", "this account has got as much as it ever can")
            self.post(row.account, EntryKind.GRANT, max(0, rise_uatp), now)
            self.post(row.account, EntryKind.REVOKE, max(0, -rise_uatp), now)
        self._db.execute(
            "UPDATE account SET capacity_uatp = coalesce(?, capacity_uatp), "
            "refill_uatp_per_s = coalesce(?, refill_uatp_per_s), "
            "strategic_floor_uatp = coalesce(?, strategic_floor_uatp) WHERE account = ?",
            (
                change.capacity_uatp,
                change.refill_uatp_per_s,
                change.strategic_floor_uatp,
                row.account,
            ),
        )

    def _write(self, row: Account, accrual: Accrual, now: Now) -> None:
        self.post(row.account, EntryKind.REFILL, accrual.amount_uatp, now)
        self._db.execute(
            "UPDATE account SET refill_epoch = ?, refill_ns = ?, refill_remainder = ? "
            "WHERE account = ?",
            (accrual.mark.epoch, accrual.mark.ns, accrual.mark.remainder, row.account),
        )
