"""What the event loop and the loader say to the device's thread.

Owns the messages under way and the count of sequences that have not started, so that the
bound on waiting holds over both. A device's thread with nothing to do sleeps here, unpolled.
Fails with QueueFull; a closed inbox takes nothing and says so.

What the device's thread and the loader say to the event loop, in one go.

Owns the parcel that the event loop has not opened yet. However many steps pass before it
does, there is one parcel and one wake-up under way: a stalled loop is never flooded, and
tokens of the same sequence, news of the same tier and reports of steps merge in it.

`put` and `send` are two things, because a loop that wakes up wants the interpreter's lock: the
device's thread sends when it is about to need it no more. For the same reason the loop rests
between parcels of mere tokens where steps follow each other faster than streams send messages;
news, endings and first tokens do not wait.
"""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field, replace

from sage_fed.core import GenerationDefaults, Tier, TierStatus
from sage_fed.device.sequence import Ended, EndReason, SequenceSpec, TierLimits
from sage_fed.errors import QueueFull, SageFedError
from sage_fed.steps import Engine, SampledToken, Step, StepKind, StepReport


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
    """Serve a tier with this engine, which is the device thread's from now on."""

    tier: Tier
    engine: Engine
    limits: TierLimits


MAX_STEPS = 4096
"""Of one probe; what is longer is asked for in pieces, so that an interruption costs little."""


class Probe:
    """Steps to run and time, in order; `done` gets the device seconds of each.

    The chunks' blocks number the probe's own blocks of their tier, from 0.
    """

    def __init__(self, steps: Sequence[Step]) -> None:
        assert 0 < len(steps) <= MAX_STEPS
        self.steps = tuple(steps)
        self.done: Future[tuple[float, ...]] = Future()

    @property
    def over(self) -> bool:
        """Whether it has ended, or nobody waits for it any more."""
        return self.done.done()

    @property
    def num_blocks(self) -> dict[Tier, int]:
        """KV blocks that it needs of each tier."""
        counts: dict[Tier, int] = {}
        for step in self.steps:
            highest = max(max(chunk.blocks) for chunk in step.chunks)
            counts[step.tier] = max(counts.get(step.tier, 0), highest + 1)
        return counts

    def end(self, outcome: tuple[float, ...] | SageFedError) -> None:
        """Write the ending, unless somebody was faster."""
        try:
            if isinstance(outcome, SageFedError):
                self.done.set_exception(outcome)
            else:
                self.done.set_result(outcome)
        except InvalidStateError:
            pass


@dataclass(frozen=True, slots=True)
class Stop:
    """End everything and leave."""


@dataclass(frozen=True, slots=True)
class Ping:
    """Turn the loop once: whoever does so beats, also with nothing to do."""


Message = Submit | Cancel | OpenTier | Probe | Ping | Stop


class Inbox:
    """Messages in order; bounded for `Submit`, by live sequences for the others."""

    def __init__(self, max_waiting: Mapping[Tier, int]) -> None:
        self._max_waiting = dict(max_waiting)
        self._waiting = dict.fromkeys(self._max_waiting, 0)
        self._retry_after_s: dict[Tier, float | None] = {}
        self._messages: list[Message] = []
        self._changed = threading.Condition()
        self._closed = False

    def submit(self, message: Submit) -> None:
        """Give a sequence to the device's thread.

        Raises:
            QueueFull: the tier's bound of sequences has not started yet.
        """
        tier = message.spec.tier
        with self._changed:
            if self._waiting[tier] >= self._max_waiting[tier]:
                retry_after_s = self._retry_after_s.get(tier) or 1.0
                raise QueueFull.of_tier(tier.name, self._waiting[tier], retry_after_s)
            self._waiting[tier] += 1
            self._messages.append(message)
            self._changed.notify()

    def post(self, message: Cancel | OpenTier | Probe | Ping | Stop) -> bool:
        """Say something else; False where nobody will hear it any more."""
        with self._changed:
            if self._closed:
                return False
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

    def note_waiting(self, tier: Tier, count: int, retry_after_s: float | None) -> None:
        """Say how many of the tier's sequences wait, once all that was taken is dealt with."""
        with self._changed:
            under_way = sum(isinstance(m, Submit) and m.spec.tier is tier for m in self._messages)
            self._waiting[tier] = count + under_way
            self._retry_after_s[tier] = retry_after_s

    def waiting(self, tier: Tier) -> int:
        """Return how many sequences of the tier have not started, those under way included."""
        with self._changed:
            return self._waiting[tier]

    def close(self) -> list[Message]:
        """Take no more, and return what nobody dealt with."""
        with self._changed:
            self._closed = True
            messages, self._messages = self._messages, []
            return messages


_MAX_REPORTS = 1024
"""Step reports kept one by one; later ones are added up by tier and kind."""

_SHORTEST_REST_S = 0.001
"""An event loop's timers are no finer."""

_LONGEST_REST_S = 0.016
"""A stop string is seen when its parcel is opened, and the device works on until then."""


def rest_s(num_streams: int, max_stream_messages_per_s: float) -> float:
    """Return what lies between two parcels of mere tokens: what lies between a stream's messages.

    No limit on messages is none on parcels.
    """
    if not max_stream_messages_per_s:
        return 0.0
    between_s = num_streams / max_stream_messages_per_s
    return min(max(between_s, _SHORTEST_REST_S), _LONGEST_REST_S)


@dataclass(frozen=True, slots=True)
class Opened:
    """What the event loop has to know of a tier that now serves."""

    limits: TierLimits
    defaults: GenerationDefaults


@dataclass(slots=True)
class Parcel:
    """Everything since the last parcel; `closed` is the thread's last word."""

    drawn: dict[int, list[SampledToken]] = field(default_factory=dict)
    ended: list[Ended] = field(default_factory=list)
    opened: dict[Tier, Opened] = field(default_factory=dict)
    statuses: dict[Tier, TierStatus] = field(default_factory=dict)
    reports: list[StepReport] = field(default_factory=list)
    merged: dict[tuple[Tier, StepKind, bool], StepReport] = field(default_factory=dict)
    closed: EndReason | None = None

    def add_report(self, report: StepReport) -> None:
        """Keep a report, added to one of its kind if the loop has stalled for long."""
        if len(self.reports) < _MAX_REPORTS:
            self.reports.append(report)
            return
        key = (report.tier, report.kind, report.out_of_memory)
        sum_ = self.merged.get(key)
        self.merged[key] = report if sum_ is None else _sum(sum_, report)


class Handover:
    """Carries parcels to `deliver` on the event loop; any thread may use it.

    Args:
        loop: where parcels are opened.
        deliver: takes them in.
        rest_s: asked on the loop: seconds that it rests, from one parcel to the next, while
            tokens come faster than that.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        deliver: Callable[[Parcel], None],
        rest_s: Callable[[], float] = lambda: 0.0,
    ) -> None:
        self._loop = loop
        self._deliver = deliver
        self._rest_s = rest_s
        self._opened_s = -math.inf
        self._lock = threading.Lock()
        self._parcel = Parcel()
        self._filled = False
        self._urgent = False
        self._under_way = False
        self._resting = False

    def put(
        self,
        *,
        drawn: Iterable[SampledToken] = (),
        ended: Iterable[Ended] = (),
        report: StepReport | None = None,
        status: TierStatus | None = None,
        opened: Opened | None = None,
        closed: EndReason | None = None,
    ) -> None:
        """Put into the parcel that leaves next; `opened` goes with the `status` of its tier.

        A step that read prompts may have drawn first tokens, which somebody waits for.
        """
        prompts = report is not None and report.num_prefill_tokens > 0
        with self._lock:
            self._filled = True
            parcel = self._parcel
            for d in drawn:
                parcel.drawn.setdefault(d.seq_id, []).append(d)
            parcel.ended.extend(ended)
            if report is not None:
                parcel.add_report(report)
            if status is not None:
                parcel.statuses[status.tier] = status
                if opened is not None:
                    parcel.opened[status.tier] = opened
            if closed is not None:
                parcel.closed = closed
            self._urgent |= prompts or bool(parcel.ended or parcel.statuses or parcel.closed)

    def send(self) -> None:
        """Have the event loop open what was put, unless it is about to, or rests.

        Raises:
            RuntimeError: the event loop is closed; there is nobody to hear.
        """
        with self._lock:
            if self._under_way or not self._filled or (self._resting and not self._urgent):
                return
            self._under_way = True
        self._loop.call_soon_threadsafe(self._arrived)

    def _arrived(self) -> None:
        rest_s = self._rest_s()
        self._open(rest_s if time.monotonic() - self._opened_s < rest_s else 0.0)

    def _rested(self) -> None:
        with self._lock:
            self._resting = False
            # What is under way will be opened when it arrives.
            waits = self._filled and not self._under_way
        if waits:
            self._open(self._rest_s())

    def _open(self, rest_s: float) -> None:
        """Open the parcel, and rest after it, unless a rest is under way."""
        with self._lock:
            parcel, self._parcel = self._parcel, Parcel()
            self._under_way = self._filled = self._urgent = False
            rests = rest_s > 0.0 and not self._resting
            self._resting |= rests
        self._opened_s = time.monotonic()
        if rests:
            self._loop.call_later(rest_s, self._rested)
        self._deliver(parcel)


def _sum(a: StepReport, b: StepReport) -> StepReport:
    return replace(
        a,
        num_steps=a.num_steps + b.num_steps,
        num_prefill_tokens=a.num_prefill_tokens + b.num_prefill_tokens,
        num_decode_tokens=a.num_decode_tokens + b.num_decode_tokens,
        num_sequences=a.num_sequences + b.num_sequences,
        elapsed_s=a.elapsed_s + b.elapsed_s,
        num_context_tokens=a.num_context_tokens + b.num_context_tokens,
        num_queried_tokens=a.num_queried_tokens + b.num_queried_tokens,
        num_hit_tokens=a.num_hit_tokens + b.num_hit_tokens,
        num_preempted=a.num_preempted + b.num_preempted,
    )
