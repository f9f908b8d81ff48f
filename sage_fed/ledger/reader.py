"""The ledger's second thread: reads of the books, beside the writer and never before it.

Owns a read-only connection and the reads that wait, in one line per account; the thread takes the
next account's oldest in turn, so no account's reads wait for more than one of each other account.
An account whose read took long rests for as long before its next.
An account has so many waiting at most; one more is refused with `QueueFull`.
Each read is a transaction of its own, which sees every commit that was acknowledged before it.
Knows no operation and decides nothing about a failing file: a read that its connection could not
do ends with `Unreadable`, and the writer, whose file it is, is asked then.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar, cast

import apsw

from sage_fed.errors import LedgerDown, LedgerUnusable, QueueFull
from sage_fed.ledger import store
from sage_fed.ledger.books import Books
from sage_fed.ledger.clock import Clock, Now
from sage_fed.ledger.files import OpenFiles

T = TypeVar("T")
Read = Callable[[Books, Now], object]

_RETRY_S = 1.0
"""When an account that has too many reads waiting may ask again: some of them are done by then."""


_SHORT_S = 0.001
_LONGEST_REST_S = 0.05
"""Between a read that took longer than short and the same account's next lies as long again: a page
is made in Python, and the event loop, which wants the interpreter too, is to have half of it."""


class Unreadable(Exception):
    """The connection could not do a read; the writer finds out what that means."""


@dataclass(frozen=True, slots=True, eq=False)
class _Waiting:
    account: str
    read: Read
    answer: asyncio.Future[object]
    since_s: float


class Reader:
    """A thread; `open` it behind the writer, `ask` it, `close` it. Belongs to the loop."""

    def __init__(
        self,
        path: Path,
        *,
        clock: Clock,
        account_reads: int,
        answer_timeout_s: float,
        on_read: Callable[[float], None] | None,
    ) -> None:
        self._path = path
        self._clock = clock
        self._account_reads = account_reads
        self._answer_timeout_s = answer_timeout_s
        self._on_read = on_read
        self._loop = asyncio.get_running_loop()
        # Guards the lines, which the loop fills and the thread empties.
        self._change = threading.Condition()
        self._lines: OrderedDict[str, deque[_Waiting]] = OrderedDict()
        self._closed = False
        # The thread's own.
        self._db: apsw.Connection | None = None
        self._files: OpenFiles
        self._rests_until_s: dict[str, float] = {}
        self._thread = threading.Thread(target=self._run, name="ledger-reads", daemon=True)

    def open(self) -> None:
        """Start; the books have been opened by their writer."""
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
            line = self._lines.setdefault(account, deque())
            if refusable and len(line) >= self._account_reads:
                raise QueueFull(
                    f"{len(line)} reads of this account's books wait, which is its limit; "
                    "ask again soon",
                    _RETRY_S,
                )
            line.append(waiting)
            self._change.notify()
        deadline = self._loop.call_later(self._answer_timeout_s, _give_up, waiting.answer)
        try:
            return cast("T", await waiting.answer)
        finally:
            deadline.cancel()
            self._withdraw(account, waiting)

    async def close(self) -> None:
        """End the thread; what still waits is left to the writer. May be repeated."""
        with self._change:
            self._closed = True
            left = [waiting for line in self._lines.values() for waiting in line]
            self._lines.clear()
            self._change.notify()
        for waiting in left:
            _end(waiting.answer, None, Unreadable())
        if self._thread.ident is not None:
            await asyncio.to_thread(self._thread.join, self._answer_timeout_s)

    def _withdraw(self, account: str, waiting: _Waiting) -> None:
        """Take out a read whose client is gone: it must not cost the others their turn."""
        with self._change:
            line = self._lines.get(account)
            if line is None:
                return
            # Looked for first: the error that removes nothing would spell out the whole answer.
            if waiting in line:
                line.remove(waiting)
            if not line:
                del self._lines[account]

    def _run(self) -> None:
        while (waiting := self._next()) is not None:
            began_s = time.perf_counter()
            try:
                value = self._read(waiting.read)
            except Exception as error:  # noqa: BLE001 - an error that a read raises is its answer
                self._tell(waiting, None, error)
            else:
                self._tell(waiting, value, None)
            ended_s = time.perf_counter()
            if (took_s := ended_s - began_s) > _SHORT_S:
                rest_s = min(took_s, _LONGEST_REST_S)
                self._rests_until_s[waiting.account] = ended_s + rest_s
        self._disconnect()

    def _read(self, read: Read) -> object:
        try:
            if self._db is None:
                self._db = store.connect_reader(self._path)
                self._files = store.files_of(self._db)
            # What is read in a file that nobody can find is not what the books say.
            self._files.verify()
            self._db.execute("BEGIN")
            try:
                value = read(Books(self._db), self._clock.now())
            finally:
                self._db.execute("ROLLBACK")
        except (apsw.Error, LedgerUnusable, OSError) as error:
            self._disconnect()
            raise Unreadable from error
        return value

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
                account = next((name for name in self._lines if name not in rests), None)
                if account is not None:
                    break
                # All that wait rest, or nobody waits.
                first_s = min((rests[name] for name in self._lines), default=None)
                self._change.wait(None if first_s is None else first_s - now_s)
            else:
                return None
            line = self._lines.pop(account)
            waiting = line.popleft()
            if line:
                self._lines[account] = line  # behind the others
            return waiting

    def _tell(self, waiting: _Waiting, value: object, error: Exception | None) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._receive, waiting, value, error)

    def _receive(self, waiting: _Waiting, value: object, error: Exception | None) -> None:
        _end(waiting.answer, value, error)
        if self._on_read is not None:
            self._on_read(time.perf_counter() - waiting.since_s)


def _end(answer: asyncio.Future[object], value: object, error: Exception | None) -> None:
    if answer.done():  # its waiter was cancelled, or gave up
        return
    if error is None:
        answer.set_result(value)
    else:
        answer.set_exception(error)


def _give_up(answer: asyncio.Future[object]) -> None:
    _end(answer, None, LedgerDown("the ledger does not answer; its disk may be stuck"))
