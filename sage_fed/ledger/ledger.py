"""The ledger as the event loop sees it: its operations as coroutines, and the reads' own thread.

Owns what each operation is to a waiter: what may be refused, what is owed, what is taken back; the
bounded inbox, the futures, and the ledger's life: opening, serving, closed or dead.
Knows no SQL. All methods belong to the loop that opened it.
An answer means that the operation is on disk. Cancelling the wait for `settle` or `void` does not
take it back; a cancelled `hold` is voided, so that a client that went away reserves no ATP.
What only reads is done beside the writer, in turn with the other accounts' reads, and sees
everything that was answered before it was asked.
While its disk is full or read-only, hangs, or another program has it locked, what needs to be
written is refused with `LedgerBlocked`, but for the ends of holds, which wait; `on_disk` is told
when that begins and ends.
After another failed commit or a lost file the ledger is dead: every wait ends with `LedgerDown`,
whose cause is for the operator only, `on_death` is told once, and only a restart, which audits the
books, brings it back.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypeVar, cast

import apsw

from sage_fed.core import Budget, BudgetChange, PhaseTokens
from sage_fed.errors import (
    InvalidField,
    LedgerBlocked,
    LedgerDown,
    LedgerUnusable,
    QueueFull,
    SageFedError,
)
from sage_fed.ledger.books import Books, Folded
from sage_fed.ledger.entries import (
    AccountTerms,
    Clock,
    HoldReceipt,
    HoldRequest,
    LedgerOptions,
    Now,
    Page,
    Place,
    Recovery,
    Replay,
    RequestKey,
    Settlement,
    system_clock,
)
from sage_fed.ledger.ledger_files import OpenFiles, connect_reader
from sage_fed.ledger.writer import (
    RETRY_S,
    Committed,
    Disk,
    Ended,
    Opened,
    Operation,
    Report,
    Writer,
)

T = TypeVar("T")

MAX_PAGE = 1000

_RESTS = 4
"""How much longer than a step of tidying is the rest behind it: a fifth of the writer at most."""

_OPERATORS = ""
"""Whose turn it is for what no account asks; no account has an empty name."""

_LOOK_S = 0.25
"""Between two looks whether the disk hangs."""

_READS_RETRY_S = 1.0
"""When an account that has too many reads waiting may ask again: some of them are done by then."""

_SHORT_S = 0.001
_LONGEST_REST_S = 0.05
"""Between a read that took longer than short and the same account's next lies as long again: a page
is made in Python, and the event loop, which wants the interpreter too, is to have half of it."""

log = logging.getLogger(__name__)


def _ignore(*_: object) -> None:
    pass


class Ledger:
    """The books at `path`; begun by `open`, ended by `close`.

    Args:
        terms: what the settings give an account now; `set_budget` remembers it.
        on_commit: called on the loop with operations and latency in s, after each group.
        on_disk: with False when writes begin to be refused, with True when they are taken again.
        on_death: with the error, once, if the writer dies.
        on_read: with the latency in s, after each read.
        on_fold: with the number of entries that were folded into days.
    """

    def __init__(
        self,
        path: Path,
        *,
        clock: Clock | None = None,
        options: LedgerOptions | None = None,
        terms: Callable[[str], AccountTerms | None] = lambda _: None,
        on_commit: Callable[[int, float], None] = _ignore,
        on_disk: Callable[[bool], None] = _ignore,
        on_death: Callable[[BaseException], None] = _ignore,
        on_read: Callable[[float], None] = _ignore,
        on_fold: Callable[[int], None] = _ignore,
    ) -> None:
        self._path = path
        self._options = options = options or LedgerOptions()
        self._terms = terms
        self._on_commit = on_commit
        self._on_disk = on_disk
        self._on_death = on_death
        self._on_fold = on_fold
        self._loop = asyncio.get_running_loop()
        self._waiting: set[asyncio.Future[Any]] = set()
        self._opened: asyncio.Future[Recovery] = self._loop.create_future()
        self._over = asyncio.Event()
        self._down: str | None = None
        self._cause: BaseException | None = None
        self._refuses = False
        self._hangs = False
        self._passed_id = 0
        clock = clock or system_clock()
        self._writer = Writer(path, clock, options, self._deliver)
        self._reader = Reader(path, clock, options, on_read)

    async def open(self) -> Self:
        """Open or create the books, check their balance and void orphaned holds.

        Raises `ConfigError` (open elsewhere, not a ledger, too new), `LedgerCorrupt` (damaged or
        lost) and `LedgerUnusable` (no space, no permission).
        """
        self._writer.start()
        await asyncio.wait([self._opened], timeout=self._options.commit_timeout_s)
        if not self._opened.done():
            log.warning(
                "the ledger %s is not open after %.1f s: it is large, its disk hangs, or another "
                "program has it locked",
                self._path,
                self._options.commit_timeout_s,
            )
        await self._opened
        self._reader.start()
        return self

    @property
    def recovery(self) -> Recovery:
        """What opening had to void."""
        return self._opened.result()

    @property
    def max_result_bytes(self) -> int:
        """How large a result may be to be kept for a repeat."""
        return self._options.retention.one_result_bytes

    @property
    def alive(self) -> bool:
        """Whether operations are being taken."""
        return self._down is None

    @property
    def trouble(self) -> str:
        """Why no entry is taken now, in words for a client; "" where entries are taken."""
        if self._down is not None:
            return "it has failed"
        if self._hangs:
            return "its disk does not answer"
        return "its disk is full or read-only, or another program has it" * self._refuses

    async def watch(self) -> None:
        """Notice a disk that hangs, forever; a task of the daemon's group.

        That it goes on is noticed when it does.
        """
        while True:
            await asyncio.sleep(_LOOK_S)
            busy_s = self._writer.busy_s
            if busy_s > self._options.commit_timeout_s and not self._hangs:
                self._hangs = True
                log.critical(
                    "the ledger has waited for %.1f s for its disk, which holds %s; jobs are "
                    "refused until it answers (ledger.commit_timeout_s)",
                    busy_s,
                    self._path,
                )
                self._report_disk()

    async def hold(
        self, key: RequestKey, decide: Callable[[Budget], HoldRequest]
    ) -> HoldReceipt | Replay:
        """Reserve what `decide` asks for at the balance of that instant; see `Books.hold`.

        `decide` is called on the ledger's thread: it must be quick and read only what it owns.
        Also raises `QueueFull`.
        """
        receipt: HoldReceipt | Replay | None = None

        def hold(books: Books, now: Now) -> HoldReceipt | Replay:
            nonlocal receipt
            receipt = books.hold(key, decide, now)
            return receipt

        def undo(books: Books, now: Now) -> None:
            # Behind the hold in the same inbox, so `receipt` is known by then.
            if isinstance(receipt, HoldReceipt):
                books.void(receipt.job_id, "abandoned", now)

        try:
            return await self._ask(hold)
        except LedgerBlocked:
            raise  # nothing was held
        except (asyncio.CancelledError, LedgerDown):
            self._tell(undo)
            raise

    async def settle(
        self,
        job_id: str,
        charged_uatp: int,
        outcome: str,
        result: bytes | None = None,
        usage: Sequence[PhaseTokens] = (),
    ) -> Settlement:
        return await self._ask(
            lambda books, now: books.settle(
                job_id, charged_uatp, outcome, result, now, usage=usage
            ),
            refusable=False,
            owed=True,
        )

    async def void(self, job_id: str, reason: str) -> Settlement:
        return await self._ask(
            lambda books, now: books.void(job_id, reason, now), refusable=False, owed=True
        )

    async def expire_due(self, alive: frozenset[str] = frozenset()) -> tuple[str, ...]:
        """Give back holds past their time to live but those of `alive` jobs; see `Books`."""
        return await self._ask(lambda books, now: books.expire_due(now, alive), refusable=False)

    async def lookup_request(self, key: RequestKey) -> Replay | None:
        """The kept result of the same request; see `Requests.find`. `hold` looks again."""
        return await self._read(key.account, lambda books, _: books.requests.find(key))

    async def budget(self, account: str, *, refusable: bool = True) -> Budget:
        """The account's books now, refill included; `NoSuchAccount`, and `QueueFull`."""
        return await self._read(
            account,
            lambda books, now: books.accounts.read(account).refilled(now).budget(),
            refusable=refusable,
        )

    async def ensure_account(self, account: str, terms: AccountTerms) -> Budget:
        """Create an account of the settings, or apply what they changed; see `Accounts.ensure`."""
        return await self._ask(lambda books, now: books.accounts.ensure(account, terms, now))

    async def set_budget(self, account: str, change: BudgetChange) -> Budget:
        """Create an account or change it, by an operator; see `Accounts.set_budget`."""
        terms = self._terms(account)
        return await self._ask(
            lambda books, now: books.accounts.set_budget(account, change, now, terms)
        )

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

    async def run_upkeep(self, alive: Callable[[], frozenset[str]]) -> None:
        """Expire, persist refill marks and tidy, forever; a task of the daemon's group.

        `alive` names the jobs that will end their holds themselves. A hold that is asked for
        after it was called is behind the upkeep in the inbox, so none is missed.
        """
        while True:
            await asyncio.sleep(self._options.upkeep_s)
            try:
                if expired := await self.expire_due(alive()):
                    log.warning("expired %d holds that no job ended", len(expired))
                await self._keep_marks()
                await self.tidy(self._options.upkeep_s)
            except LedgerDown:
                if not self.alive:
                    raise
                # Said already; the next round does what this one could not.

    async def _keep_marks(self) -> None:
        def keep(books: Books, now: Now) -> str:
            return books.accounts.keep_marks(now, after=after)

        after = ""
        while after := await self._ask(keep, refusable=False):
            pass

    async def tidy(self, for_s: float = math.inf) -> int:
        """Forget and fold what is past its retention, beside the traffic; the entries folded.

        In steps, each an operation among the others', with a rest of several times as long, and
        for so many seconds; what is left then is the next call's.
        """

        def tidy(books: Books, now: Now) -> tuple[Folded, float]:
            began_s = time.perf_counter()
            return books.tidy(now, step.passed_id), time.perf_counter() - began_s

        entries, step = 0, Folded(0, self._passed_id, more=True)
        until_s = time.monotonic() + for_s
        while step.more:
            step, took_s = await self._ask(tidy, refusable=False)
            entries += step.entries
            if step.entries:
                self._on_fold(step.entries)
            if time.monotonic() > until_s:
                break
            await asyncio.sleep(took_s * _RESTS)
        # From the front again, once it came to what is not old: holds that it passed have ended.
        self._passed_id = step.passed_id if step.more else 0
        return entries

    async def close(self) -> None:
        """Answer what is queued, persist refill marks and close the file; may be repeated.

        Raises `LedgerUnusable` where the disk does not answer: the next start goes on from there.
        """
        await self._reader.close()
        if self._down is None:
            self._tell(lambda books, now: books.accounts.keep_marks(now, age_ns=0, limit=-1))
            self._down = "the ledger is closed"
            self._writer.close()
        try:
            async with asyncio.timeout(self._options.answer_timeout_s):
                await self._over.wait()
        except TimeoutError:
            raise LedgerUnusable(
                f"the ledger {self._path} was not closed: its disk does not answer. What was "
                "acknowledged is there, and what was not is given back at the next start"
            ) from None

    async def _read(
        self, account: str, read: Callable[[Books, Now], T], *, refusable: bool = True
    ) -> T:
        if self.alive:
            with contextlib.suppress(Unreadable):
                return await self._reader.ask(account, read, refusable=refusable)
        # Whatever is wrong with the file, its writer notices at this, and says so.
        return await self._ask(read, refusable=refusable)

    async def _ask(
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
        if refusable and len(self._waiting) >= self._options.inbox_limit:
            raise QueueFull("the ledger is busy; try again", retry_after_s=0.1)
        answer = self._send(operation, owed=owed)
        return cast("T", await _answered(answer, self._options.answer_timeout_s))

    def _send(self, operation: Operation, *, owed: bool = False) -> asyncio.Future[Any]:
        """Submit an operation; the future is its answer."""
        if self._down is not None:
            raise LedgerDown(self._down) from self._cause
        answer: asyncio.Future[Any] = self._loop.create_future()
        self._waiting.add(answer)
        self._writer.submit(answer, operation, owed=owed)
        return answer

    def _tell(self, operation: Operation) -> None:
        """Send an operation whose answer has no waiter; nothing once the ledger is down."""
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
                if self._hangs:
                    self._hangs = False
                    log.warning("the ledger's disk answers again, after %.1f s", latency_s)
                    self._report_disk()
                for answer in answers:
                    self._waiting.discard(answer.waiter)
                    _end(answer.waiter, answer.value, answer.error)
                if answers:
                    self._on_commit(len(answers), latency_s)
            case Disk(refusal):
                self._refuses = refusal is not None
                if refusal is None:
                    log.warning("the ledger takes entries again; jobs are admitted")
                else:
                    log.critical(
                        "%s; jobs are refused until the ledger can be written", refusal.message
                    )
                self._report_disk()
            case Ended(error):
                self._over.set()
                if error is not None:
                    self._die(error)
                self._fail_waiting(error)

    def _report_disk(self) -> None:
        self._on_disk(not self._refuses and not self._hangs)

    def _die(self, error: BaseException) -> None:
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
        self._on_death(error)

    def _fail_waiting(self, cause: BaseException | None) -> None:
        for waiter in self._waiting:
            down = LedgerDown(self._down or "")
            down.__cause__ = cause
            _end(waiter, None, down)
        self._waiting.clear()


class Unreadable(Exception):
    """The connection could not do a read; the writer finds out what that means."""


@dataclass(frozen=True, slots=True, eq=False)
class _Waiting:
    account: str
    read: Operation
    answer: asyncio.Future[Any]
    since_s: float


class Reader:
    """The ledger's second thread: reads of the books, beside the writer and never before it.

    Owns a read-only connection and the reads that wait, in one queue per account; the thread takes
    the next account's oldest in turn, so no account's reads wait for more than one of each other
    account. An account whose read took long rests for as long before its next.
    An account has so many waiting at most; one more is refused with `QueueFull`.
    Each read is a transaction of its own, which sees every commit that was acknowledged before it.
    It decides nothing about a failing file: a read that its connection could not do ends with
    `Unreadable`, and the writer, whose file it is, is asked then.
    """

    def __init__(
        self, path: Path, clock: Clock, options: LedgerOptions, on_read: Callable[[float], None]
    ) -> None:
        self._path = path
        self._clock = clock
        self._account_reads = options.account_reads
        self._answer_timeout_s = options.answer_timeout_s
        self._on_read = on_read
        self._loop = asyncio.get_running_loop()
        # Guards the queues, which the loop fills and the thread empties.
        self._change = threading.Condition()
        self._queues: OrderedDict[str, deque[_Waiting]] = OrderedDict()
        self._closed = False
        # The thread's own.
        self._db: apsw.Connection | None = None
        self._files: OpenFiles
        self._rests_until_s: dict[str, float] = {}
        self._thread = threading.Thread(target=self._run, name="ledger-reads", daemon=True)

    def start(self) -> None:
        """Begin; the books have been opened by their writer."""
        self._thread.start()

    async def ask(
        self, account: str, read: Callable[[Books, Now], T], *, refusable: bool = True
    ) -> T:
        """Wait for a read on an account's behalf.

        Raises what it raises, `QueueFull` where it is `refusable` and too many of the account's
        wait, `LedgerDown` where there is no answer in time, and `Unreadable`.
        """
        waiting = _Waiting(account, read, self._loop.create_future(), time.perf_counter())
        with self._change:
            if self._closed:
                raise Unreadable
            # Without those whose client is gone: they take neither room nor a turn.
            left = (read for read in self._queues.get(account, ()) if not read.answer.done())
            queue = self._queues[account] = deque(left)
            if refusable and len(queue) >= self._account_reads:
                raise QueueFull(
                    f"{len(queue)} reads of this account's books wait, which is its limit; "
                    "ask again soon",
                    _READS_RETRY_S,
                )
            queue.append(waiting)
            self._change.notify()
        return cast("T", await _answered(waiting.answer, self._answer_timeout_s))

    async def close(self) -> None:
        """End the thread; what still waits is left to the writer. May be repeated."""
        with self._change:
            self._closed = True
            left = [waiting for queue in self._queues.values() for waiting in queue]
            self._queues.clear()
            self._change.notify()
        for waiting in left:
            _end(waiting.answer, None, Unreadable())
        if self._thread.ident is not None:
            await asyncio.to_thread(self._thread.join, self._answer_timeout_s)

    def _run(self) -> None:
        while (waiting := self._next()) is not None:
            if waiting.answer.done():
                continue
            began_s = time.perf_counter()
            value: object = None
            failure: Exception | None = None
            try:
                value = self._read(waiting.read)
            except Exception as error:  # noqa: BLE001 - an error that a read raises is its answer
                failure = error
            if not self._loop.is_closed():
                self._loop.call_soon_threadsafe(self._receive, waiting, value, failure)
            ended_s = time.perf_counter()
            if (took_s := ended_s - began_s) > _SHORT_S:
                rest_s = min(took_s, _LONGEST_REST_S)
                self._rests_until_s[waiting.account] = ended_s + rest_s
        self._disconnect()

    def _read(self, read: Operation) -> object:
        try:
            if self._db is None:
                self._db = connect_reader(self._path)
                self._files = OpenFiles(self._db)
            # What is read in a file that is not found by its name is not what the books say.
            self._files.verify()
            self._db.execute("BEGIN")
            try:
                return read(Books(self._db), self._clock.now())
            finally:
                self._db.execute("ROLLBACK")
        except (apsw.Error, LedgerUnusable, OSError) as error:
            self._disconnect()
            raise Unreadable from error

    def _disconnect(self) -> None:
        if self._db is not None:
            self._db.close()
            self._db = None

    def _next(self) -> _Waiting | None:
        """The oldest read of the account whose turn it is; None at the end."""
        with self._change:
            while not self._closed:
                now_s = time.perf_counter()
                rests = self._rests_until_s = {
                    account: until_s
                    for account, until_s in self._rests_until_s.items()
                    if until_s > now_s
                }
                account = next((name for name in self._queues if name not in rests), None)
                if account is not None:
                    queue = self._queues.pop(account)
                    waiting = queue.popleft()
                    if queue:
                        self._queues[account] = queue  # behind the others
                    return waiting
                # All that wait rest, or none waits.
                first_s = min((rests[name] for name in self._queues), default=None)
                self._change.wait(None if first_s is None else first_s - now_s)
        return None

    def _receive(self, waiting: _Waiting, value: object, error: Exception | None) -> None:
        _end(waiting.answer, value, error)
        self._on_read(time.perf_counter() - waiting.since_s)


async def _answered(answer: asyncio.Future[Any], timeout_s: float) -> object:
    """Wait for an answer of either thread; `LedgerDown` where there is none in time."""

    def give_up() -> None:
        _end(answer, None, LedgerDown("the ledger does not answer; its disk may be stuck"))

    # Not `asyncio.timeout`, which costs as much as all the rest of asking.
    deadline = answer.get_loop().call_later(timeout_s, give_up)
    try:
        return await answer
    finally:
        deadline.cancel()


def _end(answer: asyncio.Future[Any] | None, value: object, error: BaseException | None) -> None:
    if answer is None or answer.done():  # without a waiter, or it was cancelled or gave up
        return
    if error is None:
        answer.set_result(value)
    else:
        answer.set_exception(error)
