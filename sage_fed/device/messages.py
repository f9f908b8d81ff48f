"""What the threads and the event loop say to each other: the inbox, the outbox, and the pace.

`Inbox` carries messages to the device's thread, which sleeps there when it has nothing to do.
`Outbox` is the one buffer for tokens, endings and news on their way to the event loop. However
many steps pass before the loop looks, one wake-up is under way: a stalled loop is never flooded,
and the tokens of one sequence, the news of one tier and the reports of steps merge. `Pacer` says
how often messages may leave the event loop for clients, and so how often it looks.

Knows neither the scheduler nor jobs. A closed inbox takes nothing and says so.
"""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field
from typing import Protocol

from sage_fed.core import Sampling, Tier, TierStatus
from sage_fed.device.sequence import Ended, EndReason, SequenceSpec, TierLimits
from sage_fed.errors import SageFedError
from sage_fed.steps import Engine, SampledToken, Step, StepKind, StepReport

MAX_PROBE_STEPS = 4096
"""A longer probe is asked for in pieces, so that an interruption costs little."""

SEQUENCES_A_TURN = 32
"""What the event loop takes from the outbox in one turn, so that others get theirs in between:
a sequence's tokens take some 10 µs to decode, and some 100 to write."""

AWAY_S = 1.0
"""A reader that has not come back from a message for so long takes nothing."""

COUNT_S = 0.25
"""How long a count of the readers that are away is good for."""

_MAX_REPORTS = 1024
"""Step reports kept one by one; later ones are added up by tier and kind."""

_SHORTEST_REST_S = 0.001
"""An event loop's timers are no finer."""

_LONGEST_REST_S = 0.016
"""A stop string is seen when the outbox is read, and the device works on until then."""


@dataclass(frozen=True, slots=True)
class Submit:
    """Run a sequence."""

    spec: SequenceSpec
    submitted_s: float


@dataclass(frozen=True, slots=True)
class Cancel:
    """End a sequence at the next step boundary."""

    seq_id: int


@dataclass(frozen=True, slots=True)
class OpenTier:
    """Serve a tier with this engine, which belongs to the device's thread from now on."""

    tier: Tier
    engine: Engine
    limits: TierLimits


@dataclass(frozen=True, slots=True)
class StepTimes:
    """What steps of so many rows took on each tier, in seconds, when they were measured."""

    measured_s: Mapping[Tier, Mapping[int, float]]


@dataclass(frozen=True, slots=True)
class Stop:
    """End everything and leave."""


@dataclass(frozen=True, slots=True)
class Ping:
    """Turn the loop once, which moves the heartbeat also of an idle thread."""


class Probe:
    """Steps to run and time, in order; `done` gets the device seconds of each.

    The chunks' blocks number the probe's own blocks of their tier, from 0.
    Any thread may end it; the first ending counts.
    """

    def __init__(self, steps: Sequence[Step]) -> None:
        assert 0 < len(steps) <= MAX_PROBE_STEPS
        self.steps = tuple(steps)
        self.done: Future[tuple[float, ...]] = Future()

    @property
    def num_blocks(self) -> dict[Tier, int]:
        """KV blocks that it needs of each tier."""
        counts: dict[Tier, int] = {}
        for step in self.steps:
            highest = max(max(chunk.blocks) for chunk in step.chunks)
            counts[step.tier] = max(counts.get(step.tier, 0), highest + 1)
        return counts

    def end(self, outcome: tuple[float, ...] | SageFedError) -> None:
        """Write the ending, unless there is one."""
        try:
            if isinstance(outcome, SageFedError):
                self.done.set_exception(outcome)
            else:
                self.done.set_result(outcome)
        except InvalidStateError:
            pass


Message = Submit | Cancel | OpenTier | StepTimes | Probe | Ping | Stop


class Inbox:
    """Messages to the device's thread, in order; bounded by the jobs that were admitted.

    Counts the sequences that have not started, those under way included.
    """

    def __init__(self) -> None:
        self._waiting: Counter[Tier] = Counter()
        self._messages: list[Message] = []
        self._changed = threading.Condition()
        self._closed = False

    def post(self, message: Message) -> bool:
        """Give a message to the device's thread; False where that has ended."""
        with self._changed:
            if self._closed:
                return False
            if isinstance(message, Submit):
                self._waiting[message.spec.tier] += 1
            if isinstance(message, Ping) and message in self._messages:
                # A thread that hangs is asked again and again: one question is enough.
                return True
            self._messages.append(message)
            self._changed.notify()
            return True

    def take(self, *, wait: bool) -> list[Message]:
        """Return all messages, at least one where `wait` (the device's thread only)."""
        with self._changed:
            while wait and not self._messages:
                # No deadline: a stop is a message too.
                self._changed.wait()
            messages, self._messages = self._messages, []
            return messages

    def note_waiting(self, tier: Tier, count: int) -> None:
        """Say how many of the tier's sequences wait, once all that was taken is dealt with."""
        with self._changed:
            under_way = sum(isinstance(m, Submit) and m.spec.tier == tier for m in self._messages)
            self._waiting[tier] = count + under_way

    def waiting(self, tier: Tier) -> int:
        """Return how many sequences of the tier have not started."""
        with self._changed:
            return self._waiting[tier]

    def close(self) -> list[Message]:
        """Take no more, and return what was not taken."""
        with self._changed:
            self._closed = True
            messages, self._messages = self._messages, []
            return messages


class PacedReader(Protocol):
    """A stream's reader, as far as the pacer looks at it."""

    @property
    def away_since_s(self) -> float:
        """When it went off with a message (`time.monotonic()`); 0 while it waits for one."""


class Pacer:
    """The messages a second that all streams share evenly.

    A message costs gRPC and the event loop some hundred microseconds, whatever is in it. Where
    many streams, or a very fast model, make more tokens than messages can be sent, tokens share a
    message; a first token and an ending never wait. A reader that takes nothing has no share until
    it is back.

    Args:
        max_stream_messages_per_s: of all streams together; 0 is no limit.
        clock: `time.monotonic`.
    """

    def __init__(
        self, max_stream_messages_per_s: float = 0.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._max_messages_per_s = max_stream_messages_per_s
        self._clock = clock
        self._readers: set[PacedReader] = set()
        self._num_away = 0
        self._counted_s = 0.0

    @property
    def interval_s(self) -> float:
        """The least time between two messages of one stream, now."""
        if not self._max_messages_per_s:
            return 0.0
        now = self._clock()
        if now - self._counted_s >= COUNT_S:
            # Counted now and then: a timer for each message would cost as much as the message.
            self._counted_s = now
            self._num_away = sum(is_away(reader, now) for reader in self._readers)
        return max(len(self._readers) - self._num_away, 0) / self._max_messages_per_s

    def rest_s(self, num_sequences: int) -> float:
        """Return the least time between two looks into the outbox while only tokens come."""
        if not self._max_messages_per_s:
            return 0.0
        between_s = num_sequences / self._max_messages_per_s
        return min(max(between_s, _SHORTEST_REST_S), _LONGEST_REST_S)

    def join(self, reader: PacedReader) -> None:
        """Count a reader."""
        self._readers.add(reader)

    def leave(self, reader: PacedReader) -> None:
        """Count it no more; it may never have joined."""
        self._readers.discard(reader)


def is_away(reader: PacedReader, now: float) -> bool:
    """Whether the reader takes nothing."""
    since = reader.away_since_s
    return since > 0.0 and now - since >= AWAY_S


@dataclass(frozen=True, slots=True)
class Opened:
    """What the event loop has to know of a tier that now serves."""

    limits: TierLimits
    defaults: Sampling


@dataclass(slots=True)
class Batch:
    """What the event loop takes from the outbox at once.

    `tokens` has an entry, perhaps an empty one, for each sequence of `ended`.
    `closed` is the device thread's last word.
    """

    tokens: dict[int, list[SampledToken]] = field(default_factory=dict)
    ended: dict[int, Ended] = field(default_factory=dict)
    opened: dict[Tier, Opened] = field(default_factory=dict)
    statuses: dict[Tier, TierStatus] = field(default_factory=dict)
    reports: list[StepReport] = field(default_factory=list)
    summed: dict[tuple[Tier, Tier | None, StepKind, bool], StepReport] = field(default_factory=dict)
    closed: EndReason | None = None

    def add_report(self, report: StepReport) -> None:
        """Keep a report, added to one of its kind if the loop has stalled for long."""
        if len(self.reports) < _MAX_REPORTS:
            self.reports.append(report)
            return
        key = (report.tier, report.drafts_for, report.kind, report.out_of_memory)
        earlier = self.summed.get(key)
        self.summed[key] = report if earlier is None else earlier.plus(report)

    def keep_first(self, most: int) -> Batch:
        """Return the tokens and endings of all sequences but the first `most`, and drop them."""
        late = tuple(self.tokens)[most:]
        return Batch(
            tokens={seq_id: self.tokens.pop(seq_id) for seq_id in late},
            ended={seq_id: self.ended.pop(seq_id) for seq_id in late if seq_id in self.ended},
        )


class Outbox:
    """Carries what the threads put to `deliver` on the event loop; any thread may put and send.

    `put` and `send` are two things, because a loop that wakes up wants the interpreter's lock: the
    device's thread sends when it is about to need it no more. For the same reason the loop rests
    between batches of mere tokens where steps follow each other faster than streams send messages;
    news, endings and first tokens do not wait.

    Args:
        loop: where batches are delivered.
        deliver: takes them in.
        rest_s: asked on the loop: seconds that it rests, from one batch to the next, while tokens
            come faster than that.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        deliver: Callable[[Batch], None],
        rest_s: Callable[[], float] = lambda: 0.0,
    ) -> None:
        self._loop = loop
        self._deliver = deliver
        self._rest_s = rest_s
        self._read_s = -math.inf
        self._lock = threading.Lock()
        self._batch = Batch()
        self._filled = False
        self._urgent = False
        self._wake_under_way = False
        self._resting = False

    def put(
        self,
        *,
        tokens: Iterable[SampledToken] = (),
        ended: Iterable[Ended] = (),
        report: StepReport | None = None,
        status: TierStatus | None = None,
        opened: Opened | None = None,
        closed: EndReason | None = None,
    ) -> None:
        """Add to the next batch; `opened` goes with the `status` of its tier.

        A step that read prompts may have sampled first tokens, which must not wait.
        """
        prompts = report is not None and report.num_prefill_tokens > 0
        with self._lock:
            self._filled = True
            batch = self._batch
            for token in tokens:
                batch.tokens.setdefault(token.seq_id, []).append(token)
            for ending in ended:
                batch.tokens.setdefault(ending.seq_id, [])
                batch.ended[ending.seq_id] = ending
            if report is not None:
                batch.add_report(report)
            if status is not None:
                batch.statuses[status.tier] = status
                if opened is not None:
                    batch.opened[status.tier] = opened
            if closed is not None:
                batch.closed = closed
            self._urgent |= prompts or bool(batch.ended or batch.statuses or batch.closed)

    def send(self) -> None:
        """Wake the event loop for what was put, unless it is about to look, or rests.

        Raises:
            RuntimeError: the event loop is closed.
        """
        with self._lock:
            if self._wake_under_way or not self._filled or (self._resting and not self._urgent):
                return
            self._wake_under_way = True
        self._loop.call_soon_threadsafe(self._wake)

    def flush(self) -> None:
        """Deliver all that was put, now (on the event loop)."""
        with self._lock:
            batch, self._batch = self._batch, Batch()
            self._filled = self._urgent = False
        self._deliver(batch)

    def _wake(self) -> None:
        rest_s = self._rest_s()
        self._read(rest_s if time.monotonic() - self._read_s < rest_s else 0.0)

    def _rested(self) -> None:
        with self._lock:
            self._resting = False
            # Where a wake-up is under way, it will read.
            waits = self._filled and not self._wake_under_way
        if waits:
            self._read(self._rest_s())

    def _read(self, rest_s: float) -> None:
        """Deliver what some sequences have, and rest after that, unless a rest is under way."""
        self._read_s = time.monotonic()
        with self._lock:
            rests = rest_s > 0.0 and not self._resting
            self._resting |= rests
        if rests:
            self._loop.call_later(rest_s, self._rested)
        self._turn()

    def _turn(self) -> None:
        with self._lock:
            batch, self._batch = self._batch, Batch()
            if batch.closed is None and len(batch.tokens) > SEQUENCES_A_TURN:
                self._batch = batch.keep_first(SEQUENCES_A_TURN)
            more = bool(self._batch.tokens)
            self._filled = self._wake_under_way = more
            self._urgent = bool(self._batch.ended)
        if more:
            self._loop.call_soon(self._turn)
        self._deliver(batch)
