"""What the device's thread and the loader say to the event loop, in one go.

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
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

from sage_fed.core import GenerationDefaults, Tier, TierStatus
from sage_fed.device.limits import TierLimits
from sage_fed.device.words import Ended, EndReason
from sage_fed.steps import SampledToken, StepKind, StepReport

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
