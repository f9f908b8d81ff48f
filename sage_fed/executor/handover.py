"""What the device's thread and the loader say to the event loop, in one go.

Owns the parcel that the event loop has not opened yet. However many steps pass before it
does, there is one parcel and one wake-up under way: a stalled loop is never flooded, and
tokens of the same sequence, news of the same tier and reports of steps merge in it.

`put` and `send` are two things, because a loop that wakes up wants the interpreter's lock: the
device's thread sends when it is about to need it no more.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

from sage_fed.core import GenerationDefaults, Tier, TierStatus
from sage_fed.scheduler import Ended, EndReason, TierLimits
from sage_fed.steps import Drawn, StepKind, StepReport

_MAX_REPORTS = 1024
"""Step reports kept one by one; later ones are added up by tier and kind."""


@dataclass(frozen=True, slots=True)
class Opened:
    """What the event loop has to know of a tier that now serves."""

    limits: TierLimits
    defaults: GenerationDefaults


@dataclass(slots=True)
class Parcel:
    """Everything since the last parcel; `closed` is the thread's last word."""

    drawn: dict[int, list[Drawn]] = field(default_factory=dict)
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
    """Carries parcels to `deliver` on the event loop; any thread may use it."""

    def __init__(self, loop: asyncio.AbstractEventLoop, deliver: Callable[[Parcel], None]) -> None:
        self._loop = loop
        self._deliver = deliver
        self._lock = threading.Lock()
        self._parcel = Parcel()
        self._filled = False
        self._under_way = False

    def put(
        self,
        *,
        drawn: Iterable[Drawn] = (),
        ended: Iterable[Ended] = (),
        report: StepReport | None = None,
        status: TierStatus | None = None,
        opened: Opened | None = None,
        closed: EndReason | None = None,
    ) -> None:
        """Put into the parcel that leaves next; `opened` goes with the `status` of its tier."""
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

    def send(self) -> None:
        """Have the event loop open what was put, unless it is about to.

        Raises:
            RuntimeError: the event loop is closed; there is nobody to hear.
        """
        with self._lock:
            if self._under_way or not self._filled:
                return
            self._under_way = True
        self._loop.call_soon_threadsafe(self._open)

    def _open(self) -> None:
        with self._lock:
            parcel, self._parcel = self._parcel, Parcel()
            self._under_way = self._filled = False
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
