"""How a start goes, for whoever reads the log: what nobody watches needs no drawing.

Owns: a line for each quarter, and the line that says where to connect.
Does not know: rich, which takes a tenth of a second to import.
Fails: never.
"""

from __future__ import annotations

import logging

from sage_fed.core import Tier

_log = logging.getLogger(__name__)


class LogProgress:
    """A log line for each quarter that a tier has loaded."""

    def __init__(self) -> None:
        self._quarters: dict[Tier, int] = {}

    def tier_progress(self, tier: Tier, share: float, text: str) -> None:
        """Say where a new quarter begins."""
        quarter = int(share * 4)
        if quarter != self._quarters.get(tier):
            self._quarters[tier] = quarter
            _log.info("%s: %.0f%% %s", tier.name, share * 100, text)

    def ready(self, listen: str, metrics_url: str) -> None:
        """Say where to connect."""
        _log.info("%s", ready_line(listen, metrics_url))

    def close(self) -> None:
        """Nothing is open."""


def ready_line(listen: str, metrics_url: str) -> str:
    """The one line that says where to connect."""
    return f"ready on {listen}, metrics on {metrics_url}"
