"""Whether the daemon is ready, alive, and when it stops.

Owns the last known state of each tier and what it means for health checks, for the start's
progress and for exiting; the signals; and the rule of what counts as progress of the device's
thread. A thread that hangs in the device cannot be ended from inside its process: the service
manager is no longer told that we live, and restarts us.
The manager hears that the daemon is ready when the health service says so under the name of the
whole: when the tactical tier serves. Event loop only.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import time
from collections.abc import Iterable
from typing import Protocol

from sage_fed.core import Address, Tier, TierState, TierStatus, UnixSocket
from sage_fed.device import Executor, Heartbeat
from sage_fed.service import Health
from sage_fed.settings import Settings
from sage_fed.steps import StepReport
from sage_fed.systemd.notify import ServiceManager

_LOAD_PATIENCE_S = 300.0
"""Between two signs of progress of a load; a whole one was seen to take 272 s."""

_log = logging.getLogger(__name__)


class StartProgress(Protocol):
    """Who is told how the start goes."""

    def tier_progress(self, tier: Tier, share: float, text: str) -> None:
        """A tier has loaded this share (0 to 1)."""

    def ready(self, listen: str, metrics_url: str) -> None:
        """Every tier serves: calls at the address that is bound, metrics at their URL."""


class Laps:
    """Says in the log how long each part of the start took, the models aside."""

    def __init__(self) -> None:
        self._since_s = time.monotonic()

    def done(self, part: str) -> None:
        """Log the time since the part before this one."""
        now = time.monotonic()
        _log.info("start: %s took %.3f s", part, now - self._since_s)
        self._since_s = now


class Readiness:
    """Satisfies `sage_fed.device.ExecutorObserver`."""

    def __init__(
        self,
        settings: Settings,
        lifecycle: Lifecycle,
        progress: StartProgress,
        manager: ServiceManager,
    ) -> None:
        self._names = {tier: own.display_name for tier, own in settings.tiers.items()}
        self._lifecycle = lifecycle
        self._progress = progress
        self._manager = manager
        self._announced = False
        self._statuses: dict[Tier, TierStatus] = {}
        self._loaded: set[Tier] = set()
        self._in_vain: set[Tier] = set()
        self._changed = asyncio.Event()
        self._where: tuple[str, str] | None = None
        self._answering = False
        self._ledger_accepts = True

    def listening(self, listen: Address | UnixSocket, metrics_url: str) -> None:
        """Note what is bound, for the line that says that all is ready."""
        self._where = str(listen), metrics_url

    def answering(self) -> None:
        """Note that calls are answered from now on."""
        self._answering = True
        self._changed.set()

    def ledger_accepts(self, accepts: bool) -> None:
        """Note whether the ledger takes entries: without it no tier takes a job."""
        self._ledger_accepts = accepts
        self._changed.set()
        self._tell_manager()

    def _tell_manager(self) -> None:
        line = status_line(self._statuses.values())
        self._manager.status(
            line if self._ledger_accepts else f"the ledger takes no entries; {line}"
        )

    def step_done(self, report: StepReport) -> None:
        """Steps say nothing about readiness."""

    def tier_changed(self, status: TierStatus) -> None:
        """Note a tier's state; a start that failed, or a daemon without hope of a tier, stops."""
        before = self._statuses.get(status.tier)
        self._statuses[status.tier] = status
        if before is None or before.state is not status.state:
            self._changed.set()
        if status.state is TierState.FAILED:
            # Told again when the executor stops: once is enough.
            if before != status:
                self._failed(status, before)
        elif status.state is not TierState.DRAINING and status.tier not in self._loaded:
            share = 1.0 if status.state is TierState.READY else status.load_progress
            self._progress.tier_progress(status.tier, share, self._names[status.tier])
            if not self._announced:
                self._manager.extend(_LOAD_PATIENCE_S)
        self._tell_manager()
        if status.state is TierState.READY:
            self._in_vain.discard(status.tier)
        if status.state is TierState.READY and status.tier not in self._loaded:
            self._loaded.add(status.tier)
            if len(self._loaded) == len(self._names) and self._where is not None:
                self._progress.ready(*self._where)

    def _failed(self, status: TierStatus, before: TierStatus | None) -> None:
        """Stop where a start failed, or where this process has no tier and no hope of one.

        A tier that is loaded again is waited for, alone or beside others. With all down and
        one that could not be loaded again, a new process is the better hope.
        """
        if status.tier not in self._loaded:
            self._lifecycle.fail(f"the {status.tier.name} tier did not load: {status.message}")
            return
        if before is not None and before.state is TierState.LOADING:
            self._in_vain.add(status.tier)
        if all(known.state is TierState.FAILED for known in self._statuses.values()):
            if self._in_vain:
                self._lifecycle.fail("every tier has failed, and one could not be loaded again")
            elif all(known.retry_s is None for known in self._statuses.values()):
                self._lifecycle.fail(f"every tier has failed: {status.message}")

    async def run(self, health: Health) -> None:
        """Pass every change of state on to the health service, until cancelled."""
        while True:
            await self._changed.wait()
            self._changed.clear()
            self.report(health)
            tactical = self._statuses.get(Tier.TACTICAL)
            serves = tactical is not None and tactical.state is TierState.READY
            if self._answering and serves and not self._announced:
                # After health has said it: who waits for one of the two finds the other true.
                self._announced = True
                self._manager.ready()

    def report(self, health: Health) -> None:
        """Tell load balancers which tiers serve; nothing takes jobs any more once we stop."""
        health.update(
            {tier: status.state for tier, status in self._statuses.items()},
            takes_jobs=self._ledger_accepts and not self._lifecycle.stopping.is_set(),
        )


def status_line(statuses: Iterable[TierStatus]) -> str:
    """The tiers in one line for people: `tactical serves; strategic: 41 % of the weights`."""
    return "; ".join(map(_words, sorted(statuses, key=lambda status: status.tier.rank)))


def _words(status: TierStatus) -> str:
    tier = status.tier.name
    if status.state is TierState.READY:
        return f"{tier} serves"
    if status.state is TierState.LOADING:
        # Rounded down: 100 % is what serves.
        return f"{tier}: {int(status.load_progress * 100)} % of the weights"
    if status.state is TierState.DRAINING:
        return f"{tier} drains"
    return f"{tier} failed: {status.message}"


_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Lifecycle:
    """The daemon's stop: asked for once, then only hurried. Event loop only.

    `stopping` is set once a stop is asked for, `hurried` once it must not wait for jobs any more;
    `failure` is why a part of the daemon is gone, `grace_s` None is the setting's.
    """

    def __init__(self) -> None:
        self.exit_code = 0
        self.grace_s: float | None = None
        self.failure = ""
        self.stopping = asyncio.Event()
        self.hurried = asyncio.Event()

    def install_signals(self) -> None:
        """Listen to the signals that end a daemon on the running loop."""
        loop = asyncio.get_running_loop()
        for number in _SIGNALS:
            loop.add_signal_handler(number, self._on_signal, number)

    def ignore_signals(self) -> None:
        """Ignore them from now on: all is stopped, and a late one must not spoil the exit code.

        The interpreter takes a moment to leave; a closed loop would restore the deadly default.
        """
        loop = asyncio.get_running_loop()
        for number in _SIGNALS:
            loop.remove_signal_handler(number)
            signal.signal(number, signal.SIG_IGN)

    def drain(self, grace_s: float | None = None) -> None:
        """Ask for a stop once running jobs have ended; None is the setting's grace."""
        if not self.stopping.is_set():
            self.grace_s = grace_s
            self.stopping.set()

    def fail(self, why: str) -> None:
        """Ask for a stop because a part of the daemon is gone; the exit code says so."""
        _log.critical("stopping: %s", why)
        self.failure = self.failure or why
        self.exit_code = 1
        self.stopping.set()
        self.hurried.set()

    def _on_signal(self, number: signal.Signals) -> None:
        if not self.stopping.is_set():
            _log.info("%s: draining; send it again to stop at once", number.name)
            self.drain()
        elif not self.hurried.is_set():
            _log.warning("%s again: stopping at once", number.name)
            self.exit_code = 128 + number
            self.hurried.set()


_ROUNDS = 4
"""Times that the manager is told within its own patience."""

_UNWATCHED_S = 10.0
"""Between two looks where no manager waits for one."""


class Pulse:
    """Judges one heartbeat after the other; between two of them the thread is pinged.

    A thread progresses if it has turned its loop since it was last asked to, whether it had work or
    not, and if, while it has work, it ends a step now and then. Either may take `step_timeout_s`:
    a step may be a long one, and nothing is heard of it before it ends.
    """

    def __init__(self, step_timeout_s: float) -> None:
        self._step_timeout_s = step_timeout_s
        self._asked_s: float | None = None
        self._worked_s = 0.0
        self._steps_done = -1

    def progresses(self, beat: Heartbeat, now_s: float) -> bool:
        """Whether the thread progresses, as of `now_s` on the clock of the heartbeats."""
        if self._asked_s is None or beat.last_progress_s >= self._asked_s:
            self._asked_s = now_s
        if not beat.busy or beat.steps_done != self._steps_done:
            self._worked_s, self._steps_done = now_s, beat.steps_done
        return now_s - min(self._asked_s, self._worked_s) <= self._step_timeout_s


async def keep_watch(executor: Executor, manager: ServiceManager, step_timeout_s: float) -> None:
    """Feed the manager's watchdog for as long as the device's thread makes progress."""
    pulse = Pulse(step_timeout_s)
    interval_s = manager.watchdog_s / _ROUNDS if manager.watchdog_s else _UNWATCHED_S
    hangs = False
    while True:
        beat = executor.heartbeat
        if beat is not None:
            hung, hangs = hangs, not pulse.progresses(beat, time.monotonic())
            if not hangs:
                manager.alive()
                if hung:
                    _log.warning("the device's thread makes progress again")
                    manager.status("the device makes progress again")
            elif not hung:
                _log.critical(
                    "the device's thread has made no progress for %.0f s "
                    "(scheduling.step_timeout_s)",
                    step_timeout_s,
                )
                manager.status(f"the device hangs: no progress for {step_timeout_s:.0f} s")
            executor.ping()
        await asyncio.sleep(interval_s)
