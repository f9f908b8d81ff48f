"""The event loop's side of the device: submit, cancel, load, start, stop.

Owns the sequences that live and the recovery: a tier whose engine broke is loaded again, a device
that hangs is told from a busy one. All methods run on the event loop and none of them blocks it.
Fails with InvalidField or TierUnavailable before a sequence is accepted; an accepted
one ends with exactly one `Ended`, also if the device's thread dies or does not come back.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Protocol

from sage_fed.core import Sampling, Tier, TierLoad, TierState, TierStatus
from sage_fed.device.device_thread import DeviceThread, Heartbeat
from sage_fed.device.messages import (
    Batch,
    Cancel,
    Inbox,
    Outbox,
    Pacer,
    Ping,
    Probe,
    StepTimes,
    Stop,
    Submit,
)
from sage_fed.device.scheduler import Scheduler
from sage_fed.device.sequence import Ended, EndReason, SequenceSpec, TierLimits
from sage_fed.device.tier_loading import FIRST_S, LOOK_S, Loader, Stall, TierSetup, TierStates
from sage_fed.errors import DeviceBusy, TierUnavailable
from sage_fed.steps import SampledToken, Step, StepReport

logger = logging.getLogger(__name__)

_GIVEN_UP_S = 0.5
_EXIT_S = 10.0
"""How long a stop waits for a thread to come back from the device or from a load."""


class ExecutorObserver(Protocol):
    """Hears what happens, on the event loop, after the streams have."""

    def step_done(self, report: StepReport) -> None:
        """One step was run, or several of a kind where the loop had stalled."""

    def tier_changed(self, status: TierStatus) -> None:
        """A tier's state or load progress changed."""


TokensTaker = Callable[[Sequence[SampledToken]], None]
"""Is given a sequence's tokens on the event loop, as they come and in order."""


@dataclass(slots=True, eq=False)
class _LiveSequence:
    """A sequence that was accepted and has not ended."""

    spec: SequenceSpec
    submitted_s: float
    take: TokensTaker | None
    ended: asyncio.Future[Ended]
    num_tokens: int = 0
    cancel_asked: bool = False

    def push(self, tokens: Sequence[SampledToken]) -> None:
        self.num_tokens += len(tokens)
        if self.take is None:
            return
        try:
            self.take(tokens)
        except Exception as error:  # noqa: BLE001 - a reader's failure is its own, not its neighbours'
            self.take = None
            if not self.ended.done():
                self.ended.set_exception(error)

    def end(self, ended: Ended) -> None:
        if not self.ended.done():
            self.ended.set_result(ended)


class Executor:
    """Two engines on one device, shared by many streams.

    Args:
        tiers: how to load each tier and its bounds; loaded in the order of rank.
        observers: told of steps and of tiers.
        tactical_share: of device time, while both tiers have work.
        step_timeout_s: how long the device may be busy without a sign of life; see `watch`.
        reload_s: how soon a tier that failed is loaded again, the first time.
        max_stream_messages_per_s: that the readers of all streams will send together; 0 is no
            limit. The event loop looks for tokens no more often than that.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        tiers: Mapping[Tier, TierSetup],
        *,
        observers: Sequence[ExecutorObserver] = (),
        tactical_share: float = 0.5,
        step_timeout_s: float = 60.0,
        reload_s: float = FIRST_S,
        max_stream_messages_per_s: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._step_timeout_s = step_timeout_s
        self._setups = dict(sorted(tiers.items(), key=lambda item: item[0].rank))
        self._observers = tuple(observers)
        self._tactical_share = tactical_share
        self.pacer = Pacer(max_stream_messages_per_s)
        """Of the streams that the tokens go to."""
        self._clock = clock
        self._inbox = Inbox()
        self._live: dict[int, _LiveSequence] = {}
        self._none_live = asyncio.Event()
        self._none_live.set()
        self._probes: set[Probe] = set()
        self._states = TierStates(
            self._setups, reload_s=reload_s, stuck_retry_s=step_timeout_s, clock=clock
        )
        self._news = asyncio.Event()
        self._device: DeviceThread | None = None
        self._outbox: Outbox | None = None
        self._loaders: list[Loader] = []

    async def start(self) -> None:
        """Start the threads and return at once; `loaded` waits for a tier."""
        assert self._device is None, "an executor starts once"
        self._outbox = Outbox(
            asyncio.get_running_loop(),
            self._deliver,
            lambda: self.pacer.rest_s(len(self._live)),
        )
        self._device = DeviceThread(
            inbox=self._inbox,
            outbox=self._outbox,
            scheduler=Scheduler(fast_share=self._tactical_share),
            clock=self._clock,
        )
        self._device.start()
        self._load(self._setups)

    async def loaded(self, tier: Tier) -> TierStatus:
        """Wait until a tier has left LOADING: it serves, or says why it does not."""
        while self.status(tier).state is TierState.LOADING:
            self._news.clear()
            await self._news.wait()
        return self.status(tier)

    async def watch(self, look_s: float = LOOK_S) -> None:
        """Tell a device that hangs from one that works, until cancelled.

        A device that was busy for `step_timeout_s` without a sign of life has failed: every
        sequence ends, and all tiers are down, because one thread serves them. Where the device
        comes back after all, they serve again; after as long a time once more they never will.
        """
        stall = Stall(look_s)
        while not self._states.over:
            await asyncio.sleep(look_s)
            if self._device is None:
                continue
            stalled_s = stall.look(self._device.heartbeat)
            if stalled_s >= 2 * self._step_timeout_s:
                logger.critical("the device did not come back in %.0f s", stalled_s)
                self._give_up("the device does not answer; the daemon has to be restarted")
            elif stalled_s >= self._step_timeout_s and not self._states.stuck:
                logger.critical("the device has not answered for %.0f s", stalled_s)
                self._part_from_device()
            elif not stalled_s and self._states.stuck:
                logger.warning("the device answers again")
                self._states.stuck = False
                self._tell(self._states.all())

    def submit(self, spec: SequenceSpec, take: TokensTaker) -> asyncio.Future[Ended]:
        """Accept a sequence; `spec.seq_id` is not in use by another live one.

        `take` is called with its tokens until the returned future has the ending. What `take`
        raises is the future's exception, and it is not called again.

        Raises:
            TierUnavailable: the tier is loading, failed, unknown or draining.
            InvalidField: the sequence can never fit.
        """
        assert spec.seq_id not in self._live, "a sequence id is in use once"
        self._states.serving(spec.tier).limits.check(spec)
        submitted_s = self._clock()
        self._inbox.post(Submit(spec, submitted_s))
        ended: asyncio.Future[Ended] = asyncio.get_running_loop().create_future()
        self._live[spec.seq_id] = _LiveSequence(spec, submitted_s, take, ended)
        self._none_live.clear()
        return ended

    def cancel(self, seq_id: int) -> bool:
        """End a sequence at the next step boundary; False where it has ended already."""
        live = self._live.get(seq_id)
        if live is None:
            return False
        if not live.cancel_asked:
            live.cancel_asked = True
            self._inbox.post(Cancel(seq_id))
        return True

    async def probe(self, steps: Sequence[Step], timeout_s: float) -> tuple[float, ...]:
        """Run steps that serve no job and return the device's seconds of each.

        They run one after the other while no live sequence has work. Where one comes, it goes
        first, and the steps are run again from the first when it has ended. A chunk's `blocks`
        number blocks that are reserved for this call, from 0, and given back however it ends.

        Raises:
            TierUnavailable: a tier does not serve, or ceases to.
            DeviceOutOfMemory: a step did not fit the device.
            DeviceBusy: live work left no time for all the steps within `timeout_s`.
        """
        probe = Probe(steps)
        for tier, num_blocks in probe.num_blocks.items():
            limits = self._states.serving(tier).limits
            assert num_blocks <= limits.num_blocks, "more blocks than the tier has"
        if not self._inbox.post(probe):
            raise TierUnavailable("the device's thread has ended")
        self._probes.add(probe)
        try:
            async with asyncio.timeout(timeout_s):
                return await asyncio.wrap_future(probe.done)
        except TimeoutError:
            raise DeviceBusy("live jobs kept the device busy; calibrate when it is idle") from None
        finally:
            probe.done.cancel()
            self._probes.discard(probe)

    def begin_with(self, measured_s: Mapping[Tier, Mapping[int, float]]) -> None:
        """Plan drafts by what steps of so many rows took when they were measured, in seconds.

        Serving goes on from there. Tiers that are left out have nothing measured.
        """
        self._inbox.post(StepTimes(measured_s))

    def load(self, tier: Tier) -> TierLoad:
        """Return what a tier is doing, as of its last step; `waiting` is as of now."""
        status = self.status(tier)
        opened = self._states.opened.get(tier)
        if self._device is None or opened is None or status.state is TierState.FAILED:
            return TierLoad(tier, status.state, waiting_limit=self._setups[tier].max_waiting)
        load = self._device.loads.get(tier) or TierLoad(
            tier,
            status.state,
            waiting_limit=opened.limits.max_waiting,
            kv_tokens_total=opened.limits.kv_tokens,
            max_context_tokens=opened.limits.max_context_tokens,
        )
        waiting = self._inbox.waiting(tier)
        if (load.state, load.waiting) == (status.state, waiting):
            return load
        return replace(load, state=status.state, waiting=waiting)

    def status(self, tier: Tier) -> TierStatus:
        """Return a tier's state, load progress and model."""
        return self._states.of(tier)

    def defaults(self, tier: Tier) -> Sampling | None:
        """Return the loaded checkpoint's own sampling; None until it is loaded."""
        opened = self._states.opened.get(tier)
        return opened.defaults if opened else None

    def limits(self, tier: Tier) -> TierLimits | None:
        """Return a loaded tier's bounds; None until it is loaded."""
        opened = self._states.opened.get(tier)
        return opened.limits if opened else None

    @property
    def num_live(self) -> int:
        """Sequences that were accepted and have not ended."""
        return len(self._live)

    @property
    def heartbeat(self) -> Heartbeat | None:
        """The device thread's last sign of life; None before `start`."""
        return self._device.heartbeat if self._device else None

    def ping(self) -> None:
        """Have the device's thread turn its loop, which moves `heartbeat`, also when idle."""
        self._inbox.post(Ping())

    async def stop(self, grace_s: float) -> None:
        """Admit no more, let live sequences end within the grace, end the rest with SHUTDOWN.

        Returns when the threads have ended, or after a bounded wait for a device or a load
        that does not come back; streams are ended in any case. May be called again with a
        shorter grace while it runs.
        """
        self._drain()
        if self._device is None:
            return
        await self._wait_for_endings(grace_s)
        for loader in self._loaders:
            loader.abandon()
        self._inbox.post(Stop())
        exits = [("device", self._device.exited)]
        exits += [("loader", loader.exited) for loader in self._loaders]
        # What was given up already is not waited for once more.
        patience_s = _GIVEN_UP_S if self._states.over else _EXIT_S
        for name, exited in exits:
            if not await _wait_for_exit(exited, patience_s):
                logger.critical("the %s's thread did not stop in %.1f s", name, patience_s)
        # What a thread posts before it exits is opened before its exit is heard; what is left
        # belongs to a device that hangs.
        self._end_live(EndReason.SHUTDOWN)

    def _drain(self) -> None:
        self._states.draining = True
        for probe in self._probes:
            probe.end(TierUnavailable("the daemon is draining"))
        self._tell(self._states.all())

    async def _wait_for_endings(self, grace_s: float) -> None:
        try:
            async with asyncio.timeout(grace_s):
                await self._none_live.wait()
        except TimeoutError:
            logger.warning("%d sequences outlived the grace", len(self._live))

    def _deliver(self, batch: Batch) -> None:
        """Take in what the threads said: tokens first, so that no observer costs one.

        Of a sequence that was ended here, nothing is heard any more.
        """
        for seq_id, tokens in batch.tokens.items():
            live = self._live.get(seq_id)
            if live is None:
                continue
            if tokens:
                live.push(tokens)
            if (ended := batch.ended.get(seq_id)) is not None:
                del self._live[seq_id]
                live.end(ended)
        if not self._live:
            self._none_live.set()
        self._states.opened |= batch.opened
        for status in batch.statuses.values():
            self._change(status)
        if batch.closed:
            self._end_live(batch.closed)
        if batch.closed is EndReason.FAILED:
            self._give_up("the device's thread failed; the daemon's log has the details")
        for report in (*batch.reports, *batch.summed.values()):
            for observer in self._observers:
                observer.step_done(report)

    def _end_live(self, reason: EndReason) -> None:
        """End what the device's thread did not end itself, after all that it has said."""
        if self._outbox is not None:
            self._outbox.flush()
        sequences, self._live = self._live, {}
        self._none_live.set()
        for live in sequences.values():
            live.end(
                Ended(
                    seq_id=live.spec.seq_id,
                    reason=reason,
                    submitted_s=live.submitted_s,
                    ended_s=self._clock(),
                    output_tokens=live.num_tokens,
                )
            )

    def _change(self, status: TierStatus) -> None:
        """Take in a tier's news; one that served and failed is loaded again."""
        delay_s = self._states.take(status)
        if delay_s is not None:
            asyncio.get_running_loop().call_later(delay_s, self._reload, status.tier)
        self._tell([self._states.of(status.tier)])

    def _reload(self, tier: Tier) -> None:
        if not self._states.draining and not self._states.over:
            self._change(TierStatus(tier, TierState.LOADING))
            self._load({tier: self._setups[tier]})

    def _load(self, setups: Mapping[Tier, TierSetup]) -> None:
        assert self._outbox is not None
        self._loaders = [loader for loader in self._loaders if not loader.exited.done()]
        loader = Loader(setups, self._inbox, self._outbox)
        self._loaders.append(loader)
        loader.start()

    def _part_from_device(self) -> None:
        """End all sequences of a device that hangs; should it wake, it drops what it has.

        What it says of them later is not heard: their ids are never used again.
        """
        self._states.stuck = True
        for seq_id in self._live:
            self._inbox.post(Cancel(seq_id))
        for probe in self._probes:
            probe.end(TierUnavailable("the device does not answer"))
        self._end_live(EndReason.FAILED)
        self._tell(self._states.all())

    def _give_up(self, message: str) -> None:
        """Fail every tier for good."""
        self._states.end(message)
        self._end_live(EndReason.FAILED)
        self._tell(self._states.all())

    def _tell(self, changed: Iterable[TierStatus]) -> None:
        self._news.set()
        for status in changed:
            for observer in self._observers:
                observer.tier_changed(status)


async def _wait_for_exit(exited: Future[None], patience_s: float) -> bool:
    try:
        await asyncio.wait_for(asyncio.shield(asyncio.wrap_future(exited)), patience_s)
    except TimeoutError:
        return False
    return True
