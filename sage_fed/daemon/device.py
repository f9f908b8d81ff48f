"""Which device serves, where `device = "auto"` leaves that to what is there.

Owns the choice and its telling: the log, the metrics and `sage-fed status` say it where the
CPU serves for want of a GPU. A device that was named is no choice: the engine takes it or fails.
"""

from __future__ import annotations

import logging

from sage_fed.engine import device_at_hand
from sage_fed.metrics import EngineMetrics
from sage_fed.settings import Settings

_log = logging.getLogger(__name__)


def on_device_at_hand(settings: Settings, metrics: EngineMetrics) -> tuple[Settings, str]:
    """Return the settings with the device that serves, and why it is not the one wanted."""
    why = ""
    if settings.device == "auto":
        device, why = device_at_hand()
        settings = settings.model_copy(update={"device": device})
    metrics.device_fallback(fallen_back=bool(why))
    if why:
        _log.warning(
            "%s: serving from the CPU, many times slower; device = 'cpu' if that is what you want",
            why,
        )
    return settings, why
