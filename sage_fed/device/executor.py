"""The event loop's side of the device: submit, cancel, load, start, stop.

Owns the live streams and the recovery: a tier whose engine broke is loaded again, a device that
hangs is told from a busy one. All methods run on the event loop and none of them blocks it.
Fails with InvalidField, QueueFull or TierUnavailable before a sequence is accepted; an accepted
one ends with exactly one `Ended`, also if the device's thread dies or does not come back.

The sequences that were accepted and have not ended: one stream each.

Owns them until their ending, which is the device's word, or ours where it has none to say: then
what was delivered is all that is known. Hands a step's tokens to some streams in each turn of the
event loop, so that however many there are, others get their turns between them.
Event loop only. Cannot fail.

One sequence's output on the event loop: tokens as they come, then exactly one ending.

Owns what its reader has not taken yet: at most `max_new_tokens` tokens, whatever the reader
does, so a slow reader merges and never stalls the device. Event loop only, one reader.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Protocol

from sage_fed.core import GenerationDefaults, Tier, TierLoad, TierState, TierStatus
from sage_fed.device.device_thread import DeviceThread, Heartbeat
from sage_fed.device.messages import (
    Cancel,
    Handover,
    Inbox,
    Parcel,
    Ping,
    Probe,
    Stop,
    Submit,
    rest_s,
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


class Executor:
    """Two engines on one device, shared by many streams.

    Args:
        tiers: how to load each tier and its bounds; loaded in the order of depth.
        observers: told of steps and of tiers.
        tactical_share: of device time, while both tiers have work.
        step_timeout_s: how long the device may be busy without a sign of life; see `watch`.
        reload_s: how soon a tier that failed is loaded again, the first time.
        max_stream_messages_per_s: that the readers of all streams will send together; 0 is no
            limit. Tokens are handed over no more often than that.
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
        self._max_stream_messages_per_s = max_stream_messages_per_s
        self._clock = clock
        self._inbox = Inbox({tier: setup.max_waiting for tier, setup in tiers.items()})
        self._streams = LiveStreams(clock)
        self._probes: set[Probe] = set()
        self._states = TierStates(
            self._setups, reload_s=reload_s, stuck_retry_s=step_timeout_s, clock=clock
        )
        self._news = asyncio.Event()
        self._device: DeviceThread | None = None
        self._handover: Handover | None = None
        self._loaders: list[Loader] = []

    async def start(self) -> None:
        """Start the threads and return at once; `loaded` waits for a tier."""
        assert self._device is None, "an executor starts once"
        self._handover = Handover(
            asyncio.get_running_loop(),
            self._deliver,
            lambda: rest_s(len(self._streams), self._max_stream_messages_per_s),
        )
        self._device = DeviceThread(
            inbox=self._inbox,
            handover=self._handover,
            scheduler=Scheduler(tactical_share=self._tactical_share),
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
        stream ends, and both tiers are down, because one thread serves both. Where the device
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

    def submit(self, spec: SequenceSpec) -> TokenStream:
        """Accept a sequence; `spec.seq_id` is not in use by another live one.

        Raises:
            TierUnavailable: the tier is loading, failed, unknown or draining.
            InvalidField: the sequence can never fit.
            QueueFull: too many wait already.
        """
        assert self._streams.find(spec.seq_id) is None, "a sequence id is in use once"
        self._states.serving(spec.tier).limits.check(spec)
        submitted_s = self._clock()
        self._inbox.submit(Submit(spec, submitted_s))
        return self._streams.open(spec, submitted_s)

    def cancel(self, seq_id: int) -> bool:
        """End a sequence at the next step boundary; False where it has ended already."""
        stream = self._streams.find(seq_id)
        if stream is None:
            return False
        if not stream.cancel_asked:
            stream.cancel_asked = True
            self._inbox.post(Cancel(seq_id))
        return True

    async def probe(self, steps: Sequence[Step], timeout_s: float) -> tuple[float, ...]:
        """Run steps that serve nobody and return the device's seconds of each.

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

    async def abort_all(self) -> None:
        """Cancel every live sequence and wait until all have ended."""
        for stream in self._streams:
            self.cancel(stream.spec.seq_id)
        await self._streams.wait_ended()

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

    def defaults(self, tier: Tier) -> GenerationDefaults | None:
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
        return len(self._streams)

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
        await self._wait_for_streams(grace_s)
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
        self._streams.end_all(EndReason.SHUTDOWN)

    def _drain(self) -> None:
        self._states.draining = True
        for probe in self._probes:
            probe.end(TierUnavailable("the daemon is draining"))
        self._tell(self._states.all())

    async def _wait_for_streams(self, grace_s: float) -> None:
        try:
            async with asyncio.timeout(grace_s):
                await self._streams.wait_ended()
        except TimeoutError:
            logger.warning("%d sequences outlived the grace", len(self._streams))

    def _deliver(self, parcel: Parcel) -> None:
        """Open a parcel: streams first, observers last, so that none of them costs a token."""
        self._streams.take(parcel.drawn, parcel.ended)
        self._states.opened |= parcel.opened
        for status in parcel.statuses.values():
            self._change(status)
        if parcel.closed:
            self._streams.end_all(parcel.closed)
        if parcel.closed is EndReason.FAILED:
            self._give_up("the device's thread failed; the daemon's log has the details")
        for report in (*parcel.reports, *parcel.merged.values()):
            for observer in self._observers:
                observer.step_done(report)

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
        assert self._handover is not None
        self._loaders = [loader for loader in self._loaders if not loader.exited.done()]
        loader = Loader(setups, self._inbox, self._handover)
        self._loaders.append(loader)
        loader.start()

    def _part_from_device(self) -> None:
        """Let nobody wait for a device that hangs; it is told to drop what it has, should it wake.

        What it says of those streams later is not heard: their ids are never used again.
        """
        self._states.stuck = True
        for stream in self._streams:
            self._inbox.post(Cancel(stream.spec.seq_id))
        for probe in self._probes:
            probe.end(TierUnavailable("the device does not answer"))
        self._streams.end_all(EndReason.FAILED)
        self._tell(self._states.all())

    def _give_up(self, message: str) -> None:
        """Fail every tier for good."""
        self._states.end(message)
        self._streams.end_all(EndReason.FAILED)
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


_STREAMS_A_TURN = 32
"""A stream takes some 5 µs to hand its tokens, and its reader some 100 to write them."""


class LiveStreams:
    """Streams by sequence id; `clock` is the executor's."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._streams: dict[int, TokenStream] = {}
        # What has come and not been handed over yet, in order.
        self._come: dict[int, list[SampledToken]] = {}
        self._ended: dict[int, Ended] = {}
        self._turn_is_due = False

    def __len__(self) -> int:
        return len(self._streams)

    def __iter__(self) -> Iterator[TokenStream]:
        """Those that live now; they may end meanwhile."""
        return iter(tuple(self._streams.values()))

    def find(self, seq_id: int) -> TokenStream | None:
        """Return the stream of a sequence that has not ended."""
        return self._streams.get(seq_id)

    def open(self, spec: SequenceSpec, submitted_s: float) -> TokenStream:
        """Return the stream of a sequence that was accepted."""
        stream = self._streams[spec.seq_id] = TokenStream(spec, submitted_s)
        return stream

    def take(self, drawn: Mapping[int, Sequence[SampledToken]], ended: Iterable[Ended]) -> None:
        """Take in the device's news; of a sequence that has ended here, they are not heard."""
        for seq_id, tokens in drawn.items():
            self._come.setdefault(seq_id, []).extend(tokens)
        for ending in ended:
            self._come.setdefault(ending.seq_id, [])
            self._ended[ending.seq_id] = ending
        if not self._turn_is_due:
            self._hand_over(_STREAMS_A_TURN)

    def _next_turn(self) -> None:
        self._turn_is_due = False
        self._hand_over(_STREAMS_A_TURN)

    def _hand_over(self, most: int) -> None:
        """Hand over what came first, and the rest in the loop's next turns."""
        for seq_id in tuple(itertools.islice(self._come, most)):
            tokens = self._come.pop(seq_id)
            ending = self._ended.pop(seq_id, None)
            stream = self._streams.get(seq_id)
            if stream is None:
                continue
            if tokens:
                stream.push(tokens)
            if ending is not None:
                del self._streams[seq_id]
                stream.end(ending)
        if self._come and not self._turn_is_due:
            self._turn_is_due = True
            asyncio.get_running_loop().call_soon(self._next_turn)

    def end_all(self, reason: EndReason) -> None:
        """End what the device's thread did not end itself."""
        self._hand_over(len(self._come))
        streams, self._streams = self._streams, {}
        for stream in streams.values():
            stream.end(
                Ended(
                    seq_id=stream.spec.seq_id,
                    reason=reason,
                    submitted_s=stream.submitted_s,
                    ended_s=self._clock(),
                    output_tokens=stream.num_tokens,
                )
            )

    async def wait_ended(self) -> None:
        """Wait until all that live now have ended."""
        for stream in self:
            await stream.wait_ended()


@dataclass(frozen=True, slots=True)
class Tokens:
    """Tokens since the last `next`, at least one, in order."""

    drawn: tuple[SampledToken, ...]


class TokenStream:
    """What `Executor.submit` returns; the executor writes it, one reader reads it."""

    def __init__(self, spec: SequenceSpec, submitted_s: float) -> None:
        self.spec = spec
        self.submitted_s = submitted_s
        self.num_tokens = 0
        self.cancel_asked = False
        self._unread: list[SampledToken] = []
        self._ended: Ended | None = None
        self._changed = asyncio.Event()
        self._over = asyncio.Event()
        self._reader: Callable[[Sequence[SampledToken]], None] | None = None
        self._delivered: asyncio.Future[Ended] | None = None

    @property
    def ended(self) -> Ended | None:
        """The ending, if it has come; tokens before it may still be unread."""
        return self._ended

    async def next(self) -> Tokens | Ended:
        """Wait for more; the ending comes after the last token, and again if asked again.

        No deadline of its own: every stream is ended whatever happens to the device, and a
        reader with a deadline may cancel this wait without losing a token.
        """
        while not self._unread and self._ended is None:
            self._changed.clear()
            await self._changed.wait()
        if self._unread:
            drawn, self._unread = tuple(self._unread), []
            return Tokens(drawn)
        assert self._ended is not None
        return self._ended

    async def deliver(self, reader: Callable[[Sequence[SampledToken]], None]) -> Ended:
        """Call `reader` with tokens the moment they come, and return the ending.

        No task is woken for a token, which at many streams is what an event loop does most.
        What `reader` raises is raised here, and it is not called again.
        """
        assert self._delivered is None, "one reader"
        unread, self._unread = self._unread, []
        if unread:
            reader(unread)
        if self._ended is not None:
            return self._ended
        self._delivered = asyncio.get_running_loop().create_future()
        self._reader = reader
        try:
            return await self._delivered
        finally:
            self._reader = self._delivered = None

    async def wait_ended(self) -> Ended:
        """Wait for the ending without reading."""
        await self._over.wait()
        assert self._ended is not None
        return self._ended

    def push(self, drawn: Sequence[SampledToken]) -> None:
        """Write tokens (the executor only)."""
        assert self._ended is None
        self.num_tokens += len(drawn)
        if self._reader is None:
            self._unread.extend(drawn)
            self._changed.set()
            return
        try:
            self._reader(drawn)
        except Exception as error:  # noqa: BLE001 - a reader's failure is its own, not its neighbours'
            self._reader = None
            if self._delivered is not None and not self._delivered.done():
                self._delivered.set_exception(error)

    def end(self, ended: Ended) -> None:
        """Write the one ending (the executor only)."""
        assert self._ended is None, "a sequence ends once"
        self._ended = ended
        self._changed.set()
        self._over.set()
        if self._delivered is not None and not self._delivered.done():
            self._delivered.set_result(ended)
