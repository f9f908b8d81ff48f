"""Work that would hold the event loop for too long, in threads, in a fair order of accounts.

Owns the order and the bounds: which account is next is decided by the size of what was done for
it (start-time fair queueing), not by the number of its calls, so that neither long calls nor many
of them hold up another account; and an account that has as much waiting as it may is refused.
Sizes are characters, or what takes about as long as one: a microsecond.
One of the two threads takes small work only, so that a long piece holds up no short ones.
While jobs of others run, an account's work rests for three times as long as it took: Python's
part of it keeps the event loop waiting, and the rest of it takes a core that a job could have.

Event loop only; the work itself runs in a thread, and must not touch what the loop owns.
Does not know what the work is. Fails with `RateLimited`, and with what the work raises.
"""

from __future__ import annotations

import asyncio
import functools
import math
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Self, TypeVar

from sage_fed.core import counted
from sage_fed.errors import RateLimited

T = TypeVar("T")

SMALL_SIZE = 16_384
"""What the second thread takes at most; some 10 ms."""

_CALL_SIZE = 256
"""What a call costs besides its size: the way to a thread and back."""

_SIZE_PER_S = 1_000_000
"""About what a thread does, to say when to ask again."""

_SHORTEST_RETRY_S = 0.1

_PART = 4
"""An account's work takes a thread for one in so many seconds at most, while others have jobs."""

_AHEAD_S = 0.02
"""How much rest an account may owe and go on: who asks for little never waits."""

_LOOK_S = 0.05
"""Between two looks at whether others still have jobs, while an account rests for them."""

_CALM_S = 0.5
"""Others that had jobs so lately count as having some: between two jobs a client has none."""


@dataclass(slots=True, eq=False)
class _Piece:
    """One piece of work."""

    size: int
    work: Callable[[], Any]
    done: asyncio.Future[Any]
    took_s: float = 0.0

    def do(self) -> Any:  # noqa: ANN401 - the work's own
        """Do it, and note how long that took."""
        began_s = time.monotonic()
        try:
            return self.work()
        finally:
            self.took_s = time.monotonic() - began_s


@dataclass(slots=True)
class _Account:
    """What waits for one account; `served` is how far it has been served, in virtual time.

    `rested_s` is when it will have rested from what was done, `rivals_s` when others last had jobs
    (`time.monotonic()`).
    """

    name: str
    served: int
    rested_s: float = 0.0
    rivals_s: float = -math.inf
    waiting: deque[_Piece] = field(default_factory=deque)

    def first(self, *, small_only: bool) -> _Piece | None:
        """Return what a thread is to do next for it."""
        largest = SMALL_SIZE if small_only else math.inf
        return next((piece for piece in self.waiting if piece.size <= largest), None)


class Workers:
    """Two threads and what waits for them; a context that ends them.

    Args:
        max_calls: pieces of one account that may wait where `require_room` is asked.
        max_size: their size together.
        on_refused: told of each refusal.
        has_rivals: whether accounts other than this one have jobs now.
    """

    def __init__(
        self,
        *,
        max_calls: int,
        max_size: int,
        on_refused: Callable[[], None] = lambda: None,
        has_rivals: Callable[[str], bool] = lambda _: False,
    ) -> None:
        self._max_calls = max_calls
        self._max_size = max_size
        self._on_refused = on_refused
        self._has_rivals = has_rivals
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="sage-fed-worker")
        self._accounts: dict[str, _Account] = {}
        self._now = 0
        # Which threads have nothing to do, by whether they take small work only.
        self._idle = [True, False]
        self._look: asyncio.TimerHandle | None = None

    def require_room(self, account: str, size: int) -> None:
        """Refuse a call of an account that has as much waiting as it may.

        What is larger than all that may wait is let in where nothing else does.

        Raises:
            RateLimited: it says when there may be room.
        """
        known = self._accounts.get(account)
        if known is None or not known.waiting:
            return
        size_waiting = sum(piece.size for piece in known.waiting)
        if len(known.waiting) >= self._max_calls:
            limit, allowed, what = "max_waiting_calls", self._max_calls, "call"
        elif size_waiting + size > self._max_size:
            limit, allowed, what = "max_waiting_chars", self._max_size, "character"
        else:
            return
        self._on_refused()
        busy = sum(1 for other in self._accounts.values() if other.waiting)
        if self._had_rivals(known):
            busy = max(busy, _PART)
        raise RateLimited(
            f"account {account} may have {counted(allowed, what)} waiting to be encoded",
            account=account,
            limit=limit,
            allowed=allowed,
            retry_after_s=max(size_waiting * busy / _SIZE_PER_S, _SHORTEST_RETRY_S),
        )

    async def run(self, account: str, size: int, work: Callable[[], T]) -> T:
        """Return what `work` does in a thread, when it is the account's turn.

        Cancelled while it waits, it is not done at all.
        """
        done: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        piece = _Piece(size, work, done)
        owner = self._accounts.get(account)
        if owner is None:
            owner = self._accounts[account] = _Account(account, self._now)
        elif not owner.waiting:
            # One that did not ask for a while has saved nothing up.
            owner.served = max(owner.served, self._now)
        owner.waiting.append(piece)
        self._fill()
        try:
            return await done
        finally:
            # One that has begun waits no more. Not by the error of `remove`: its text has the repr
            # of the piece in it, and so of the whole result.
            if piece in owner.waiting:
                owner.waiting.remove(piece)

    def _fill(self) -> None:
        """Give every idle thread what is next for it."""
        for small_only in tuple(self._idle):
            taken = self._take(small_only=small_only)
            if taken is not None:
                self._idle.remove(small_only)
                owner, piece = taken
                running = asyncio.get_running_loop().run_in_executor(self._threads, piece.do)
                running.add_done_callback(
                    functools.partial(self._ended, owner, piece, small_only=small_only)
                )

    def _take(self, *, small_only: bool) -> tuple[_Account, _Piece] | None:
        """Take the first piece of the account that was served least, of those that do not rest."""
        waiting = [
            (owner, piece)
            for owner in self._accounts.values()
            if (piece := owner.first(small_only=small_only)) is not None
        ]
        ready = [found for found in waiting if not self._rests(found[0])]
        if not ready:
            if waiting and self._look is None:
                self._look = asyncio.get_running_loop().call_later(
                    min(self._owed_s(owner) for owner, _ in waiting), self._look_again
                )
            return None
        owner, piece = min(ready, key=lambda found: found[0].served)
        owner.waiting.remove(piece)
        self._now = max(self._now, owner.served)
        owner.served += piece.size + _CALL_SIZE
        return owner, piece

    def _rests(self, owner: _Account) -> bool:
        return self._owed_s(owner) > 0 and self._had_rivals(owner)

    def _had_rivals(self, owner: _Account) -> bool:
        """Whether others have jobs, or had some lately."""
        now_s = time.monotonic()
        if self._has_rivals(owner.name):
            owner.rivals_s = now_s
        return now_s - owner.rivals_s < _CALM_S

    @staticmethod
    def _owed_s(owner: _Account) -> float:
        """Return for how long it has to rest yet, up to the next look."""
        return min(owner.rested_s - time.monotonic() - _AHEAD_S, _LOOK_S)

    def _look_again(self) -> None:
        self._look = None
        self._fill()

    def _ended(
        self, owner: _Account, piece: _Piece, future: asyncio.Future[Any], *, small_only: bool
    ) -> None:
        if self._had_rivals(owner):
            rest_s = (_PART - 1) * piece.took_s
            owner.rested_s = max(owner.rested_s, time.monotonic()) + rest_s
        self._idle.append(small_only)
        self._idle.sort(reverse=True)  # the thread for small work takes what both could
        if not future.cancelled():
            error = future.exception()
            if piece.done.done():
                pass  # its caller was cancelled
            elif error is not None:
                piece.done.set_exception(error)
            else:
                piece.done.set_result(future.result())
        self._fill()
        self._forget()

    def _forget(self) -> None:
        """Drop accounts about which nothing is left to know."""
        # While a thread is at work, one that was served beyond `_now` must not be served as new.
        idle, now_s = len(self._idle) == 2, time.monotonic()
        for name, owner in tuple(self._accounts.items()):
            if owner.waiting or owner.rested_s > now_s:
                continue
            if idle or owner.served <= self._now:
                del self._accounts[name]

    def close(self) -> None:
        """End the threads, after what they do now; what still waits is not done."""
        if self._look is not None:
            self._look.cancel()
            self._look = None
        self._threads.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
