"""The ledger as the event loop sees it: its operations, as coroutines.

Owns what each operation is to a waiter: what may be refused, what is owed, what is taken back.
Knows no SQL and no futures (`inbox.py`). All methods belong to the loop that opened it.
An answer means that the operation is on disk. Cancelling the wait for `settle` or `void` does not
take it back; a cancelled `hold` is voided, so that nobody's disappearance reserves ATP.
What only reads is done beside the writer (`reader.py`), in turn with the other accounts' reads,
and sees everything that was answered before it was asked.
While its disk is full or read-only, hangs, or another program has it locked, what needs to be
written is refused with `LedgerBlocked`, but for the ends of holds, which wait; `on_disk` is told
when that begins and ends.
After another failed commit or a lost file the ledger is dead: every wait ends with `LedgerDown`,
`on_death` is told once, and only a restart, which audits the books, brings it back.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

from sage_fed.core import Budget
from sage_fed.errors import InvalidField, LedgerBlocked, LedgerDown
from sage_fed.ledger.books import Books
from sage_fed.ledger.clock import Clock, Now, system_clock
from sage_fed.ledger.days import Folded
from sage_fed.ledger.inbox import Inbox, LedgerOptions, Listeners
from sage_fed.ledger.reader import Reader, Unreadable
from sage_fed.ledger.words import (
    AccountTerms,
    BudgetChange,
    Entry,
    HoldReceipt,
    HoldRequest,
    Page,
    Place,
    Recovery,
    Release,
    Replay,
    Settlement,
)

T = TypeVar("T")

MAX_PAGE = 1000

_RESTS = 4
"""How much longer than a step of tidying is the rest behind it: a fifth of the writer at most."""

_OPERATORS = ""
"""Whose turn it is for what no account asks; no account has an empty name."""

log = logging.getLogger(__name__)


class Ledger:
    """An open ledger; made by `Ledger.open`, ended by `close`."""

    def __init__(
        self,
        inbox: Inbox,
        reader: Reader,
        upkeep_s: float,
        terms: Callable[[str], AccountTerms] | None,
        on_fold: Callable[[int], None] | None,
    ) -> None:
        self._inbox = inbox
        self._reader = reader
        self._upkeep_s = upkeep_s
        self._terms = terms
        self._on_fold = on_fold
        self._passed_id = 0

    @classmethod
    async def open(
        cls,
        path: Path,
        *,
        clock: Clock | None = None,
        options: LedgerOptions | None = None,
        terms: Callable[[str], AccountTerms] | None = None,
        on_commit: Callable[[int, float], None] | None = None,
        on_disk: Callable[[bool], None] | None = None,
        on_death: Callable[[BaseException], None] | None = None,
        on_read: Callable[[float], None] | None = None,
        on_fold: Callable[[int], None] | None = None,
    ) -> Ledger:
        """Open or create the books at `path`, check their balance and void orphaned holds.

        `terms` says what the settings give an account; `set_budget` remembers it.
        `on_commit(operations, latency_s)` is called on the loop after each group,
        `on_disk(writable)` when writes begin or cease to be refused, `on_death(error)`
        once, if the thread dies, `on_read(latency_s)` after each read, `on_fold(entries)` after
        entries were folded into days.
        Raises `ConfigError` (open elsewhere, not a ledger, too new), `LedgerCorrupt` (damaged or
        lost) and `LedgerUnusable` (no space, no permission).
        """
        options, clock = options or LedgerOptions(), clock or system_clock()
        listeners = Listeners(on_commit, on_read, on_disk, on_death)
        inbox = Inbox(path, clock=clock, options=options, listeners=listeners)
        await inbox.open()
        reader = Reader(
            path,
            clock=clock,
            account_reads=options.account_reads,
            answer_timeout_s=options.answer_timeout_s,
            on_read=on_read,
        )
        reader.open()
        return cls(inbox, reader, options.upkeep_s, terms, on_fold)

    @property
    def recovery(self) -> Recovery:
        """What opening had to void."""
        return self._inbox.recovery

    @property
    def max_result_bytes(self) -> int:
        """How large a result may be to be kept for a repeat."""
        return self._inbox.options.retention.one_result_bytes

    @property
    def alive(self) -> bool:
        """Whether operations are being taken."""
        return self._inbox.alive

    @property
    def trouble(self) -> str:
        """Why no entry is taken now, in words for anybody; "" where entries are taken."""
        return self._inbox.trouble

    async def watch(self) -> None:
        """Notice a disk that hangs, forever; a task of the daemon's group."""
        await self._inbox.watch()

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
            return await self._inbox.ask(hold)
        except LedgerBlocked:
            raise  # nothing was held
        except (asyncio.CancelledError, LedgerDown):
            self._inbox.tell(undo)
            raise

    async def settle(
        self, job_id: str, charged_uatp: int, outcome: str, result: bytes | None = None
    ) -> Settlement:
        """Charge a hold's actual price, once; see `Books.settle`."""
        return await self._inbox.ask(
            lambda books, now: books.settle(job_id, charged_uatp, outcome, result, now),
            refusable=False,
            owed=True,
        )

    async def void(self, job_id: str, reason: str) -> Release:
        """Give a hold back whole; see `Books.void`."""
        return await self._inbox.ask(
            lambda books, now: books.void(job_id, reason, now), refusable=False, owed=True
        )

    async def expire_due(self, alive: frozenset[str] = frozenset()) -> tuple[str, ...]:
        """Give back holds past their time to live but those of `alive` jobs; see `Books`."""
        return await self._inbox.ask(
            lambda books, now: books.expire_due(now, alive), refusable=False
        )

    async def lookup_request(
        self, account: str, client_request_id: str, payload_hash: bytes
    ) -> Replay | None:
        """The kept result of the same request; see `Requests.find`. `hold` looks again."""
        return await self._read(
            account,
            lambda books, _: books.requests.find(account, client_request_id, payload_hash),
        )

    async def budget(self, account: str, *, refusable: bool = True) -> Budget:
        """The account's books now, refill included; `NoSuchAccount`, and `QueueFull`."""
        return await self._read(
            account, lambda books, now: books.accounts.budget(account, now), refusable=refusable
        )

    async def ensure_account(self, account: str, terms: AccountTerms) -> Budget:
        """Create an account of the settings, or apply what they changed; see `Accounts.ensure`."""
        return await self._inbox.ask(lambda books, now: books.accounts.ensure(account, terms, now))

    async def set_budget(self, account: str, change: BudgetChange) -> Budget:
        """Create an account or change it, by an operator; see `Accounts.set_budget`."""
        terms = self._terms(account) if self._terms is not None else None
        return await self._inbox.ask(
            lambda books, now: books.accounts.set_budget(account, change, now, terms)
        )

    async def entries(
        self, account: str, before_id: int | None = None, limit: int = 50
    ) -> list[Entry]:
        """Up to `limit` (1 to 1000) entries of an account below that number, newest first."""
        return await self._read(account, lambda books, _: books.entries(account, before_id, limit))

    async def page(
        self, account: str, place: Place | None, limit: int, render: Callable[[Page], T]
    ) -> T:
        """What `render` makes of `Books.page`, on the reader's thread: a long one takes a while."""
        if not 1 <= limit <= MAX_PAGE:
            raise InvalidField("page_size", f"must be from 1 to {MAX_PAGE}")
        if place is not None and not 0 <= place.before < 2**63:
            raise InvalidField("page_token", "is not one that this daemon gave out")
        return await self._read(account, lambda books, _: render(books.page(account, place, limit)))

    async def held_total_uatp(self) -> int:
        """What is held now, over all accounts; an operator's question."""
        return await self._read(_OPERATORS, lambda books, _: books.held_total_uatp())

    async def _read(
        self, account: str, read: Callable[[Books, Now], T], *, refusable: bool = True
    ) -> T:
        if self._inbox.alive:
            with contextlib.suppress(Unreadable):
                return await self._reader.ask(account, read, refusable=refusable)
        # Whatever is wrong with the file, its writer notices at this, and says so.
        return await self._inbox.ask(read, refusable=refusable)

    async def run_upkeep(self, alive: Callable[[], frozenset[str]]) -> None:
        """Expire, persist refill marks and tidy, forever; a task of the daemon's group.

        `alive` names the jobs that will end their holds themselves. A hold that is asked for
        after it was called is behind the upkeep in the inbox, so none is missed.
        """
        while True:
            await asyncio.sleep(self._upkeep_s)
            try:
                if expired := await self.expire_due(alive()):
                    log.warning("expired %d holds that nobody ended", len(expired))
                await self._keep_marks()
                await self.tidy(self._upkeep_s)
            except LedgerDown:
                if not self.alive:
                    raise
                # Said already; the next round does what this one could not.

    async def tidy(self, for_s: float = math.inf) -> int:
        """Forget and fold what is past its retention, beside the traffic; the entries folded.

        In steps, each an operation among the others', with a rest of several times as long, and
        for so many seconds; what is left then is the next call's.
        """
        entries, step = 0, Folded(0, self._passed_id, more=True)
        until_s = time.monotonic() + for_s
        while step.more:
            step, took_s = await self._inbox.ask(
                partial(_tidied, passed_id=step.passed_id), refusable=False
            )
            entries += step.entries
            if step.entries and self._on_fold is not None:
                self._on_fold(step.entries)
            if time.monotonic() > until_s:
                break
            await asyncio.sleep(took_s * _RESTS)
        # From the front again, once it came to what is not old: holds that it passed have ended.
        self._passed_id = step.passed_id if step.more else 0
        return entries

    async def _keep_marks(self) -> None:
        after: str | None = ""
        while after is not None:
            step = partial(_marks_kept, after=after)
            after = await self._inbox.ask(step, refusable=False) or None

    async def close(self) -> None:
        """Answer what is queued, persist refill marks and close the file; may be repeated."""
        await self._reader.close()
        await self._inbox.close(lambda books, now: books.accounts.keep_all_marks(now))


def _marks_kept(books: Books, now: Now, *, after: str) -> str:
    return books.accounts.keep_marks(now, after=after)


def _tidied(books: Books, now: Now, *, passed_id: int) -> tuple[Folded, float]:
    began_s = time.perf_counter()
    return books.tidy(now, passed_id), time.perf_counter() - began_s
