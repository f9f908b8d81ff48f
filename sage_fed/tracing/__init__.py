"""Where a request's time went, for whoever collects traces; off unless an endpoint is set.

Owns spans and their names, and the only knowledge of OpenTelemetry, which is an optional extra:
a span for the call (RPC conventions), one for the job below it (GenAI conventions), and one for
each of its phases. A job's spans are written after its end, from the times that it has anyway, so
that a token costs nothing. Spans hold no prompts, no answers, no tokens and no accounts.
`Tracing` is what others see of it; this module imports nothing of OpenTelemetry.
Fails with `ConfigError` where the extra is not installed. A collector that does not answer costs
the spans, which a log line says, and never a request.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Protocol

from sage_fed.core import Finished, JobSpec, Started, Tier, TraceContext
from sage_fed.errors import ConfigError, SageFedError

_MODULES = ("opentelemetry.sdk.trace", "opentelemetry.exporter.otlp.proto.http")


class Call(Protocol):
    """One RPC under way."""

    @property
    def context(self) -> TraceContext:
        """What is traced below it belongs here."""

    def ended(self, status: str) -> None:
        """Says how it ended, by the name of the gRPC status."""


class Tracing(Protocol):
    """What the service and the broker say of calls and jobs. Event loop only."""

    def call(self, method: str, caller: TraceContext | None) -> AbstractContextManager[Call]:
        """Traces one RPC; `method` is its full name, `caller` what the request's header says."""

    def job_ended(
        self, spec: JobSpec, started: Started | None, ending: Finished | SageFedError
    ) -> None:
        """Traces a job that ends now; `started` is None for one that was refused."""


def start_tracing(
    endpoint: str, *, sample_ratio: float, version: str, models: Mapping[Tier, str]
) -> AbstractContextManager[Tracing]:
    """Export to an OTLP/HTTP collector until the context ends, which waits for what is left.

    Args:
        endpoint: the collector's URL, with its path.
        sample_ratio: of requests whose caller has not decided.
        version: of the daemon.
        models: what each tier's model is called.

    Raises:
        ConfigError: OpenTelemetry is not installed.
    """
    if not all(_installed(module) for module in _MODULES):
        raise ConfigError(
            "tracing.otlp_endpoint: OpenTelemetry is not installed; "
            "install sage-fed with its extra: sage-fed[otel]"
        )
    # Only now: importing it takes a tenth of a second.
    from sage_fed.tracing.spans import export_to  # noqa: PLC0415

    return export_to(endpoint, sample_ratio=sample_ratio, version=version, models=models)


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


__all__ = ["Call", "Tracing", "start_tracing"]
