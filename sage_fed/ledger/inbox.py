"""The loop's end of the writer: what has been sent, and who waits for its answer.

Owns the bounded inbox, the futures and the ledger's life: opening, serving, closed or dead.
Knows no operation, only that each has one answer. Belongs to the loop that made it.
What is `owed` waits for a disk that takes nothing now, or hangs; the rest is refused with
`LedgerBlocked`.
A dead writer ends every wait with `LedgerDown`, whose cause is for the operator only.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar, cast

from sage_fed.errors import LedgerBlocked, LedgerDown, LedgerUnusable, QueueFull, SageFedError
from sage_fed.ledger.books import Books
from sage_fed.ledger.clock import Clock, Now
from sage_fed.ledger.requests import Retention
from sage_fed.ledger.words import Recovery
from sage_fed.ledger.writer import (
    RETRY_S,
    Closed,
    Committed,
    Died,
    Disk,
    Opened,
    Operation,
    Report,
    Writer,
)

_LOOK_S = 0.25
"""Between two looks whether the disk hangs."""

T = TypeVar("T")
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LedgerOptions:
    """Limits. `inbox_limit` bounds what may be refused; the ends of open holds always fit.

    `account_reads` is how many reads an account may have waiting, `busy_s` how long another program
    that has the file locked is waited for, and `commit_timeout_s` after how long a group that is
    not on disk counts as a disk that hangs.
    A start audits up to `audit_entries` itself, and has
    more of them audited beside its first jobs.
    """

    retention: Retention = field(default_factory=Retention)
    group_limit: int = 256
    inbox_limit: int = 1024
    account_reads: int = 16
    busy_s: float = 2.0
    commit_timeout_s: float = 5.0
    audit_entries: int = 200_000
    answer_timeout_s: float = 30.0
    upkeep_s: float = 30.0


@dataclass(frozen=True, slots=True)
class Listeners:
    """Who is told, on the loop.

    `on_commit(operations, latency_s)` after each group, `on_disk(writable)` when the disk begins
    or ceases to refuse writes, `on_death(error)` once, if the thread dies, `on_read(latency_s)`
    after each read.
    """

    on_commit: Callable[[int, float], None] | None = None
    on_read: Callable[[float], None] | None = None
    on_disk: Callable[[bool], None] | None = None
    on_death: Callable[[BaseException], None] | None = None


class Inbox:
    """One writer's; made, `open`ed, `close`d."""

    def __init__(
        self, path: Path, *, clock: Clock, options: LedgerOptions, listeners: Listeners
    ) -> None:
        self.options = options
        self._listeners = listeners
        self._loop = asyncio.get_running_loop()
        self._tickets = itertools.count()
        self._waiting: dict[int, asyncio.Future[object]] = {}
        self._opened: asyncio.Future[Recovery] = self._loop.create_future()
        self._over = asyncio.Event()
        self._down: str | None = None
        self._cause: BaseException | None = None
        self._path = path
        self._refuses = False
        self._hangs = False
        self._writer = Writer(
            path,
            clock=clock,
            retention=options.retention,
            group_limit=options.group_limit,
            busy_s=options.busy_s,
            audit_entries=options.audit_entries,
            deliver=self._deliver,
        )

    async def open(self) -> None:
        """Start the writer; raises what kept it from opening."""
        self._writer.start()
        await asyncio.wait([self._opened], timeout=self.options.commit_timeout_s)
        if not self._opened.done():
            log.warning(
                "the ledger %s is not open after %.1f s: it is large, its disk hangs, or another "
                "program has it locked",
                self._path,
                self.options.commit_timeout_s,
            )
        await self._opened

    @property
    def recovery(self) -> Recovery:
        """What opening had to void."""
        return self._opened.result()

    @property
    def alive(self) -> bool:
        """Whether operations are being taken."""
        return self._down is None

    @property
    def trouble(self) -> str:
        """Why no entry is taken now, in words for anybody; "" where entries are taken."""
        if self._down is not None:
            return "it has failed"
        if self._hangs:
            return "its disk does not answer"
        return "its disk is full or read-only, or another program has it" * self._refuses

    async def watch(self) -> None:
        """Notice a disk that hangs, forever; that it goes on is noticed when it does."""
        while True:
            await asyncio.sleep(_LOOK_S)
            busy_s = self._writer.busy_s
            if busy_s > self.options.commit_timeout_s and not self._hangs:
                self._hangs = True
                log.critical(
                    "the ledger has waited for %.1f s for its disk, which holds %s; jobs are "
                    "refused until it answers (ledger.commit_timeout_s)",
                    busy_s,
                    self._path,
                )
                self._tell_of_disk()

    async def ask(
        self,
        operation: Callable[[Books, Now], T],
        *,
        refusable: bool = True,
        owed: bool = False,
    ) -> T:
        """Wait for an operation; where it is `refusable`, for some time only.

        Raises `QueueFull` where too many wait and `LedgerBlocked` where the disk hangs.
        """
        if refusable and self._hangs:
            raise LedgerBlocked(
                "the ledger's disk does not answer, so nothing was held or charged; ask again soon",
                RETRY_S,
            )
        if refusable and len(self._waiting) >= self.options.inbox_limit:
            raise QueueFull("the ledger is busy; try again", retry_after_s=0.1)
        answer = self.send(operation, owed=owed)
        # Not `asyncio.timeout`, which costs as much as all the rest of asking.
        deadline = self._loop.call_later(self.options.answer_timeout_s, _give_up, answer)
        try:
            return cast("T", await answer)
        finally:
            deadline.cancel()

    def send(self, operation: Operation, *, owed: bool = False) -> asyncio.Future[object]:
        """Submit an operation; the future is its answer."""
        if self._down is not None:
            raise LedgerDown(self._down) from self._cause
        ticket = next(self._tickets)
        answer: asyncio.Future[object] = self._loop.create_future()
        self._waiting[ticket] = answer
        self._writer.submit(ticket, operation, owed=owed)
        return answer

    def tell(self, operation: Operation) -> None:
        """Send an operation whose answer nobody waits for; nothing once the ledger is down."""
        if self._down is None:
            # Reads the error away: a death is reported once, by `_die`.
            self.send(operation, owed=True).add_done_callback(asyncio.Future.exception)

    async def close(self, last: Operation) -> None:
        """Answer what is queued, do one thing more and end the writer; may be repeated.

        Raises `LedgerUnusable` where the disk does not answer: the next start goes on from there.
        """
        if self._down is None:
            self.tell(last)
            self._down = "the ledger is closed"
            self._writer.close()
        try:
            async with asyncio.timeout(self.options.answer_timeout_s):
                await self._over.wait()
        except TimeoutError:
            raise LedgerUnusable(
                f"the ledger {self._path} was not closed: its disk does not answer. What was "
                "acknowledged is there, and what was not is given back at the next start"
            ) from None

    def _deliver(self, report: Report) -> None:
        """Cross from the writer's thread to the loop: once a group, not once an operation."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._receive, report)

    def _receive(self, report: Report) -> None:
        match report:
            case Opened(recovery):
                self._opened.set_result(recovery)
            case Committed(answers, latency_s):
                if self._hangs:
                    self._hangs = False
                    log.warning("the ledger's disk answers again, after %.1f s", latency_s)
                    self._tell_of_disk()
                for answer in answers:
                    self._resolve(answer.ticket, answer.value, answer.error)
                if answers and self._listeners.on_commit is not None:
                    self._listeners.on_commit(len(answers), latency_s)
            case Disk(refusal):
                self._say_of_disk(refusal)
            case Closed():
                self._over.set()
                self._fail_waiting(None)
            case Died(error):
                self._die(error)

    def _say_of_disk(self, refusal: SageFedError | None) -> None:
        self._refuses = refusal is not None
        if refusal is None:
            log.warning("the ledger takes entries again; jobs are admitted")
        else:
            log.critical("%s; jobs are refused until the ledger can be written", refusal.message)
        self._tell_of_disk()

    def _tell_of_disk(self) -> None:
        if self._listeners.on_disk is not None:
            self._listeners.on_disk(not self._refuses and not self._hangs)

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
        if self._listeners.on_death is not None:
            self._listeners.on_death(error)

    def _fail_waiting(self, cause: BaseException | None) -> None:
        for ticket in tuple(self._waiting):
            down = LedgerDown(self._down or "")
            down.__cause__ = cause
            self._resolve(ticket, None, down)


def _give_up(answer: asyncio.Future[object]) -> None:
    if not answer.done():
        answer.set_exception(LedgerDown("the ledger does not answer; its disk may be stuck"))
