"""How many calls an account has made in the last minute, long ones counted more than once.

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

CALL_BYTES = 16 * 1024
"""A message counts as one call for each 16 KiB of it that it has begun."""

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
        """Count one call, before its message is read.

        Raises:
            RateLimited: it is one too many; it says when the next one is let in.
        """
        item = self._item(account)
        if item is not None and not self._limiter.hit(item, account):
            raise self._limited(item, account)

    def count_message(self, account: str, num_bytes: int) -> None:
        """Count the message of a call that was counted, for what it has beyond one call's bytes.

        One that is larger than a whole minute's calls takes a whole minute.

        Raises:
            RateLimited: it is too much; it says when the next one may be let in.
        """
        more = max(num_bytes - 1, 0) // CALL_BYTES
        item = self._item(account) if more else None
        if item is None:
            return
        cost = min(more, item.amount - 1)
        if cost and not self._limiter.hit(item, account, cost=cost):
            raise self._limited(item, account, cost)

    def _item(self, account: str) -> RateLimitItem | None:
        try:
            return self._items[account]
        except KeyError:
            allowed = self._per_minute(account)
            item = self._items[account] = self._item_of(allowed) if allowed else None
            return item

    def _limited(self, item: RateLimitItem, account: str, cost: int = 1) -> RateLimited:
        next_s = self._limiter.get_window_stats(item, account).reset_time - time.time()
        # The next one that falls out of the minute makes room for one.
        wait_s = next_s + (cost - 1) * item.get_expiry() / item.amount
        return RateLimited(
            f"account {account} may make {counted(item.amount, 'call')} a minute, of "
            f"{CALL_BYTES // 1024} KiB each",
            account=account,
            limit="requests_per_minute",
            allowed=item.amount,
            retry_after_s=max(wait_s, _SOON_S),
        )
