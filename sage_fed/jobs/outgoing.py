"""A job's output on its way from the device to its reader: the one buffer behind the outbox.

`OutgoingStream` keeps a job's text and tokens and hands them to one reader: `Started`, merged
`Delta`s at the pacer's pace, and exactly one ending. A reader that falls behind, or has had its
share of the messages, finds its output merged: memory is bounded by the job's own max_new_tokens,
and no reader stalls its job. `Delivery` runs a job's sequences on the device, decodes their tokens
into the stream, and stops them. Event loop only.

Knows no gRPC and no money. `Delivery.run` fails as the executor does when it takes no more; what
an engine did to a sequence is in its ending.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import replace

from sage_fed.core import (
    Delta,
    Event,
    Finished,
    JobSpec,
    Logprob,
    Revised,
    Started,
    StopReason,
    Tier,
    TokenOrigin,
)
from sage_fed.device import Ended, EndReason, Executor, Pacer, SequenceSpec
from sage_fed.errors import SageFedError
from sage_fed.metrics import Metrics
from sage_fed.steps import SampledToken
from sage_fed.text import IncrementalDecoder, StopMatcher

DROPS_OUTPUT = (StopReason.STOP_STRING, StopReason.CANCELLED)
"""What comes after these is not delivered: the text is complete, or its reader has left."""

SHORTEST_REST_S = 0.001
"""An event loop's timers are no finer."""

MOST_IN_MESSAGE = 20_000
"""What one delta may hold (`Delta.size`). With 128 bytes of text for each that is 3 MiB, and a gRPC
client takes 4 unless it is told otherwise."""

_TOKEN_BYTES = 150
_LOGPROB_BYTES = 120
"""What Python keeps for a token's id and text, and for each log-probability beside it, about."""


class OutgoingStream:
    """One job's events, read once: one by one as an iterator, or together by `answer`.

    Iterating yields `Started`, any number of `Delta`, then `Finished`; or raises the
    `SageFedError` that ended the job. A reader leaves the stream with `cancel`, whether it has
    read it to its end or not; that may be at any time, also twice.
    """

    def __init__(self, on_cancel: Callable[[], None], pacer: Pacer) -> None:
        self.on_cancel = on_cancel
        """Called when the reader leaves, each time."""
        self.away_since_s = 0.0
        """When the reader went off with an event (`time.monotonic()`); 0 while it waits here."""
        self._pacer = pacer
        self._resting = False
        self._waiter: asyncio.Future[None] | None = None
        self._started: Started | None = None
        self._ending: Finished | SageFedError | None = None
        self._ended = False
        self._left = False
        # Text in pieces, each of which fits into a message; `_ends` are the numbers of tokens up
        # to the end of each. What the reader has taken is dropped once the job has ended.
        self._pieces: list[str] = []
        self._ends: list[int] = []
        self._token_ids: list[int] = []
        self._logprobs: list[Logprob] = []
        self._origins: list[TokenOrigin] = []
        self._revised = False
        """Whether what the reader has got is replaced by what follows, which it is not told yet."""
        self._num_dropped = 0
        self._num_read = 0
        """Pieces that the reader has taken."""
        self._token_size = 1
        """What one token adds to `Delta.size`, about."""

    @property
    def job_id(self) -> str:
        """The job's id, once it is accepted."""
        return self._started.job_id if self._started is not None else ""

    @property
    def num_tokens(self) -> int:
        """Tokens written so far."""
        return self._num_dropped + len(self._token_ids)

    @property
    def kept_bytes(self) -> int:
        """What is kept for a reader that is behind, about."""
        num_unread = self.num_tokens - self._num_read_tokens
        return num_unread * (_TOKEN_BYTES + (self._token_size - 1) * _LOGPROB_BYTES)

    @property
    def ended(self) -> bool:
        """Whether the ending is written (it may not have been read yet)."""
        return self._ended

    def cancel(self) -> None:
        """Leave the stream; where the job still runs, it stops and settles."""
        self._pacer.leave(self)
        self._left = True
        # A handler that hangs in its last write keeps the stream, but no output.
        self._drop_read()
        self.on_cancel()

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
        """Wait for the whole answer, for a reader that has no use for its parts.

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
        return self._started, self.whole(), self._ending

    async def __aiter__(self) -> AsyncIterator[Event]:
        await self.admitted()
        assert self._started is not None
        self._pacer.join(self)
        self.away_since_s = time.monotonic()
        yield self._started
        next_s = 0.0
        while True:
            self.away_since_s = 0.0
            if next_s and not self._ended and self._num_read < len(self._ends):
                await self._rest(next_s - time.monotonic())
            if self._revised:
                self._revised = False
                yield Revised(0)
            elif self._num_read < len(self._ends):
                delta = self._take()
                self.away_since_s = now = time.monotonic()
                # What is behind already is not to rest as well.
                is_behind = self._num_read < len(self._ends)
                next_s = 0.0 if is_behind else now + self._pacer.interval_s
                yield delta
            elif self._ended:
                self._raise_error()
                assert isinstance(self._ending, Finished)
                self.away_since_s = time.monotonic()
                yield self._ending
                return
            else:
                await self._wait()

    def start(self, started: Started) -> None:
        """Write the first event."""
        assert self._started is None
        assert not self._ended
        self._started = started
        self._wake()

    def revise(self) -> None:
        """Take back all output so far: what follows is written in its place."""
        assert not self._ended
        self._revised = self._revised or self._num_read > 0
        self._pieces, self._ends, self._num_read = [], [], 0
        self._token_ids, self._logprobs, self._origins = [], [], []
        if self._revised:
            self._wake()

    def push(
        self,
        text: str,
        token_ids: Sequence[int],
        logprobs: Sequence[Logprob] = (),
        origins: Sequence[TokenOrigin] = (),
    ) -> None:
        """Write output: some tokens, and the text that is certain with them.

        `logprobs` and `origins` are of all tokens of a job or of none.
        """
        assert self._started is not None
        assert not self._ended
        before = len(self._token_ids)
        self._token_ids += token_ids
        self._origins += origins
        if logprobs:
            self._logprobs += logprobs
            self._token_size = 2 + len(logprobs[-1].top)
        num_parts = -(-len(token_ids) * self._token_size // MOST_IN_MESSAGE)
        for part in range(1, num_parts):
            cut = len(text) // (num_parts - part + 1)
            self._pieces.append(text[:cut])
            self._ends.append(before + len(token_ids) * part // num_parts)
            text = text[cut:]
        self._pieces.append(text)
        self._ends.append(len(self._token_ids))
        if not self._resting:
            self._wake()

    def whole(self) -> Delta:
        """Return everything written as one delta; not once the job has ended and some is read."""
        assert not self._num_dropped
        return Delta(
            text="".join(self._pieces),
            token_ids=tuple(self._token_ids),
            logprobs=tuple(self._logprobs),
            output_tokens=len(self._token_ids),
            origins=tuple(self._origins),
        )

    def end(self, ending: Finished | SageFedError) -> None:
        """Write the one ending."""
        assert not self._ended, "a job ends exactly once"
        self._ending = ending
        self._ended = True
        self._drop_read()
        self._wake()

    @property
    def _num_read_tokens(self) -> int:
        if self._left:
            return self.num_tokens
        return self._ends[self._num_read - 1] if self._num_read else self._num_dropped

    def _take(self) -> Delta:
        """Take what is unread, as far as it fits into one message."""
        first, ends, dropped = self._num_read, self._ends, self._num_dropped
        first_token = ends[first - 1] if first else dropped
        most = first_token + MOST_IN_MESSAGE // self._token_size
        after = first + 1
        while after < len(ends) and ends[after] <= most:
            after += 1
        self._num_read, end = after, ends[after - 1]
        tokens = slice(first_token - dropped, end - dropped)
        return Delta(
            text="".join(self._pieces[first:after]),
            token_ids=tuple(self._token_ids[tokens]),
            logprobs=tuple(self._logprobs[tokens]) if self._logprobs else (),
            output_tokens=end,
            origins=tuple(self._origins[tokens]) if self._origins else (),
        )

    def _drop_read(self) -> None:
        """Keep only what may still be read, once nothing more is written."""
        if not self._ended:
            return
        num_read_tokens = self._num_read_tokens
        count = len(self._ends) if self._left else self._num_read
        del self._pieces[:count]
        del self._ends[:count]
        del self._token_ids[: num_read_tokens - self._num_dropped]
        del self._logprobs[: num_read_tokens - self._num_dropped]
        del self._origins[: num_read_tokens - self._num_dropped]
        self._num_dropped, self._num_read = num_read_tokens, 0

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
        """Let output gather for a while; the job's ending is not kept waiting."""
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


class SequenceText:
    """One sequence's text as its tokens come, cut at a stop string."""

    def __init__(self, decoder: IncrementalDecoder, stops: Sequence[str]) -> None:
        self.matched = False
        """Whether a stop string has ended the text."""
        self._decoder = decoder
        self._has_stops = bool(stops)
        self._matcher = StopMatcher(stops)

    def push(self, token_ids: Sequence[int]) -> tuple[str, int]:
        """Return the text that is certain now, and how many of these tokens count.

        Tokens behind the one that completes a stop string do not: they are never delivered, so
        never charged.
        """
        if not self._has_stops:  # nothing else cares where a token ends
            return self._decoder.push(token_ids), len(token_ids)
        pieces = []
        for count, token_id in enumerate(token_ids, 1):
            text, self.matched = self._matcher.push(self._decoder.push((token_id,)))
            pieces.append(text)
            if self.matched:
                return "".join(pieces), count
        return "".join(pieces), len(token_ids)

    def finish(self) -> str:
        """Return the text that was held back, now that no more tokens come."""
        text, self.matched = self._matcher.push(self._decoder.finish())
        return text if self.matched else text + self._matcher.finish()


Output = tuple[str, Sequence[int], Sequence[Logprob], Sequence[TokenOrigin]]

WHOLE = frozenset({EndReason.EOS, EndReason.LENGTH, EndReason.STOP_TOKEN})
"""How a sequence ends that came to its own end."""


def _asked_for(logprobs: Sequence[Logprob], top: int | None) -> list[Logprob]:
    """Return the log-probabilities as the client asked for them, if it did."""
    return [] if top is None else [replace(one, top=one.top[:top]) for one in logprobs]


class Delivery:
    """A job's sequences, and what the reader of `stream` gets of their tokens, and until when."""

    def __init__(
        self,
        spec: JobSpec,
        stream: OutgoingStream,
        *,
        arrived_s: float,
        executor: Executor,
        metrics: Metrics,
        exemplar: Mapping[str, str],
    ) -> None:
        self.stop_reason: StopReason | None = None
        self.tells_origins = False
        """Whether the reader is told which tier made a token."""
        self.contended = False
        """Whether another tier had work when the first token came."""
        self._hidden: list[Output] | None = None
        """What the newest sequence made, where the reader does not see it (yet)."""
        self._num_tokens = 0
        self._replaces = False
        """Whether the reader has got what an earlier sequence made."""
        self._seen: list[Logprob] = []
        """Of the newest sequence's tokens, as the engine gave them."""
        self._spec = spec
        self._stream = stream
        self._arrived_s = arrived_s
        self._executor = executor
        self._metrics = metrics
        self._exemplar = exemplar
        self._seq_id: int | None = None
        self._asked_to_stop = False
        """Also behind a stop string, which ends a sequence and not the job's later ones."""
        self._last_push_s = 0.0

    @property
    def num_tokens(self) -> int:
        """Tokens of the newest sequence that its reader gets, or would get."""
        return self._num_tokens

    def whole(self) -> Delta:
        """Return what the newest sequence made, as one delta."""
        if self._hidden is None:
            return self._stream.whole()
        token_ids = tuple(id_ for _, ids, _, _ in self._hidden for id_ in ids)
        return Delta(
            text="".join(text for text, _, _, _ in self._hidden),
            token_ids=token_ids,
            logprobs=tuple(entry for _, _, logprobs, _ in self._hidden for entry in logprobs),
            output_tokens=len(token_ids),
            origins=tuple(origin for _, _, _, origins in self._hidden for origin in origins),
        )

    def answer(self) -> Delta:
        """Return the same with the log-probabilities that the engine gave, asked for or not."""
        whole = self.whole()
        return replace(whole, logprobs=tuple(self._seen)) if self._seen else whole

    @property
    def state(self) -> tuple[list[Output] | None, StopReason | None, int]:
        """What the newest sequence has left, for `resume`."""
        return self._hidden, self.stop_reason, self._num_tokens

    def resume(self, state: tuple[list[Output] | None, StopReason | None, int]) -> bool:
        """Take up again what an earlier sequence made; False where a later one has written."""
        if self._num_tokens:
            return False
        self._hidden, self.stop_reason, self._num_tokens = state
        self._replaces = False
        return True

    def show(self) -> None:
        """Deliver what the newest sequence made, if it was hidden."""
        hidden, self._hidden = self._hidden or (), None
        for output in hidden:
            self._stream.push(*output)

    def stop(self, reason: StopReason) -> None:
        """Have the job end at the next step; the first reason counts."""
        if self._stream.ended:
            return
        self._asked_to_stop = True
        if self.stop_reason is not None:
            return
        self.stop_reason = reason
        if self._seq_id is not None:
            self._executor.cancel(self._seq_id)

    async def run(
        self,
        sequence: SequenceSpec,
        decoder: IncrementalDecoder,
        started: Started,
        *,
        shown: bool = True,
    ) -> Ended | None:
        """Run a sequence and deliver its tokens; None where it was stopped before it began.

        Args:
            sequence: what runs, after those before it have ended.
            decoder: of its tokens.
            started: written once the executor has accepted the job's first sequence.
            shown: whether the reader sees what it makes; else `show` may deliver it later.
        """
        if self._asked_to_stop:
            return None
        self.stop_reason = None  # the stop string of the sequence before
        self._replaces = self._hidden is None and self._num_tokens > 0
        self._num_tokens, self._seen = 0, []
        text = SequenceText(decoder, self._spec.sampling.stop)
        ending = self._executor.submit(sequence, lambda tokens: self._take(tokens, sequence, text))
        self._seq_id = sequence.seq_id
        self._hidden = None if shown else []
        timer = self._deadline()
        try:
            if not self._stream.job_id:
                self._stream.start(started)
            with self._metrics.at_work(sequence.tier):
                ended = await ending
        except BaseException:
            # The device may be well and the bug ours: what it would go on making is not read.
            self._executor.cancel(sequence.seq_id)
            raise
        finally:
            if timer is not None:
                timer.cancel()
        if self.stop_reason not in DROPS_OUTPUT:
            if rest := text.finish():
                self._write(rest, (), ())
            if text.matched:
                self.stop_reason = StopReason.STOP_STRING
        if self._replaces and ended.reason in WHOLE:
            self._write("", (), ())  # nothing, which replaces what there was
        return ended

    def _deadline(self) -> asyncio.TimerHandle | None:
        """Have it stopped at the job's deadline, if it has one."""
        deadline_s = self._spec.deadline_s
        if deadline_s is None:
            return None
        left_s = self._arrived_s + deadline_s - time.monotonic()
        loop = asyncio.get_running_loop()
        return loop.call_later(max(left_s, 0.0), self.stop, StopReason.DEADLINE)

    def _take(
        self, tokens: Sequence[SampledToken], sequence: SequenceSpec, text: SequenceText
    ) -> None:
        """Pass on what the client may see of a sequence's new tokens."""
        if self.stop_reason in DROPS_OUTPUT:
            return
        token_ids = [token.token_id for token in tokens]
        piece, count = text.push(token_ids)
        if count < len(tokens):
            tokens, token_ids = tokens[:count], token_ids[:count]
        logprobs = [token.logprob for token in tokens if token.logprob is not None]
        asked = self._spec.sampling.top_logprobs
        if logprobs and sequence.sampling.top_logprobs != asked:
            self._seen += logprobs
            logprobs = _asked_for(logprobs, asked)
        self._write(piece, token_ids, logprobs, self._origins(tokens, sequence.tier))
        if self._hidden is None:
            self._note_gap(sequence.tier, count)
        if text.matched:
            # Also where a deadline or an abort came first: the text is complete.
            self.stop_reason = StopReason.STOP_STRING
            self._executor.cancel(sequence.seq_id)

    def _origins(self, tokens: Sequence[SampledToken], tier: Tier) -> Sequence[TokenOrigin]:
        """Return where tokens come from, of a job that two tiers serve."""
        if not self.tells_origins:
            return ()
        if tier.rank == 0:
            return [TokenOrigin.TACTICAL] * len(tokens)
        own, accepted = TokenOrigin.STRATEGIC, TokenOrigin.ACCEPTED
        return [accepted if token.accepted else own for token in tokens]

    def _write(
        self,
        text: str,
        token_ids: Sequence[int],
        logprobs: Sequence[Logprob],
        origins: Sequence[TokenOrigin] = (),
    ) -> None:
        self._num_tokens += len(token_ids)
        if self._hidden is not None:
            self._hidden.append((text, token_ids, logprobs, origins))
            return
        if self._replaces:
            self._replaces = False
            self._stream.revise()
        self._stream.push(text, token_ids, logprobs, origins)

    def _note_gap(self, tier: Tier, num_tokens: int) -> None:
        now, before = time.monotonic(), self._last_push_s
        if before:
            self._metrics.tokens_delivered(tier, num_tokens, now - before, self._exemplar)
        else:
            self.contended = self._metrics.contended(tier)
        self._last_push_s = now
