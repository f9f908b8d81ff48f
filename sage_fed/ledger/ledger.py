"""The ledger as the event loop sees it: coroutines over the one writer thread.

Owns the bounded inbox, the futures and the ledger's life: opening, serving, closed or dead.
Knows no SQL. All methods belong to the loop that opened it.
An answer means that the operation is on disk. Cancelling the wait for `settle` or `void` does not
take it back; a cancelled `hold` is voided, so that nobody's disappearance reserves ATP.
While its disk is full or read-only, what needs to be written is refused with `LedgerBlocked`, but
for the ends of holds, which wait for the disk; `on_disk` is told when that begins and ends.
After another failed commit or a lost file the ledger is dead: every wait ends with `LedgerDown`,
whose cause is for the operator only, `on_death` is told once, and only a restart, which audits
the books, brings it back.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TypeVar, cast

from sage_fed.core import Budget
from sage_fed.errors import InvalidField, LedgerBlocked, LedgerDown, QueueFull, SageFedError
from sage_fed.ledger.books import Books
from sage_fed.ledger.clock import Clock, Now, system_clock
from sage_fed.ledger.requests import Retention
from sage_fed.ledger.words import (
    AccountTerms,
    BudgetChange,
    Entry,
    HoldReceipt,
    HoldRequest,
    Recovery,
    Release,
    Replay,
    Settlement,
)
from sage_fed.ledger.writer import (
    Closed,
    Committed,
    Died,
    Disk,
    Opened,
    Operation,
    Report,
    Writer,
)

MAX_PAGE = 1000

T = TypeVar("T")
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LedgerOptions:
    """Limits. `inbox_limit` bounds what may be refused; the ends of open holds always fit."""

    retention: Retention = field(default_factory=Retention)
    group_limit: int = 256
    inbox_limit: int = 1024
    answer_timeout_s: float = 30.0
    upkeep_s: float = 30.0


class Ledger:
    """An open ledger; made by `Ledger.open`, ended by `close`."""

    def __init__(
        self,
        path: Path,
        *,
        clock: Clock,
        options: LedgerOptions,
        on_commit: Callable[[int, float], None] | None,
        on_disk: Callable[[bool], None] | None,
        on_death: Callable[[BaseException], None] | None,
    ) -> None:
        self._options = options
        self._on_commit = on_commit
        self._on_disk = on_disk
        self._on_death = on_death
        self._loop = asyncio.get_running_loop()
        self._tickets = itertools.count()
        self._waiting: dict[int, asyncio.Future[object]] = {}
        self._opened: asyncio.Future[Recovery] = self._loop.create_future()
        self._over = asyncio.Event()
        self._down: str | None = None
        self._cause: BaseException | None = None
        self._writer = Writer(
            path,
            clock=clock,
            retention=options.retention,
            group_limit=options.group_limit,
            deliver=self._deliver,
        )

    @classmethod
    async def open(
        cls,
        path: Path,
        *,
        clock: Clock | None = None,
        options: LedgerOptions | None = None,
        on_commit: Callable[[int, float], None] | None = None,
        on_disk: Callable[[bool], None] | None = None,
        on_death: Callable[[BaseException], None] | None = None,
    ) -> Ledger:
        """Open or create the books at `path`, check their balance and void orphaned holds.

        `on_commit(operations, latency_s)` is called on the loop after each group,
        `on_disk(writable)` when the disk begins or ceases to refuse writes, `on_death(error)`
        once, if the thread dies.
        Raises `ConfigError` (open elsewhere, not a ledger, too new), `LedgerCorrupt` (damaged or
        lost) and `LedgerUnusable` (no space, no permission).
        """
        ledger = cls(
            path,
            clock=clock or system_clock(),
            options=options or LedgerOptions(),
            on_commit=on_commit,
            on_disk=on_disk,
            on_death=on_death,
        )
        ledger._writer.start()
        await ledger._opened
        return ledger

    @property
    def recovery(self) -> Recovery:
        """What opening had to void."""
        return self._opened.result()

    @property
    def alive(self) -> bool:
        """Whether operations are being taken."""
        return self._down is None

    async def hold(self, request: HoldRequest) -> HoldReceipt | Replay:
        """Reserve a job's worst case, durably; see `Books.hold`. Also `QueueFull`."""
        return await self._hold(lambda books, now: books.hold(request, now))

    async def decide_hold(
        self,
        account: str,
        client_request_id: str,
        payload_hash: bytes,
        decide: Callable[[Budget], HoldRequest],
    ) -> HoldReceipt | Replay:
        """Hold what `decide` asks for at the balance of that instant; see `Books.decide_hold`.

        `decide` is called on the ledger's thread: it must be quick and read only what it owns.
        """
        return await self._hold(
            lambda books, now: books.decide_hold(
                account, client_request_id, payload_hash, decide, now
            )
        )

    async def _hold(
        self, operation: Callable[[Books, Now], HoldReceipt | Replay]
    ) -> HoldReceipt | Replay:
        receipt: HoldReceipt | Replay | None = None

        def hold(books: Books, now: Now) -> HoldReceipt | Replay:
            nonlocal receipt
            receipt = operation(books, now)
            return receipt

        def undo(books: Books, now: Now) -> None:
            # Behind the hold in the same inbox, so `receipt` is known by then.
            if isinstance(receipt, HoldReceipt):
                books.void(receipt.job_id, "abandoned", now)

        try:
            return await self._ask(hold)
        except (asyncio.CancelledError, LedgerDown):
            self._tell(undo)
            raise

    async def settle(
        self, job_id: str, charged_uatp: int, outcome: str, result: bytes | None = None
    ) -> Settlement:
        """Charge a hold's actual price, once; see `Books.settle`."""
        return await self._ask(
            lambda books, now: books.settle(job_id, charged_uatp, outcome, result, now),
            refusable=False,
            owed=True,
        )

    async def void(self, job_id: str, reason: str) -> Release:
        """Give a hold back whole; see `Books.void`."""
        return await self._ask(
            lambda books, now: books.void(job_id, reason, now), refusable=False, owed=True
        )

    async def expire_due(self, alive: frozenset[str] = frozenset()) -> tuple[str, ...]:
        """Give back holds past their time to live but those of `alive` jobs; see `Books`."""
        return await self._ask(lambda books, now: books.expire_due(now, alive), refusable=False)

    async def lookup_request(
        self, account: str, client_request_id: str, payload_hash: bytes
    ) -> Replay | None:
        """The kept result of the same request; see `Requests.find`. `hold` looks again."""
        return await self._ask(
            lambda books, _: books.requests.find(account, client_request_id, payload_hash)
        )

    async def prune(self) -> int:
        """Forget request ids past their retention; returns how many."""
        return await self._ask(lambda books, now: books.requests.prune(now), refusable=False)

    async def budget(self, account: str) -> Budget:
        """The account's books now, refill included; `NoSuchAccount`."""
        return await self._ask(lambda books, now: books.accounts.budget(account, now))

    async def ensure_account(self, account: str, terms: AccountTerms) -> Budget:
        """Create an account of the settings, or apply what they changed; see `Accounts.ensure`."""
        return await self._ask(lambda books, now: books.accounts.ensure(account, terms, now))

    async def set_budget(self, account: str, change: BudgetChange) -> Budget:
        """Create an account or change it, by an operator; see `Accounts.set_budget`."""
        return await self._ask(lambda books, now: books.accounts.set_budget(account, change, now))

    async def entries(
        self, account: str, before_id: int | None = None, limit: int = 50
    ) -> list[Entry]:
        """Up to `limit` (1 to 1000) entries older than `before_id`, newest first."""
        if not 1 <= limit <= MAX_PAGE:
            raise InvalidField("page_size", f"must be from 1 to {MAX_PAGE}")
        if before_id is not None and not 0 <= before_id < 2**63:
            raise InvalidField("page_token", "is not one that this daemon gave out")
        return await self._ask(lambda books, _: books.entries(account, before_id, limit))

    async def held_total_uatp(self) -> int:
        """What is held now, over all accounts."""
        return await self._ask(lambda books, _: books.held_total_uatp())

    async def run_upkeep(self, alive: Callable[[], frozenset[str]]) -> None:
        """Expire, prune and persist refill marks, forever; a task of the daemon's group.

        `alive` names the jobs that will end their holds themselves. A hold that is asked for
        after it was called is behind the upkeep in the inbox, so none is missed.
        """
        while True:
            await asyncio.sleep(self._options.upkeep_s)
            try:
                expired = await self._ask(partial(_upkeep, alive=alive()), refusable=False)
            except LedgerBlocked:
                continue  # said already; the next round does what this one could not
            if expired:
                log.warning("expired %d holds that nobody ended", len(expired))

    async def close(self) -> None:
        """Answer what is queued, persist refill marks and close the file; may be repeated."""
        if self._down is None:
            self._tell(lambda books, now: books.accounts.keep_marks(now, age_ns=0))
            self._down = "the ledger is closed"
            self._writer.close()
        async with asyncio.timeout(self._options.answer_timeout_s):
            await self._over.wait()

    async def _ask(
        self, operation: Callable[[Books, Now], T], *, refusable: bool = True, owed: bool = False
    ) -> T:
        """Wait for an operation; one that is `owed` waits for a disk that takes nothing now."""
        if refusable and len(self._waiting) >= self._options.inbox_limit:
            raise QueueFull("the ledger is busy; try again", retry_after_s=0.1)
        answer = self._send(operation, owed=owed)
        # Not `asyncio.timeout`, which costs as much as all the rest of asking.
        deadline = self._loop.call_later(self._options.answer_timeout_s, _give_up, answer)
        try:
            return cast("T", await answer)
        finally:
            deadline.cancel()

    def _send(self, operation: Operation, *, owed: bool = False) -> asyncio.Future[object]:
        if self._down is not None:
            raise LedgerDown(self._down) from self._cause
        ticket = next(self._tickets)
        answer: asyncio.Future[object] = self._loop.create_future()
        self._waiting[ticket] = answer
        self._writer.submit(ticket, operation, owed=owed)
        return answer

    def _tell(self, operation: Operation) -> None:
        """Send an operation whose answer nobody waits for; nothing once the ledger is down."""
        if self._down is None:
            # Reads the error away: a death is reported once, by `_die`.
            self._send(operation, owed=True).add_done_callback(asyncio.Future.exception)

    def _deliver(self, report: Report) -> None:
        """Cross from the writer's thread to the loop: once a group, not once an operation."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._receive, report)

    def _receive(self, report: Report) -> None:
        match report:
            case Opened(recovery):
                self._opened.set_result(recovery)
            case Committed(answers, latency_s):
                for answer in answers:
                    self._resolve(answer.ticket, answer.value, answer.error)
                if answers and self._on_commit is not None:
                    self._on_commit(len(answers), latency_s)
            case Disk(refusal):
                self._say_of_disk(refusal)
            case Closed():
                self._over.set()
                self._fail_waiting(None)
            case Died(error):
                self._die(error)

    def _say_of_disk(self, refusal: SageFedError | None) -> None:
        if refusal is None:
            log.warning("the ledger's disk takes entries again; jobs are admitted")
        else:
            log.critical("%s; jobs are refused until the ledger can be written", refusal.message)
        if self._on_disk is not None:
            self._on_disk(refusal is None)

    def _resolve(self, ticket: int, value: object, error: BaseException | None) -> None:
        waiting = self._waiting.pop(ticket, None)
        if waiting is None or waiting.done():  # Nobody's, or its waiter was cancelled.
            return
        if error is None:
            waiting.set_result(value)
        else:
            waiting.set_exception(error)

    def _die(self, error: BaseException) -> None:
        self._over.set()
        if not self._opened.done():
            self._down = "the ledger did not open"
            self._opened.set_exception(error)
            return
        if isinstance(error, SageFedError):
            log.critical("the ledger died: %s", error.message)
        else:
            log.critical("the ledger died", exc_info=error)
        self._down = "the ledger has failed; the daemon must be restarted"
        self._cause = error
        self._fail_waiting(error)
        if self._on_death is not None:
            self._on_death(error)

    def _fail_waiting(self, cause: BaseException | None) -> None:
        for ticket in tuple(self._waiting):
            down = LedgerDown(self._down or "")
            down.__cause__ = cause
            self._resolve(ticket, None, down)


def _give_up(answer: asyncio.Future[object]) -> None:
    if not answer.done():
        answer.set_exception(LedgerDown("the ledger does not answer; its disk may be stuck"))


def _upkeep(books: Books, now: Now, *, alive: frozenset[str]) -> tuple[str, ...]:
    books.requests.prune(now)
    books.accounts.keep_marks(now)
    return books.expire_due(now, alive)
