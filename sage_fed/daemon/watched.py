"""How the daemon is watched: its metrics, the page that shows them, power and traces.

Owns what of these follows from the settings. Does not know what happens later: the parts say so.
Fails with `Occupied`, and with `ConfigError` where traces are wanted and OpenTelemetry is missing.
"""

from __future__ import annotations

from contextlib import AsyncExitStack
from typing import TYPE_CHECKING

import sage_fed
from sage_fed.cards import RateCard
from sage_fed.core import TIER_ROLES, Phase
from sage_fed.daemon.tiers import display_name
from sage_fed.engine import DeviceDescription
from sage_fed.errors import ConfigError, Occupied
from sage_fed.metrics import Metrics, MetricsServer, PageDoor
from sage_fed.routing import possible_decisions
from sage_fed.settings import Address, Settings

if TYPE_CHECKING:
    from sage_fed.tracing import Tracing


def build_metrics(settings: Settings) -> Metrics:
    """Return every series, with what is known before anything runs."""
    metrics = Metrics(
        version=sage_fed.__version__,
        decisions=possible_decisions(),
        per_account_balance=settings.metrics.per_account_balance,
    )
    published = RateCard.load()
    metrics.cost_ratios("configured", {phase: published.cost_ratio(phase) for phase in Phase})
    return metrics


def start_watching(
    settings: Settings, device: DeviceDescription, metrics: Metrics, stack: AsyncExitStack
) -> Tracing | None:
    """Show the GPU's power, and trace if an endpoint is set, until the stack unwinds.

    Entered first, so that what everything else says in its last moments is still exported.
    """
    if device.gpu_uuid:
        stack.enter_context(metrics.watch_power(device.gpu_uuid))
    if settings.tracing.otlp_endpoint is None:
        return None
    try:
        # Only now: importing OpenTelemetry takes a tenth of a second.
        from sage_fed.tracing import start_tracing  # noqa: PLC0415
    except ModuleNotFoundError as error:
        raise ConfigError(
            "tracing.otlp_endpoint: OpenTelemetry is not installed; "
            "install sage-fed with its extra: sage-fed[otel]"
        ) from error
    return stack.enter_context(
        start_tracing(
            settings.tracing.otlp_endpoint,
            sample_ratio=settings.tracing.sample_ratio,
            version=sage_fed.__version__,
            models={tier: display_name(settings.tier(tier)) for tier in TIER_ROLES},
        )
    )


def expose(metrics: Metrics, listen: Address, door: PageDoor) -> MetricsServer:
    """Serve the page until it is closed; `Occupied` where the address cannot be had."""
    try:
        return metrics.serve(listen.host, listen.port, door)
    except OSError as error:
        raise Occupied(f"metrics_listen: cannot bind {listen}: {error.strerror}") from None


def page_url(bound: Address, door: PageDoor) -> str:
    """Where a person or a scraper finds the page."""
    return f"{'http' if door.tls is None else 'https'}://{bound}/metrics"
