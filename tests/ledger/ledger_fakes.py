"""A clock in the test's hand, and books in memory."""

from typing import Any

import apsw
from holds import asked

from sage_fed.core import Budget, BudgetChange
from sage_fed.ledger import schema
from sage_fed.ledger.books import Books
from sage_fed.ledger.entries import (
    NS_PER_S,
    AccountTerms,
    HoldReceipt,
    Now,
    Replay,
    RequestKey,
    Retention,
    Settlement,
)


class HandClock:
    """Stands still until told otherwise."""

    def __init__(self) -> None:
        self.boots = 1
        self.ns = 1000 * NS_PER_S
        self.wall_ns = 1_800_000_000 * NS_PER_S

    def now(self) -> Now:
        """The instant at which it stands."""
        return Now(f"boot:{self.boots}", self.ns, self.wall_ns)

    def advance_ns(self, ns: int) -> None:
        """Let time pass, on both clocks."""
        self.ns += ns
        self.wall_ns += ns

    def advance(self, seconds: float) -> None:
        """Let time pass, on both clocks."""
        self.advance_ns(round(seconds * NS_PER_S))

    def reboot(self, *, uptime_s: float) -> None:
        """Begin a new epoch, `uptime_s` after its start."""
        self.boots += 1
        self.ns = round(uptime_s * NS_PER_S)


class Desk:
    """Books in memory with a clock; each operation in a transaction, as the writer does it."""

    def __init__(self, retention: Retention | None = None) -> None:
        self.clock = HandClock()
        self.db = apsw.Connection(":memory:")
        self.db.pragma("foreign_keys", True)
        schema.migrate(self.db)
        self.books = Books(self.db, retention)

    def account(
        self,
        name: str = "ann",
        *,
        balance: int = 100,
        capacity: int = 1000,
        refill: int = 0,
        floor: int = 0,
    ) -> Budget:
        """Make sure that the account exists, as the settings would."""
        with self.db:
            return self.books.accounts.ensure(
                name, AccountTerms(capacity, refill, floor, balance), self.clock.now()
            )

    def hold(
        self,
        job_id: str,
        amount: int,
        account: str = "ann",
        **fields: Any,  # noqa: ANN401 - of `asked`
    ) -> HoldReceipt | Replay:
        """Hold for a tactical job on card-1."""
        with self.db:
            return self.books.hold(
                *asked(job_id, account, amount, "card-1", **fields), self.clock.now()
            )

    def find(self, request_id: str, payload: bytes, account: str = "ann") -> Replay | None:
        """Look a request id up."""
        return self.books.requests.find(RequestKey(account, request_id, (payload,)))

    def settle(self, job_id: str, charged: int, result: bytes | None = None) -> Settlement:
        """Settle a job."""
        with self.db:
            return self.books.settle(job_id, charged, "length", result, self.clock.now())

    def void(self, job_id: str) -> Settlement:
        """Void a job."""
        with self.db:
            return self.books.void(job_id, "refused", self.clock.now())

    def expire_due(self, alive: frozenset[str] = frozenset()) -> tuple[str, ...]:
        """Expire what is due and no longer alive."""
        with self.db:
            return self.books.expire_due(self.clock.now(), alive)

    def set_budget(
        self, change: BudgetChange, account: str = "ann", terms: AccountTerms | None = None
    ) -> Budget:
        """Change an account, as an operator would while the settings say `terms` of it."""
        with self.db:
            return self.books.accounts.set_budget(account, change, self.clock.now(), terms)

    def budget(self, account: str = "ann") -> Budget:
        """The account now."""
        return self.books.accounts.read(account).refilled(self.clock.now()).budget()

    def balance(self, account: str = "ann") -> int:
        """What is available now."""
        return self.budget(account).balance_uatp

    def entries(self, account: str = "ann") -> list[tuple[str, int, str]]:
        """(kind, amount, job) of every entry, oldest first."""
        found = self.books.page(account, None, 1000).entries
        return [(entry.kind.value, entry.amount_uatp, entry.job_id) for entry in reversed(found)]
