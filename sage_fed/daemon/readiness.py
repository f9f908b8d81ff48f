"""What the tiers' states mean for health checks, for the start's progress and for exiting.

Owns the last known state of each tier. Hears of changes from the executor, on the event loop,
and tells the health service from a task of its own, because that one has to be awaited.
The service manager hears that the daemon is ready when the health service says so under the name
of the whole: when the tactical tier serves.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterable
from typing import Protocol

from sage_fed.core import TIER_ROLES, Tier, TierState, TierStatus
from sage_fed.daemon.lifecycle import Lifecycle
from sage_fed.daemon.tiers import display_name
from sage_fed.service.grpc_server import Health
from sage_fed.settings import Address, Settings, UnixSocket
from sage_fed.steps import StepReport
from sage_fed.systemd import ServiceManager

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
        self._names = {tier: display_name(settings.tier(tier)) for tier in TIER_ROLES}
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
        self._draining = False
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
            if len(self._loaded) == len(TIER_ROLES) and self._where is not None:
                self._progress.ready(*self._where)

    def _failed(self, status: TierStatus, before: TierStatus | None) -> None:
        """Stop where a start failed, or where this process has no tier and no hope of one.

        A tier that is loaded again is waited for, alone or beside the other. With both down and
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
            health.update(self._states(), takes_jobs=self._ledger_accepts and not self._draining)
            tactical = self._statuses.get(Tier.TACTICAL)
            serves = tactical is not None and tactical.state is TierState.READY
            if self._answering and serves and not self._announced:
                # After health has said it: who waits for one of the two finds the other true.
                self._announced = True
                self._manager.ready()

    async def drain(self, health: Health) -> None:
        """Tell load balancers to send nothing more."""
        self._draining = True
        health.update(self._states(), takes_jobs=False)

    def _states(self) -> dict[Tier, TierState]:
        return {tier: status.state for tier, status in self._statuses.items()}


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
