"""How many calls an account has made in the last minute.

The counting is the `limits` package's (kept since 2013, the base of Flask-Limiter and SlowAPI):
a sliding window of two counters, so an account costs the same at any limit.
Does not know methods. Fails with `RateLimited`, before anything is parsed or held.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from sage_fed.core import counted
from sage_fed.errors import RateLimited

if TYPE_CHECKING:
    from limits import RateLimitItem

_SOON_S = 0.001
"""The least that a refused caller is told to wait."""


class Throttle:
    """Counts calls; `per_minute` is how many an account may make, 0 is no limit."""

    def __init__(self, per_minute: Callable[[str], int]) -> None:
        # An eighth of a second to import, which a start without limits does not pay.
        from limits import RateLimitItemPerMinute  # noqa: PLC0415
        from limits.storage import MemoryStorage  # noqa: PLC0415
        from limits.strategies import SlidingWindowCounterRateLimiter  # noqa: PLC0415

        self._per_minute = per_minute
        self._item_of = RateLimitItemPerMinute
        self._items: dict[str, RateLimitItem | None] = {}
        self._limiter = SlidingWindowCounterRateLimiter(MemoryStorage())

    def count(self, account: str) -> None:
        """Count one call.

        Raises:
            RateLimited: it is one too many; it says when the next one is let in.
        """
        try:
            item = self._items[account]
        except KeyError:
            allowed = self._per_minute(account)
            item = self._items[account] = self._item_of(allowed) if allowed else None
        if item is None or self._limiter.hit(item, account):
            return
        wait_s = self._limiter.get_window_stats(item, account).reset_time - time.time()
        raise RateLimited(
            f"account {account} may make {counted(item.amount, 'call')} a minute",
            account=account,
            limit="requests_per_minute",
            allowed=item.amount,
            retry_after_s=max(wait_s, _SOON_S),
        )
