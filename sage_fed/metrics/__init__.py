"""Everything that Prometheus sees, and the only place that knows Prometheus.

Owns names, labels, buckets and help texts, and the methods by which the rest of the daemon reports
what happened. Label values are bounded and never hold prompts, tokens or paths; account names
appear only where the operator asks for them.
Recording cannot fail; a server that cannot bind raises `OSError`.
"""

from sage_fed.metrics.collectors import Snapshot
from sage_fed.metrics.observers import Metrics
from sage_fed.metrics.page import MetricsServer, PageAccess

__all__ = ["Metrics", "MetricsServer", "PageAccess", "Snapshot"]
