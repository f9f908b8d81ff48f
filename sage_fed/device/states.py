"""What state each tier is in, as clients see it, and when one that failed is loaded again.

Owns the tiers' states and bounds, as the threads say them, and what lies over them: a drain, a
device that does not answer, the end. Event loop only; starts nothing itself. Fails with
TierUnavailable where it is asked for a tier that does not serve.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import replace

from sage_fed.core import Tier, TierState, TierStatus
from sage_fed.device.handover import Opened
from sage_fed.device.recovery import BackOff
from sage_fed.errors import TierUnavailable

logger = logging.getLogger(__name__)

_RETRY_LOADING_S = 5.0


class TierStates:
    """The tiers' states.

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
