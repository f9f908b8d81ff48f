"""Every series in one registry: the recorders by which the daemon says what happened, and the page.

Owns what belongs to none of them alone: what is computed at the scrape, and where it is served.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping

from prometheus_client import (
    CollectorRegistry,
    GCCollector,
    PlatformCollector,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)

from sage_fed.core import Phase
from sage_fed.metrics.doors import DoorMetrics
from sage_fed.metrics.engines import EngineMetrics
from sage_fed.metrics.jobs import Decisions, JobMetrics
from sage_fed.metrics.live import LiveRates
from sage_fed.metrics.loop import LoopMetrics
from sage_fed.metrics.money import MoneyMetrics
from sage_fed.metrics.power import PowerCollector, Sensor, find_sensor
from sage_fed.metrics.scrape import ScrapeCollector, Snapshot
from sage_fed.metrics.series import Factory
from sage_fed.metrics.server import OPEN_PAGE, MetricsServer, PageDoor


class Metrics:
    """Every series, in one registry.

    Args:
        registry: where they go; a fresh one by default. The library's global one is not touched.
        version: of the daemon, for build_info.
        decisions: (requested, chosen, reason) that the router can make, to start at zero.
        per_account_balance: export one balance per account, and with it account names.
    """

    def __init__(
        self,
        registry: CollectorRegistry | None = None,
        *,
        version: str = "",
        decisions: Decisions = (),
        per_account_balance: bool = False,
    ) -> None:
        # A switch of the whole process: the library would double every counter otherwise.
        disable_created_metrics()  # type: ignore[no-untyped-call]  # the library's
        self.registry = registry or CollectorRegistry()
        live = LiveRates()
        self._scrape = ScrapeCollector(live)
        make = Factory(self.registry)
        self.money = MoneyMetrics(make, per_account_balance=per_account_balance)
        self.jobs = JobMetrics(make, self.money, decisions)
        self.engines = EngineMetrics(make, live, self._scrape, version)
        self.doors = DoorMetrics(make)
        self.loop = LoopMetrics(make)
        self.registry.register(self._scrape)
        for collector in (ProcessCollector, PlatformCollector, GCCollector):
            collector(registry=self.registry)

    def watch(self, snapshot: Callable[[], Snapshot]) -> None:
        """Asks `snapshot` at every scrape.

        It is called in the scraping thread and returns values that nobody changes afterwards.
        """
        self._scrape.snapshot = snapshot

    @contextlib.contextmanager
    def watch_power(self, gpu_uuid: str) -> Iterator[Sensor | None]:
        """Shows what a GPU draws, while the context lasts and if a sensor says so."""
        sensor = find_sensor(gpu_uuid)
        if sensor is None:
            yield None
            return
        collector = PowerCollector(sensor)
        self.registry.register(collector)
        try:
            yield sensor
        finally:
            self.registry.unregister(collector)
            collector.close()

    def serve(self, host: str, port: int, door: PageDoor = OPEN_PAGE) -> MetricsServer:
        """Starts the HTTP endpoint; raises `OSError` where it cannot bind."""
        return MetricsServer(self.registry, host, port, door=door)

    def exposition(self) -> bytes:
        """What a scrape returns now, in the text format."""
        return generate_latest(self.registry)

    def cost_ratios(self, source: str, ratios: Mapping[Phase, float]) -> None:
        """Says what a card prices; `source` is "configured" or "card" (the one in force)."""
        self._scrape.ratios = {**self._scrape.ratios, source: dict(ratios)}

    def memory_bandwidth(self, bytes_per_s: float) -> None:
        """Says how fast the device reads memory; what decoding is measured against."""
        self._scrape.memory_bytes_per_s = bytes_per_s
