"""The one thread that touches the device: takes messages, runs steps, hands results over.

Owns the engines, the scheduler, and the steps that are on the device. Knows of the event loop only
the outbox. An engine that raises anything but DeviceOutOfMemory is broken, as is one whose model
gives no numbers any more: its tier's sequences end FAILED, its memory is freed, and the other tiers
go on until a new engine comes. If the thread itself fails, or the device is lost for this process,
its last word says so and the event loop ends every stream.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, replace

from sage_fed.core import Tier, TierLoad, TierState, TierStatus
from sage_fed.device.messages import (
    Cancel,
    Inbox,
    Message,
    Opened,
    OpenTier,
    Outbox,
    Probe,
    StepTimes,
    Stop,
    Submit,
)
from sage_fed.device.scheduler import Scheduler
from sage_fed.device.sequence import Ended, EndReason
from sage_fed.device.tier_scheduler import Outcome
from sage_fed.errors import DeviceBusy, DeviceLost, DeviceOutOfMemory, SageFedError, TierUnavailable
from sage_fed.steps import Engine, InFlightStep, SampledToken, Step, StepKind

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """A sign of life for a watchdog: `busy` and no new `last_progress_s` means stuck.

    `last_progress_s` is on the executor's monotonic clock.
    """

    steps_done: int
    last_progress_s: float
    busy: bool


class DeviceThread:
    """The thread "sage-fed-device"; `loads` and `heartbeat` are swapped whole for any reader."""

    def __init__(
        self,
        *,
        inbox: Inbox,
        outbox: Outbox,
        scheduler: Scheduler,
        clock: Callable[[], float],
    ) -> None:
        self.exited: Future[None] = Future()
        self.loads: Mapping[Tier, TierLoad] = {}
        self.heartbeat = Heartbeat(0, clock(), busy=False)
        self._inbox = inbox
        self._outbox = outbox
        self._scheduler = scheduler
        self._probes = ProbeQueue(scheduler, self._publish)
        self._clock = clock
        self._engines: dict[Tier, Engine] = {}
        self._in_flight = InFlightSteps(clock)
        self._steps_done = 0
        self._thread = threading.Thread(target=self._main, name="sage-fed-device", daemon=True)

    def start(self) -> None:
        """Begin to serve."""
        self._thread.start()

    def _main(self) -> None:
        reason = EndReason.FAILED
        try:
            reason = self._serve()
        except BaseException:
            # The last line of defence: report and die. Streams are ended by `closed` below.
            logger.exception("the device's thread died")
        finally:
            self._beat(busy=False)
            self._leave(reason)
            self.exited.set_result(None)

    def _serve(self) -> EndReason:
        while True:
            ended: list[Ended] = []
            messages = self._inbox.take(wait=not self._busy)
            for message in messages:
                ended += self._handle(message)
            if any(isinstance(message, Stop) for message in messages):
                # Only now: an engine that came with the same messages has to be closed too.
                if paused := self._in_flight.paused:
                    self._run(paused, None)
                while self._in_flight:
                    self._finish()
                self._end_all(ended)
                return EndReason.SHUTDOWN
            self._beat(busy=True)
            if self._scheduler.has_work:
                self._probes.step_aside()
            step = self._scheduler.next_step(self._clock())
            # Before the endings are told and before the step takes its time: who reads the load
            # after an ending finds its blocks free, and places in the queue are free at once.
            # Where nothing came and nothing waits, building a step has changed none of it.
            if messages or any(load.waiting for load in self.loads.values()):
                self._publish()
            if ended:
                self._outbox.put(ended=ended)
            # Only now, with the step that follows ready to run.
            self._outbox.send()
            if step is not None:
                self._run(step, self._scheduler.pause_after_s(step))
            elif not self._in_flight and self._probes.has_work:
                self._run_probe()
            # While a step is on the device, the next is built and launched behind it.
            if self._in_flight and (step is None or self._in_flight.full):
                self._finish()
            busy = self._busy
            if self._in_flight or not busy:
                # Nothing waits for this thread: the device is at work, or there is no work.
                self._outbox.send()
            self._beat(busy=busy)

    @property
    def _busy(self) -> bool:
        return bool(self._in_flight) or self._scheduler.has_work or self._probes.has_work

    def _handle(self, message: Message) -> tuple[Ended, ...]:
        if isinstance(message, Submit):
            try:
                self._scheduler.add(message.spec, message.submitted_s)
            except SageFedError:
                # The tier failed while the sequence was under way.
                seq_id, submitted_s = message.spec.seq_id, message.submitted_s
                return (Ended(seq_id, EndReason.FAILED, submitted_s, ended_s=self._clock()),)
        elif isinstance(message, Cancel):
            return self._scheduler.cancel(message.seq_id, self._clock())
        elif isinstance(message, OpenTier):
            self._open(message)
        elif isinstance(message, StepTimes):
            self._scheduler.begin_with(message.measured_s)
        elif isinstance(message, Probe):
            self._probes.add(message)
        return ()

    def _open(self, message: OpenTier) -> None:
        tier, engine = message.tier, message.engine
        self._engines[tier] = engine
        self._scheduler.open_tier(
            tier,
            message.limits,
            engine.eos_token_ids,
            pipelined=engine.pipelined,
            num_parts=engine.num_parts,
        )
        self._outbox.put(
            status=TierStatus(tier, TierState.READY, 1.0, engine.info),
            opened=Opened(message.limits, engine.defaults),
        )

    def _run(self, step: Step, pause_after_s: float | None) -> None:
        """Launch a step, or resume it; the time that it pauses is the other tiers'."""
        resumed = step is self._in_flight.paused
        begun_s = self._clock() - (self._in_flight.paused_s if resumed else 0.0)
        try:
            if resumed:
                self._in_flight.resume(pause_after_s)
            else:
                self._in_flight.launch(self._engines[step.tier], step, pause_after_s)
            if step is self._in_flight.paused:
                self._scheduler.paused(step, self._in_flight.paused_s)
        except Exception as error:  # noqa: BLE001 - an engine may break in any way
            self._fail(step, error, self._clock() - begun_s)

    def _finish(self) -> None:
        """Take in the oldest launched step and hand its results over."""
        step, begun_s = self._in_flight.oldest, self._clock()
        try:
            sampled, elapsed_s = self._in_flight.wait()
            outcome = self._scheduler.complete(
                step, sampled, now=self._clock(), elapsed_s=elapsed_s
            )
        except Exception as error:  # noqa: BLE001 - as above
            self._fail(step, error, self._clock() - begun_s)
        else:
            self._tell(outcome)
            if self._scheduler.unsound(step.tier):
                logger.error("the %s tier's model gives no numbers any more", step.tier.name)
                ended = self._scheduler.close_tier(step.tier, EndReason.FAILED, self._clock())
                self._give_up(step.tier, ended)

    def _fail(self, step: Step, error: Exception, elapsed_s: float) -> None:
        """End as few sequences as possible after a step that its engine did not finish."""
        if isinstance(error, DeviceLost):
            raise error
        now, tier = self._clock(), step.tier
        if isinstance(error, DeviceOutOfMemory):
            logger.warning("a step of the %s tier did not fit the device", tier.name)
            self._tell(self._scheduler.out_of_memory(step, now=now, elapsed_s=elapsed_s))
        else:  # only its own tier goes with a broken engine
            logger.error("the %s tier's engine is broken", tier.name, exc_info=error)
            self._give_up(tier, self._scheduler.broken(step, now=now, elapsed_s=elapsed_s))

    def _tell(self, outcome: Outcome) -> None:
        self._steps_done += 1
        # Drafts take and give blocks of another tier.
        drafts = outcome.report.kind is StepKind.DRAFT or outcome.ended
        self._publish(*(() if drafts else (outcome.report.tier,)))
        self._outbox.put(tokens=outcome.tokens, ended=outcome.ended, report=outcome.report)

    def _run_probe(self) -> None:
        """Run one step of a probe; nothing of it is reported but its time."""
        step = self._probes.next_step()
        if step is None:
            return
        begun_s = self._clock()
        try:
            self._in_flight.launch(self._engines[step.tier], step)
            _, elapsed_s = self._in_flight.wait()
        except DeviceOutOfMemory as error:
            self._probes.end(error)
        except Exception as error:  # noqa: BLE001 - as for live work
            self._fail(step, error, self._clock() - begun_s)
        else:
            self._steps_done += 1
            self._probes.note(elapsed_s)

    def _give_up(self, tier: Tier, ended: tuple[Ended, ...]) -> None:
        """Say that a tier has failed, which the scheduler knows already, and free its engine."""
        engine = self._engines.pop(tier)
        self._in_flight.drop(tier)
        info = engine.info
        self._publish()
        message = "the engine failed; the daemon's log has the details"
        self._outbox.put(ended=ended, status=TierStatus(tier, TierState.FAILED, 0.0, info, message))
        self._outbox.send()
        self._probes.close_tier(tier, "failed")
        close_engine(engine)

    def _end_all(self, ended: list[Ended]) -> None:
        now = self._clock()
        for tier in self._engines:
            ended += self._scheduler.close_tier(tier, EndReason.SHUTDOWN, now)
        self._outbox.put(ended=ended)

    def _leave(self, reason: EndReason) -> None:
        unread = self._inbox.close()
        try:
            # Before the engines are closed, which may take long: readers are waiting.
            self._outbox.put(closed=reason)
            self._outbox.send()
        except RuntimeError:
            logger.exception("the event loop closed before the executor was stopped")
        for message in unread:
            if isinstance(message, OpenTier):
                close_engine(message.engine)
            elif isinstance(message, Probe):
                self._probes.add(message)
        self._probes.close()
        for engine in self._engines.values():
            close_engine(engine)

    def _publish(self, *tiers: Tier) -> None:
        """Show what these tiers are doing, or all that are served."""
        loads = {tier: load for tier, load in self.loads.items() if tier in self._engines}
        for tier in tiers or self._engines:
            load = self._scheduler.load(tier)
            assert load is not None
            loads[tier] = load
            self._inbox.note_waiting(tier, load.waiting)
        self.loads = loads

    def _beat(self, *, busy: bool) -> None:
        self.heartbeat = Heartbeat(self._steps_done, self._clock(), busy)


def close_engine(engine: Engine) -> None:
    """Close an engine for good; a broken one that does not even close is only logged."""
    try:
        engine.close()
    except Exception:  # the process goes on without it
        logger.exception("an engine did not close")


@dataclass(slots=True, eq=False)
class _LaunchedStep:
    """A launched step; `launched_s` is when its launch, or its last part, began.

    On the executor's clock. `overlaps` says that its engine may still be at work: the host can
    use the time. `before_s` is what the parts before the last one took.
    """

    step: Step
    running: InFlightStep
    launched_s: float
    overlaps: bool
    before_s: float = 0.0


class InFlightSteps:
    """Steps of any tier in the order of their launches, and one that is paused beside them.

    A step's time is the device's own where it has a clock: then the steps of all tiers, one behind
    the other, are each charged what they took, and the host's work beside them costs nothing. Where
    it has none, the time is from the launch, or from the end of the step before it if that came
    later; of a step that paused, the time of its parts, without what ran in between.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._launched: deque[_LaunchedStep] = deque()
        self._paused: _LaunchedStep | None = None
        self._finished_s = clock()

    def __len__(self) -> int:
        """How many can be waited for."""
        return len(self._launched)

    @property
    def full(self) -> bool:
        """Whether one has to end before the next launch: one waits behind another, or is done."""
        return len(self._launched) > 1 or not self._launched[-1].overlaps

    @property
    def oldest(self) -> Step:
        """The step to wait for next; there is one."""
        return self._launched[0].step

    @property
    def paused(self) -> Step | None:
        """The step that waits to be resumed."""
        return self._paused.step if self._paused else None

    @property
    def paused_s(self) -> float:
        """Seconds that the paused step has taken so far; 0 where there is none."""
        return self._paused.before_s if self._paused else 0.0

    def launch(self, engine: Engine, step: Step, pause_after_s: float | None = None) -> None:
        """Put a step behind the others; whatever the launch raises, it is not on the device."""
        launched_s = self._clock()
        running = engine.launch(step, pause_after_s)
        self._add(_LaunchedStep(step, running, launched_s, engine.pipelined))

    def resume(self, pause_after_s: float | None) -> None:
        """Go on with the paused step; whatever this raises, it is not on the device any more."""
        paused, self._paused = self._paused, None
        assert paused is not None
        paused.launched_s = self._clock()
        paused.running.resume(pause_after_s)
        self._add(paused)

    def wait(self) -> tuple[tuple[SampledToken, ...], float]:
        """Wait for the oldest step: what it sampled, and the seconds that it took.

        Whatever this raises, the step is not on the device any more.
        """
        launched = self._launched.popleft()
        earlier_s = self._finished_s
        try:
            sampled = launched.running.wait()
        finally:
            self._finished_s = self._clock()
        device_s = launched.running.device_s
        if device_s is None:
            last_s = self._finished_s - max(launched.launched_s, earlier_s)
            device_s = launched.before_s + last_s
        return sampled, device_s

    def drop(self, tier: Tier) -> None:
        """Forget the steps of a tier whose engine is broken."""
        self._launched = deque(one for one in self._launched if one.step.tier != tier)
        if self._paused and self._paused.step.tier == tier:
            self._paused = None

    def _add(self, launched: _LaunchedStep) -> None:
        if not launched.running.paused:
            self._launched.append(launched)
            return
        assert self._paused is None, "one step is paused at a time"
        launched.before_s += self._clock() - launched.launched_s
        self._paused = launched


class ProbeQueue:
    """The probes under way, one after the other, in the order in which they came.

    Owns the KV blocks that the first of them holds. Live work goes first: a probe holds blocks only
    while there is none, and one that was interrupted starts again from its first step, because what
    came between has changed the caches it measures. `changed` is called after blocks were taken or
    given back, and before anything is told of it.
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
        while self._probes and self._probes[0].done.done():
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
        """Return the next step on blocks of its own; None where no probe can run."""
        while self.has_work:
            if self._lease or self._take(self._probes[0]):
                return self._placed(self._probes[0].steps[len(self._elapsed_s)])
        return None

    def note(self, elapsed_s: float) -> None:
        """Take in the device's time of the step that `next_step` returned."""
        self._elapsed_s.append(elapsed_s)
        if len(self._elapsed_s) == len(self._probes[0].steps):
            self.end(tuple(self._elapsed_s))

    def end(self, outcome: tuple[float, ...] | SageFedError) -> None:
        """End the probe that is first."""
        self.step_aside()
        self._probes.pop(0).end(outcome)

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
                self.end(DeviceBusy(f"the {tier.name} tier has no {count} free KV blocks"))
                return False
            self._lease[tier] = blocks
        self._changed()
        return True

    def _placed(self, step: Step) -> Step:
        own = self._lease[step.tier]
        return Step(
            step.tier,
            tuple(
                replace(chunk, blocks=tuple(own[index] for index in chunk.blocks))
                for chunk in step.chunks
            ),
        )
