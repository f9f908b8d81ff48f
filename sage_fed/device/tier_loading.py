"""The tiers' engines and states: loaded, serving, failed, and loaded again.

`Loader` reads the engines one after the other on a thread of its own, and owns an engine until the
device's thread has taken it. The lowest rank comes first, so it serves while deeper tiers are read.
A model that cannot be loaded is its tier's failure: it is reported and the next one is loaded.

`TierStates` owns what clients see of each tier, as the threads say it, and what lies over that: a
drain, a device that does not answer, the end. `Stall` tells a device that hangs from a busy one.
Both are the event loop's and start nothing themselves.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, replace

from sage_fed.core import Tier, TierState, TierStatus
from sage_fed.device.device_thread import Heartbeat, close_engine
from sage_fed.device.messages import Inbox, Opened, OpenTier, Outbox
from sage_fed.device.sequence import TierLimits
from sage_fed.errors import SageFedError, TierUnavailable
from sage_fed.steps import Engine

logger = logging.getLogger(__name__)

_RETRY_LOADING_S = 5.0

FIRST_S = 1.0
MOST_S = 60.0
SOUND_S = 300.0
"""A tier that has served for so long has recovered: its next failure is a first one again."""

LOOK_S = 0.5
"""How often the device's heartbeat is looked at."""


@dataclass(frozen=True, slots=True)
class TierSetup:
    """How to get a tier's engine, and how much it may take on.

    `load` blocks; it is given a callback for its progress from 0 to 1, which raises where
    the engine is not waited for any more.
    """

    load: Callable[[Callable[[float], None]], Engine]
    max_batch: int = 16
    max_waiting: int = 64
    prefill_chunk_tokens: int = 512
    prefix_cache: bool = True
    kv_overcommit: float = 1.0

    def limits(self, engine: Engine) -> TierLimits:
        """Return the tier's bounds, now that the engine is known."""
        return TierLimits(
            num_blocks=engine.num_blocks,
            max_context_tokens=engine.max_context_tokens,
            max_batch=self.max_batch,
            max_waiting=self.max_waiting,
            prefill_chunk_tokens=self.prefill_chunk_tokens,
            prefix_cache=self.prefix_cache,
            kv_overcommit=self.kv_overcommit,
            num_ids=engine.num_ids,
        )


class LoadAbandoned(Exception):
    """Raised into a load by its progress callback when the executor stops."""


class Loader:
    """The thread "sage-fed-loader"; `exited` is done when it has ended."""

    def __init__(self, setups: Mapping[Tier, TierSetup], inbox: Inbox, outbox: Outbox) -> None:
        self.exited: Future[None] = Future()
        self._setups = setups
        self._inbox = inbox
        self._outbox = outbox
        self._abandoned = threading.Event()
        self._thread = threading.Thread(target=self._main, name="sage-fed-loader", daemon=True)

    def start(self) -> None:
        """Begin to load."""
        self._thread.start()

    def abandon(self) -> None:
        """Stop at the next report of progress."""
        self._abandoned.set()

    def _main(self) -> None:
        try:
            for tier, setup in self._setups.items():
                if self._abandoned.is_set():
                    break
                self._load(tier, setup)
        except RuntimeError:
            # The event loop has closed without stopping the executor.
            logger.exception("the loader has no event loop to report to")
        finally:
            self.exited.set_result(None)

    def _load(self, tier: Tier, setup: TierSetup) -> None:
        def progress(fraction: float) -> None:
            if self._abandoned.is_set():
                raise LoadAbandoned
            self._tell(TierStatus(tier, TierState.LOADING, fraction))

        try:
            engine = setup.load(progress)
            message = OpenTier(tier, engine, setup.limits(engine))
        except LoadAbandoned:
            return
        except SageFedError as error:
            self._fail(tier, error.message)
        except Exception:  # a loader of foreign files may raise anything
            logger.exception("loading the %s tier failed", tier.name)
            self._fail(tier, "loading failed; the daemon's log has the details")
        else:
            if not self._inbox.post(message):
                close_engine(engine)

    def _fail(self, tier: Tier, message: str) -> None:
        self._tell(TierStatus(tier, TierState.FAILED, message=message))

    def _tell(self, status: TierStatus) -> None:
        self._outbox.put(status=status)
        self._outbox.send()


class TierStates:
    """The tiers' states. Fails with TierUnavailable where it is asked for one that does not serve.

    Args:
        tiers: all LOADING at first.
        reload_s: how soon a tier that failed is loaded again, the first time.
        stuck_retry_s: what clients are told of a device that does not answer.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        tiers: Iterable[Tier],
        *,
        reload_s: float,
        stuck_retry_s: float,
        clock: Callable[[], float],
    ) -> None:
        self._statuses = {tier: TierStatus(tier, TierState.LOADING) for tier in tiers}
        self._backoffs = {tier: BackOff(reload_s) for tier in self._statuses}
        self._stuck_retry_s = stuck_retry_s
        self._clock = clock
        self.opened: dict[Tier, Opened] = {}
        """What is known of each tier that has served."""
        self.draining = False
        self.stuck = False
        self.over = False

    def of(self, tier: Tier) -> TierStatus:
        """Return a tier's state, load progress and model."""
        status = self._statuses[tier]
        if status.state is TierState.FAILED:
            return status
        if self.stuck:
            message = "the device does not answer; it may come back, or the daemon stops"
            return replace(
                status, state=TierState.FAILED, message=message, retry_s=self._stuck_retry_s
            )
        return replace(status, state=TierState.DRAINING) if self.draining else status

    def all(self) -> tuple[TierStatus, ...]:
        """Return every tier's."""
        return tuple(self.of(tier) for tier in self._statuses)

    def serving(self, tier: Tier) -> Opened:
        """Return what is known of a tier that serves now.

        Raises:
            TierUnavailable: it is loading, failed, unknown or draining.
        """
        status = self.of(tier) if tier in self._statuses else TierStatus(tier, TierState.FAILED)
        if status.state is TierState.READY and tier in self.opened:
            return self.opened[tier]
        loading = status.state is TierState.LOADING
        failed = status.state is TierState.FAILED
        retry_s = _RETRY_LOADING_S if loading else status.retry_s if failed else None
        raise TierUnavailable(f"the {tier.name} tier is {status.state.value}", retry_s)

    def take(self, status: TierStatus) -> float | None:
        """Take in a tier's news; returns after how many seconds it is to be loaded again.

        None where it is not: it did not fail, has never served, or the daemon stops.
        """
        if self.over:
            return None
        tier, known, delay_s = status.tier, self._statuses[status.tier], None
        if status.state is TierState.READY:
            self._backoffs[tier].ready(self._clock())
        restarts, retry_s = known.restarts, None
        match status.state:
            case TierState.READY if known.retry_s is not None:
                restarts += 1
                logger.warning("the %s tier serves again", tier.name)
            case TierState.LOADING:
                # Kept until it serves: that is how a return is known from a first start.
                retry_s = known.retry_s
            case TierState.FAILED if tier in self.opened and not self.draining:
                delay_s = retry_s = self._backoffs[tier].failed(self._clock())
                logger.warning("the %s tier is loaded again in %.0f s", tier.name, delay_s)
        self._statuses[tier] = replace(status, retry_s=retry_s, restarts=restarts)
        return delay_s

    def end(self, message: str) -> None:
        """Fail every tier for good: only a new process can use the device again."""
        self.over = True
        for tier, status in self._statuses.items():
            self._statuses[tier] = replace(
                status, state=TierState.FAILED, message=message, retry_s=None
            )


class BackOff:
    """How long one tier waits before it is loaded again: twice as long each time, to a bound."""

    def __init__(self, first_s: float = FIRST_S) -> None:
        self._first_s = first_s
        self._failures = 0
        self._ready_s: float | None = None

    def ready(self, now: float) -> None:
        """Note that the tier serves."""
        self._ready_s = now

    def failed(self, now: float) -> float:
        """Return after how many seconds to load it again."""
        if self._ready_s is not None and now - self._ready_s >= SOUND_S:
            self._failures = 0
        self._ready_s = None
        self._failures += 1
        return min(self._first_s * 2.0 ** min(self._failures - 1, 10), MOST_S)


class Stall:
    """For how long the device has been busy without a sign of life, by looks every `look_s`.

    Time counts only between looks: a process that was stopped, or a machine that slept,
    has not been waiting for its device.
    """

    def __init__(self, look_s: float) -> None:
        self._look_s = look_s
        self._stalled_s = 0.0
        self._last: Heartbeat | None = None

    def look(self, heartbeat: Heartbeat) -> float:
        """Return for how long there was none, `look_s` after the look before this one."""
        same = heartbeat.busy and heartbeat == self._last
        self._stalled_s = self._stalled_s + self._look_s if same else 0.0
        self._last = heartbeat
        return self._stalled_s
