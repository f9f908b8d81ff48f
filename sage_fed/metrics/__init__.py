"""Everything that Prometheus sees, and the only place that knows Prometheus.

Owns names, labels, buckets and help texts (`series`), what is computed when it is scraped
(`scrape`), and the methods by which the rest of the daemon says what happened (`jobs`, `money`,
`engines`, `doors`), all in one registry (`metrics`).
Label values are bounded and never hold prompts, tokens or paths; account names appear only
where the operator asks for them.
Recording cannot fail; a server that cannot bind raises `OSError`.
"""

from sage_fed.metrics.collectors import Snapshot
from sage_fed.metrics.observers import DoorMetrics, EngineMetrics, JobMetrics, Metrics, MoneyMetrics
from sage_fed.metrics.page import MetricsServer, PageDoor

__all__ = [
    "DoorMetrics",
    "EngineMetrics",
    "JobMetrics",
    "Metrics",
    "MetricsServer",
    "MoneyMetrics",
    "PageDoor",
    "Snapshot",
]
