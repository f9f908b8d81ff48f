"""The ledger's thread: the only one that touches the database.

Owns the connection and the group commit: whatever waits in the inbox goes into one transaction,
each operation of several in a savepoint of its own, so that a refused one does not undo its
neighbours, and one `fsync` pays for all of them. Answers leave only after the commit.
Knows no asyncio: what it has to say goes through `deliver`, called on this thread.
An error that an operation raises is its answer, and nothing of the operation stays.
An `apsw` error, a failed commit or a lost file ends the thread: the group is rolled back, or was
written where nobody finds it, `Died` is the last thing said, and every unanswered operation has
failed.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import apsw

from sage_fed.errors import LedgerCorrupt
from sage_fed.ledger import store
from sage_fed.ledger.books import Books
from sage_fed.ledger.check import balance_violations
from sage_fed.ledger.clock import Clock, Now
from sage_fed.ledger.requests import Retention
from sage_fed.ledger.words import Recovery

Operation = Callable[[Books, Now], object]


@dataclass(frozen=True, slots=True)
class Answer:
    """The end of the operation with this ticket: a value or the error it raised."""

    ticket: int
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
class Closed:
    """Every operation was answered and the file is closed."""


@dataclass(frozen=True, slots=True)
class Died:
    """The thread is over; nothing of the group it had taken was acknowledged."""

    error: BaseException


Report = Opened | Committed | Closed | Died


class Writer:
    """A thread with an inbox; `start` it, `submit` to it, `close` it."""

    def __init__(
        self,
        path: Path,
        *,
        clock: Clock,
        retention: Retention,
        group_limit: int,
        deliver: Callable[[Report], None],
    ) -> None:
        self._path = path
        self._clock = clock
        self._retention = retention
        self._group_limit = group_limit
        self._deliver = deliver
        self._inbox: queue.SimpleQueue[tuple[int, Operation] | None] = queue.SimpleQueue()
        # Daemonic: a process that ends without `close` is a crash, which the books survive.
        self._thread = threading.Thread(target=self._run, name="ledger", daemon=True)

    def start(self) -> None:
        """Begin; the first report is `Opened` or `Died`."""
        self._thread.start()

    def submit(self, ticket: int, operation: Operation) -> None:
        """Queue an operation; its `Answer` carries the ticket. The sender bounds the queue."""
        self._inbox.put((ticket, operation))

    def close(self) -> None:
        """End after what is queued; the last report is `Closed` or `Died`."""
        self._inbox.put(None)

    def _run(self) -> None:
        try:
            with store.writable(self._path) as (db, files):
                books = Books(db, self._retention)
                with db:
                    recovery = self._recover(db, books)
                self._deliver(Opened(recovery))
                for group in self._groups():
                    files.verify()
                    committed = self._commit(db, books, group)
                    # An answer says that it is on disk: not in a file that nobody can find.
                    files.verify()
                    self._deliver(committed)
        except BaseException as error:  # noqa: BLE001 - the thread's last line of defence
            self._deliver(Died(error))
        else:
            self._deliver(Closed())

    def _recover(self, db: apsw.Connection, books: Books) -> Recovery:
        violations = balance_violations(db)
        if violations:
            raise LedgerCorrupt(
                f"the books of {self._path} do not balance: {'; '.join(violations)}"
            )
        return books.void_orphans(self._clock.now())

    def _groups(self) -> Iterator[list[tuple[int, Operation]]]:
        item = self._inbox.get()
        while item is not None:
            group = [item]
            while len(group) < self._group_limit and not self._inbox.empty():
                item = self._inbox.get()
                if item is None:
                    break
                group.append(item)
            yield group
            if item is not None:
                item = self._inbox.get()

    def _commit(
        self, db: apsw.Connection, books: Books, group: list[tuple[int, Operation]]
    ) -> Committed:
        began_s = time.perf_counter()
        now = self._clock.now()
        db.execute("BEGIN")
        try:
            if len(group) == 1:
                # The transaction is its savepoint: two statements less, which is what a request
                # waits for that comes alone.
                answers: tuple[Answer, ...] = (_answer(books, now, *group[0]),)
                db.execute("ROLLBACK" if answers[0].error else "COMMIT")
            else:
                answers = tuple(_answer_among(db, books, now, *item) for item in group)
                db.execute("COMMIT")
        except BaseException:
            # A full disk has rolled back already.
            if db.in_transaction:
                db.execute("ROLLBACK")
            raise
        return Committed(answers, time.perf_counter() - began_s)


def _answer_among(
    db: apsw.Connection, books: Books, now: Now, ticket: int, operation: Operation
) -> Answer:
    """Do one operation of several, which stay whatever becomes of it."""
    db.execute("SAVEPOINT operation")
    answer = _answer(books, now, ticket, operation)
    if answer.error is not None:
        db.execute("ROLLBACK TO operation")
    db.execute("RELEASE operation")
    return answer


def _answer(books: Books, now: Now, ticket: int, operation: Operation) -> Answer:
    try:
        return Answer(ticket, operation(books, now), None)
    except apsw.Error:
        raise
    except Exception as error:  # noqa: BLE001 - also a bug of the caller's `decide` goes to it
        return Answer(ticket, None, error)
