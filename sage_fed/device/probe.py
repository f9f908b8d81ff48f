"""Timed steps that serve nobody: what a calibration asks of the device.

Owns the probes that have not ended and the KV blocks that the first of them holds. Live work
goes first: a probe holds blocks only while there is none, and one that was interrupted starts
again from its first step, because what came between has changed the caches it measures.
The device's thread only, but for `Probe`, which any thread may end, once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError
from dataclasses import replace

from sage_fed.core import Tier
from sage_fed.device.scheduler import Scheduler
from sage_fed.errors import DeviceBusy, SageFedError, TierUnavailable
from sage_fed.steps import Step

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


class ProbeDesk:
    """The probes under way, one after the other, in the order in which they came.

    `changed` is called after blocks were taken or given back, and before anyone hears of it.
    """

    def __init__(self, scheduler: Scheduler, changed: Callable[[], None]) -> None:
        self._scheduler = scheduler
        self._changed = changed
        self._probes: list[Probe] = []
        self._lease: dict[Tier, tuple[int, ...]] = {}
        self._elapsed_s: list[float] = []

    @property
    def has_work(self) -> bool:
        """Whether a probe waits for its next step; gives up those that are over."""
        while self._probes and self._probes[0].over:
            self.step_aside()
            del self._probes[0]
        return bool(self._probes)

    def add(self, probe: Probe) -> None:
        """Queue a probe."""
        self._probes.append(probe)

    def step_aside(self) -> None:
        """Give the blocks back, for live work; the probe starts again when that is done."""
        self._elapsed_s = []
        if not self._lease:
            return
        lease, self._lease = self._lease, {}
        for tier, blocks in lease.items():
            self._scheduler.give_back(tier, blocks)
        self._changed()

    def next_step(self) -> Step | None:
        """Return the next step on blocks that nobody else owns; None where no probe can run."""
        while self.has_work:
            if self._lease or self._take(self._probes[0]):
                return self._placed(self._probes[0].steps[len(self._elapsed_s)])
        return None

    def note(self, elapsed_s: float) -> None:
        """Take in the device's time of the step that `next_step` returned."""
        self._elapsed_s.append(elapsed_s)
        if len(self._elapsed_s) == len(self._probes[0].steps):
            self._end(tuple(self._elapsed_s))

    def fail(self, error: SageFedError) -> None:
        """End the probe whose step failed."""
        self._end(error)

    def close_tier(self, tier: Tier, why: str) -> None:
        """End the probes of a tier that is gone."""
        self._lease.pop(tier, None)
        for probe in self._probes:
            if tier in probe.num_blocks:
                probe.end(TierUnavailable(f"the {tier.name} tier {why}"))

    def close(self) -> None:
        """End every probe: the device stops."""
        for probe in self._probes:
            probe.end(TierUnavailable("the daemon is stopping"))

    def _take(self, probe: Probe) -> bool:
        for tier, count in probe.num_blocks.items():
            blocks = self._scheduler.reserve(tier, count)
            if blocks is None:
                self._end(DeviceBusy(f"the {tier.name} tier has no {count} free KV blocks"))
                return False
            self._lease[tier] = blocks
        self._changed()
        return True

    def _end(self, outcome: tuple[float, ...] | SageFedError) -> None:
        self.step_aside()
        self._probes.pop(0).end(outcome)

    def _placed(self, step: Step) -> Step:
        own = self._lease[step.tier]
        return Step(
            step.tier,
            tuple(
                replace(chunk, blocks=tuple(own[index] for index in chunk.blocks))
                for chunk in step.chunks
            ),
        )
