"""What one job hands to its reader: Started, merged Deltas, and exactly one ending.

Owns the hand-over between a job's task (writer) and an RPC handler (reader), both on the
event loop. A reader that falls behind, or that has had its share of the messages, finds its
deltas merged, so memory is bounded by the job's own max_new_tokens and the job is never stalled
by its reader.
Knows nothing of gRPC, tokens or money.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator

from sage_fed.core import Delta, Event, Finished, Logprob, Started
from sage_fed.errors import SageFedError
from sage_fed.jobs.pace import Pace

SHORTEST_REST_S = 0.001
"""An event loop's timers are no finer."""

MOST_IN_MESSAGE = 20_000
"""What one delta may hold (`Delta.size`). With 128 bytes of text for each that is 3 MiB, and a gRPC
client takes 4 unless it is told otherwise."""

_TOKEN_BYTES = 150
_LOGPROB_BYTES = 120
"""What Python keeps for a token's id and text, and for each log-probability beside it, about."""


class JobStream:
    """One job's events, read once: one by one as an iterator, or together by `answer`.

    Iterating yields `Started`, any number of `Delta`, then `Finished`; or raises the
    `SageFedError` that ended the job. Whoever has a stream leaves it with `cancel`, read to its
    end or not; that may be at any time, also twice.
    """

    def __init__(self, on_cancel: Callable[[], None], pace: Pace) -> None:
        self.on_cancel = on_cancel
        """Called when the reader leaves, each time."""
        self._pace = pace
        self._resting = False
        self._waiter: asyncio.Future[None] | None = None
        self._started: Started | None = None
        self._deltas: list[Delta] = []
        self._ending: Finished | SageFedError | None = None
        self._ended = False
        self.away_since_s = 0.0
        """When the reader went off with an event (`time.monotonic()`); 0 while it waits here."""

    def cancel(self) -> None:
        """Say that nobody reads any more; where the job still runs, it stops and settles."""
        self._pace.leave(self)
        # A handler that hangs in its last write keeps the stream, but not what nobody will read.
        self._deltas.clear()
        self.on_cancel()

    @property
    def job_id(self) -> str:
        """The job's id, once it is accepted."""
        return self._started.job_id if self._started is not None else ""

    @property
    def kept_bytes(self) -> int:
        """What is kept for a reader that is behind, about."""
        if not self._deltas:
            return 0
        first, last = self._deltas[0], self._deltas[-1]
        num_tokens = last.output_tokens - first.output_tokens + len(first.token_ids)
        alternatives = 1 + len(last.logprobs[0].top) if last.logprobs else 0
        return num_tokens * (_TOKEN_BYTES + alternatives * _LOGPROB_BYTES)

    @property
    def ended(self) -> bool:
        """Whether the ending is written (it may not have been read yet)."""
        return self._ended

    def start(self, started: Started) -> None:
        """Write the first event."""
        assert self._started is None
        assert not self._ended
        self._started = started
        self._wake()

    def push(self, delta: Delta) -> None:
        """Write output; merged with whatever the reader has not taken yet."""
        assert self._started is not None
        assert not self._ended
        self._deltas.append(delta)
        if not self._resting:
            self._wake()

    def end(self, ending: Finished | SageFedError) -> None:
        """Write the one ending."""
        assert not self._ended, "a job ends exactly once"
        self._ending = ending
        self._ended = True
        self._wake()

    async def admitted(self) -> None:
        """Wait until the job is accepted.

        Raises:
            SageFedError: the job was refused instead.
        """
        while self._started is None and not self._ended:
            await self._wait()
        if self._started is None:
            self._raise_error()

    async def answer(self) -> tuple[Started, Delta, Finished]:
        """Wait for the whole answer, for a reader who has no use for its parts.

        Raises:
            SageFedError: what ended the job instead.
        """
        await self.admitted()
        self._resting = True
        while not self._ended:
            await self._wait()
        self._raise_error()
        assert self._started is not None
        assert isinstance(self._ending, Finished)
        return self._started, merge(self._deltas), self._ending

    async def __aiter__(self) -> AsyncIterator[Event]:
        await self.admitted()
        assert self._started is not None
        self._pace.join(self)
        self.away_since_s = time.monotonic()
        yield self._started
        next_s = 0.0
        while True:
            self.away_since_s = 0.0
            if not self._ended and self._deltas:
                await self._rest(next_s - time.monotonic())
            if self._deltas:
                delta = self._take()
                self.away_since_s = time.monotonic()
                # What is behind already is not to rest as well.
                next_s = 0.0 if self._deltas else self.away_since_s + self._pace.interval_s
                yield delta
            elif self._ended:
                self._raise_error()
                assert isinstance(self._ending, Finished)
                self.away_since_s = time.monotonic()
                yield self._ending
                return
            else:
                await self._wait()

    def _take(self) -> Delta:
        """Take what waits out, as far as it fits into one message."""
        count = size = 0
        for delta in self._deltas:
            size += delta.size
            if count and size > MOST_IN_MESSAGE:
                break
            count += 1
        taken, self._deltas = self._deltas[:count], self._deltas[count:]
        return merge(taken)

    def _raise_error(self) -> None:
        """Raise the error that ended the job, if one did, and keep it no more.

        Its frames lead back here, with all that the call had in hand: garbage that only a
        collection would find.
        """
        if isinstance(error := self._ending, SageFedError):
            self._ending = None
            try:
                raise error
            finally:
                del error

    async def _rest(self, rest_s: float) -> None:
        """Let deltas gather for a while; the job's ending is not kept waiting."""
        if rest_s < SHORTEST_REST_S:
            return
        timer = asyncio.get_running_loop().call_later(rest_s, self._wake)
        self._resting = True
        try:
            await self._wait()
        finally:
            self._resting = False
            timer.cancel()

    async def _wait(self) -> None:
        # No deadline here: the job's task always writes an ending, and the handler that
        # waits is itself bounded by its RPC. A bare future: an Event costs twice as much.
        assert self._waiter is None or self._waiter.done(), "a stream has one reader"
        self._waiter = asyncio.get_running_loop().create_future()
        await self._waiter

    def _wake(self) -> None:
        waiter, self._waiter = self._waiter, None
        if waiter is not None and not waiter.done():
            waiter.set_result(None)


def merge(deltas: list[Delta]) -> Delta:
    """Return one delta that says what the given ones say, in order."""
    if len(deltas) == 1:
        return deltas[0]
    if not deltas:
        return Delta(text="", token_ids=(), logprobs=(), output_tokens=0)
    token_ids: list[int] = []
    logprobs: list[Logprob] = []
    for delta in deltas:
        token_ids.extend(delta.token_ids)
        logprobs.extend(delta.logprobs)
    return Delta(
        text="".join(delta.text for delta in deltas),
        token_ids=tuple(token_ids),
        logprobs=tuple(logprobs),
        output_tokens=deltas[-1].output_tokens,
    )


def split(delta: Delta) -> Iterator[Delta]:
    """Return deltas that say together what `delta` says, each of which fits into one message."""
    num_parts = -(-delta.size // MOST_IN_MESSAGE)
    if num_parts <= 1:
        yield delta
        return
    before = delta.output_tokens - len(delta.token_ids)
    for part in range(num_parts):
        ids, logprobs, chars = (
            slice(len(whole) * part // num_parts, len(whole) * (part + 1) // num_parts)
            for whole in (delta.token_ids, delta.logprobs, delta.text)
        )
        yield Delta(
            text=delta.text[chars],
            token_ids=delta.token_ids[ids],
            logprobs=delta.logprobs[logprobs],
            output_tokens=before + ids.stop,
        )
