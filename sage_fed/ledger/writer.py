"""The ledger's thread: the only one that touches the database.

Owns the connection and the group commit: whatever waits in the inbox goes into one transaction,
each operation of several in a savepoint of its own, so that a refused one does not undo its
neighbours, and one `fsync` pays for all of them. Answers leave only after the commit.
Knows no asyncio: what it has to say goes through `deliver`, called on this thread.
An error that an operation raises is its answer, and nothing of the operation stays.
A disk that takes no writes, because it is full or read-only, blocks, and so does another program
that has the file locked for longer than `busy_s`: what can be refused is, with `LedgerBlocked`,
what is owed (the end of a hold) is tried again until it is written, and reads go on. Any other
`apsw` error or failed commit, and a lost file, ends the thread: the group is rolled back, or was
written into a file that has lost its name, `Ended` with the error is the last report, and every
unanswered operation has failed.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from asyncio import Future
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import apsw

from sage_fed.errors import LedgerBlocked, LedgerCorrupt, LedgerUnusable
from sage_fed.ledger.books import Books
from sage_fed.ledger.check import BALANCES, ENDS, audit, auditing, num_folded
from sage_fed.ledger.entries import Clock, LedgerOptions, Now, Recovery
from sage_fed.ledger.ledger_files import OpenBook, may_pass, unusable, writable
from sage_fed.ledger.schema import last_entry_id, writing

Operation = Callable[[Books, Now], object]

_AGAIN_S = 0.5
"""How often a ledger that took nothing is tried again."""

RETRY_S = 5.0
"""When a client that was refused may ask again."""


@dataclass(frozen=True, slots=True)
class Item:
    """An operation under way, and its waiter, which the thread only hands back; None: it has none.

    What is `owed` has to be done, however long the disk takes nothing.
    """

    waiter: Future[Any] | None
    operation: Operation
    owed: bool = False


_PROOF = Item(None, lambda books, _: books.prove_writable(), owed=True)


@dataclass(frozen=True, slots=True)
class Answer:
    """The end of an operation: a value or the error it raised."""

    waiter: Future[Any] | None
    value: object
    error: Exception | None


@dataclass(frozen=True, slots=True)
class Opened:
    """The books are open, balanced and without orphans."""

    recovery: Recovery


@dataclass(frozen=True, slots=True)
class Committed:
    """One group is durable; `latency_s` is from taking it to the end of its commit."""

    answers: tuple[Answer, ...]
    latency_s: float


@dataclass(frozen=True, slots=True)
class Disk:
    """The disk has begun to take nothing, for this reason; None: it takes entries again."""

    refusal: LedgerUnusable | None


@dataclass(frozen=True, slots=True)
class Ended:
    """The thread is over: the file is closed, or of its last group nothing was acknowledged."""

    error: BaseException | None


Report = Opened | Committed | Disk | Ended


class Writer:
    """A thread with an inbox; `start` it, `submit` to it, `close` it."""

    def __init__(
        self,
        path: Path,
        clock: Clock,
        options: LedgerOptions,
        deliver: Callable[[Report], None],
    ) -> None:
        self._path = path
        self._clock = clock
        self._options = options
        self._busy_ms = round(options.busy_s * 1000)
        self._deliver = deliver
        self._inbox: queue.SimpleQueue[Item | LedgerCorrupt | None] = queue.SimpleQueue()
        self._owed: list[Item] = []
        self._busy_since_s: float | None = None
        # Daemonic: a process that ends without `close` is a crash, which the books survive.
        self._thread = threading.Thread(target=self._run, name="ledger", daemon=True)

    def start(self) -> None:
        """Begin; the first report is `Opened` or `Ended`."""
        self._thread.start()

    def submit(self, waiter: Future[Any], operation: Operation, *, owed: bool = False) -> None:
        """Queue an operation; its `Answer` carries the waiter. The sender bounds the queue."""
        self._inbox.put(Item(waiter, operation, owed))

    @property
    def busy_s(self) -> float:
        """For how long the group that is being committed has been; 0 between groups."""
        # Read once: the thread swaps it whole, at any time.
        since_s = self._busy_since_s
        return 0.0 if since_s is None else time.monotonic() - since_s

    def close(self) -> None:
        """End after what is queued; the last report is `Ended`."""
        self._inbox.put(None)

    def _run(self) -> None:
        failure: BaseException | None = None
        try:
            with (
                writable(self._path, self._require_balance) as book,
                contextlib.ExitStack() as stack,
            ):
                books = Books(book.db, self._options.retention)
                with writing(book.db):
                    recovery = self._recover(book, books, stack)
                self._deliver(Opened(recovery))
                book.db.set_busy_timeout(self._busy_ms)
                for group in self._groups():
                    self._busy_since_s = time.monotonic()
                    book.verify()
                    committed = self._commit_or_refuse(books, group)
                    # An answer says that it is on disk: not in a file that has lost its name.
                    book.verify()
                    book.acknowledge()
                    self._busy_since_s = None
                    self._deliver(committed)
        except BaseException as error:  # noqa: BLE001 - the thread's last line of defence
            failure = error
        self._deliver(Ended(failure))

    def _recover(self, book: OpenBook, books: Books, stack: contextlib.ExitStack) -> Recovery:
        """Prove what a start has time for, have the rest proved, and give back what was left."""
        num_entries = last_entry_id(book.db) - num_folded(book.db)
        if book.doubted or num_entries <= self._options.audit_entries:
            self._require_balance(book.db)
        elif violations := audit(book.db, ENDS):
            raise self._unbalanced(violations)
        else:
            stack.enter_context(auditing(self._path, self._condemn))
        return books.recover(self._clock.now())

    def _require_balance(self, db: apsw.Connection) -> None:
        if violations := audit(db, BALANCES):
            raise self._unbalanced(violations)

    def _unbalanced(self, violations: tuple[str, ...]) -> LedgerCorrupt:
        return LedgerCorrupt(f"the books of {self._path} do not balance: {'; '.join(violations)}")

    def _condemn(self, violations: tuple[str, ...]) -> None:
        """Have the thread end as the start would have; called on the audit's."""
        self._inbox.put(self._unbalanced(violations))

    def _groups(self) -> Iterator[list[Item]]:
        """What waits, behind what is still owed, until the inbox is closed."""
        closed = False
        while not closed:
            group = list(self._owed)
            closed = self._take(group)
            if group:
                yield group

    def _take(self, group: list[Item]) -> bool:
        """Append what waits in the inbox, at least one where nothing is owed; True at its end."""
        timeout_s = _AGAIN_S if group else None
        with contextlib.suppress(queue.Empty):
            while item := self._inbox.get(timeout=timeout_s):
                if isinstance(item, LedgerCorrupt):
                    raise item
                group.append(item)
                if len(group) >= self._options.group_limit or self._inbox.empty():
                    return False
            return True
        return False

    def _commit_or_refuse(self, books: Books, group: list[Item]) -> Committed:
        """Commit a group; where the ledger takes nothing, as much of it as goes by itself."""
        began_s = time.perf_counter()
        blocked = bool(self._owed)
        # Another program was waited for once; meanwhile reads must not wait as long again.
        books.db.set_busy_timeout(0 if blocked else self._busy_ms)
        try:
            committed = self._commit(books, group)
        except apsw.Error as error:
            if not may_pass(error):
                raise
            refusal = unusable(self._path, error)
        else:
            self._owed = []
            if blocked:
                self._deliver(Disk(None))
            return committed
        if not blocked:
            self._deliver(Disk(refusal))
        answers: list[Answer] = []
        self._owed = []
        books.db.set_busy_timeout(0)
        for item in (*group, *(() if blocked else (_PROOF,))):
            answers += self._alone(books, item, refusal)
        if not self._owed:
            # It took everything, one by one; only the whole group did not fit.
            self._deliver(Disk(None))
        return Committed(tuple(answers), time.perf_counter() - began_s)

    def _alone(self, books: Books, item: Item, refusal: LedgerUnusable) -> tuple[Answer, ...]:
        """Commit one operation, refuse it, or keep it for later."""
        try:
            return self._commit(books, [item], begin="BEGIN DEFERRED").answers
        except apsw.Error as error:
            if not may_pass(error):
                raise
        if item.owed:
            self._owed.append(item)
            return ()
        blocked = LedgerBlocked(
            "the ledger takes no entries now, so nothing was held or charged; ask again soon",
            RETRY_S,
        )
        blocked.__cause__ = refusal
        return (Answer(item.waiter, None, blocked),)

    def _commit(self, books: Books, group: list[Item], begin: str = "BEGIN IMMEDIATE") -> Committed:
        """Commit a group or nothing of it; begun `DEFERRED`, one that only reads needs no lock."""
        began_s = time.perf_counter()
        with writing(books.db, begin):
            now = self._clock.now()
            if len(group) == 1:
                # The transaction is its savepoint: two statements less, which is what a request
                # waits for that comes alone.
                answers: tuple[Answer, ...] = (_answer(books, now, group[0], "ROLLBACK"),)
            else:
                answers = tuple(_answer_among(books, now, item) for item in group)
        return Committed(answers, time.perf_counter() - began_s)


def _answer_among(books: Books, now: Now, item: Item) -> Answer:
    """Do one operation of several, which stay whatever becomes of it."""
    books.db.execute("SAVEPOINT operation")
    answer = _answer(books, now, item, "ROLLBACK TO operation")
    books.db.execute("RELEASE operation")
    return answer


def _answer(books: Books, now: Now, item: Item, undo: str) -> Answer:
    try:
        return Answer(item.waiter, item.operation(books, now), None)
    except apsw.Error:
        raise
    except Exception as error:  # noqa: BLE001 - also a bug of the caller's `decide` goes to it
        books.db.execute(undo)
        return Answer(item.waiter, None, error)
