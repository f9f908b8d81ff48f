"""Traces: a span for a call, one for the job below it, one for each of the job's stages and phases.

Owns spans and their names, and is the only module that imports OpenTelemetry, an optional extra:
others import this one for its types only, and the daemon when an endpoint is set. A job's spans
are written after its end, from the times that it has anyway, so that a token costs nothing. Spans
hold no prompts, no answers, no tokens and no accounts. A collector that does not answer costs the
spans, which a log line says, and never a request.

Names and attributes follow the semantic conventions for RPC and for generative AI, both of 2025;
those of GenAI are still in development there. What is ours alone is under `sage_fed.`.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping
from typing import Final

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
from opentelemetry.trace import (
    NonRecordingSpan,
    Span,
    SpanContext,
    SpanKind,
    Status,
    StatusCode,
    TraceFlags,
)
from opentelemetry.util.types import AttributeValue

from sage_fed.core import (
    UATP_PER_ATP,
    Finished,
    JobSpec,
    Route,
    Started,
    Tier,
    Timing,
    TraceContext,
)
from sage_fed.errors import SageFedError

_EXPORT_TIMEOUT_S = 5.0

_SERVER_FAULTS: Final = frozenset(
    {"UNKNOWN", "DEADLINE_EXCEEDED", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS"}
)
"""What the conventions call an error of a server; the others are answers."""

Attributes = dict[str, AttributeValue]


@contextlib.contextmanager
def start_tracing(
    endpoint: str, *, sample_ratio: float, version: str, models: Mapping[Tier, str]
) -> Iterator[Tracing]:
    """Export to an OTLP/HTTP collector until the context ends, which waits for what is left.

    Args:
        endpoint: the collector's URL, with its path.
        sample_ratio: of requests whose caller has not decided.
        version: of the daemon.
        models: what each tier's model is called.
    """
    exporter = OTLPSpanExporter(endpoint=endpoint, timeout=_EXPORT_TIMEOUT_S)
    tracing = Tracing(
        BatchSpanProcessor(exporter), sample_ratio=sample_ratio, version=version, models=models
    )
    try:
        yield tracing
    finally:
        tracing.close()


class Call:
    """The span of one RPC; what is traced below it belongs to `context`."""

    def __init__(self, span: Span) -> None:
        self._span = span
        context = span.get_span_context()
        self.context = TraceContext(
            trace.format_trace_id(context.trace_id),
            trace.format_span_id(context.span_id),
            sampled=context.trace_flags.sampled,
        )

    def ended(self, status: str) -> None:
        """Record how it ended, by the name of the gRPC status."""
        self._span.set_attribute("rpc.response.status_code", status)
        if status in _SERVER_FAULTS:
            self._span.set_attribute("error.type", status)
            self._span.set_status(Status(StatusCode.ERROR))


class Tracing:
    """Tracer of calls and jobs, touching nothing global; called on the event loop only."""

    def __init__(
        self,
        processor: SpanProcessor,
        *,
        sample_ratio: float,
        version: str,
        models: Mapping[Tier, str],
    ) -> None:
        self._models = models
        self._provider = TracerProvider(
            sampler=ParentBased(TraceIdRatioBased(sample_ratio)),
            resource=Resource.create({"service.name": "sage-fed", "service.version": version}),
            shutdown_on_exit=False,
        )
        self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer("sage_fed", version)

    @contextlib.contextmanager
    def call(self, method: str, caller: TraceContext | None) -> Iterator[Call]:
        """Trace one RPC; `method` is its full name, `caller` what the request's header says."""
        span = self._tracer.start_span(
            method,
            _below(caller),
            SpanKind.SERVER,
            {"rpc.system.name": "grpc", "rpc.method": method},
        )
        try:
            yield Call(span)
        finally:
            span.end()

    def job_ended(
        self, spec: JobSpec, started: Started | None, ending: Finished | SageFedError
    ) -> None:
        """Trace a job that ends now, and its phases; `started` is None for a refused one."""
        now_ns = time.time_ns()
        timing = ending.timing if isinstance(ending, Finished) else None
        job = self._tracer.start_span(
            self._name(spec, started),
            _below(spec.trace),
            SpanKind.INTERNAL,
            self._request(spec, started),
            start_time=now_ns - _ns(timing.total_s) if timing else now_ns,
        )
        if not job.is_recording():
            return
        if isinstance(ending, Finished):
            job.set_attributes(_answer(ending))
            self._trace_phases(job, ending.timing, now_ns)
            if started is not None:
                self._trace_stages(job, started.route, ending, now_ns)
        else:
            job.set_attribute("error.type", ending.reason.lower())
            job.set_status(Status(StatusCode.ERROR, ending.reason))
        job.end(now_ns)

    def close(self) -> None:
        """Export what is left, for a bounded time."""
        self._provider.shutdown()

    def _name(self, spec: JobSpec, started: Started | None) -> str:
        """Return the conventions' name of the span: the operation and the model."""
        tier = started.route.tier if started else spec.requested
        return f"{_operation(spec)} {self._models[tier] if tier else 'auto'}"

    def _request(self, spec: JobSpec, started: Started | None) -> Attributes:
        asked = spec.sampling
        attributes: Attributes = {
            "gen_ai.operation.name": _operation(spec),
            "gen_ai.provider.name": "sage_fed",
            "gen_ai.request.model": self._models[spec.requested] if spec.requested else "auto",
            "sage_fed.tier.requested": spec.requested.name if spec.requested else "auto",
        }
        for name, value in (
            ("temperature", asked.temperature),
            ("top_p", asked.top_p),
            ("top_k", asked.top_k),
        ):
            if value is not None:
                attributes[f"gen_ai.request.{name}"] = value
        if started is None:
            return attributes
        tier = started.route.tier
        return attributes | {
            "gen_ai.request.max_tokens": started.max_new_tokens,
            "gen_ai.response.id": started.job_id,
            "gen_ai.response.model": self._models[tier],
            "sage_fed.tier": tier.name,
            "sage_fed.mode": started.route.mode.value,
            "sage_fed.route.reason": str(started.route.reason),
            "sage_fed.held_atp": started.held_uatp / UATP_PER_ATP,
        }

    def _trace_phases(self, job: Span, timing: Timing, ended_ns: int) -> None:
        """One span a phase that the job has reached, laid out from its arrival."""
        below = trace.set_span_in_context(job)
        arrived_ns = ended_ns - _ns(timing.total_s)
        first_ns = arrived_ns + _ns(timing.time_to_first_token_s)
        if not timing.time_to_first_token_s:
            return
        started_ns = first_ns - _ns(timing.prefill_s)
        for name, start_ns, end_ns in (
            ("queue", started_ns - _ns(timing.queue_s), started_ns),
            ("prefill", started_ns, first_ns),
            ("decode", first_ns, first_ns + _ns(timing.decode_s)),
        ):
            self._tracer.start_span(name, below, start_time=start_ns).end(end_ns)

    def _trace_stages(self, job: Span, route: Route, finished: Finished, ended_ns: int) -> None:
        """One span a sequence, on its tier; that of a cascade's first answer has the decision."""
        below = trace.set_span_in_context(job)
        arrived_ns = ended_ns - _ns(finished.timing.total_s)
        for number, stage in enumerate(finished.timing.stages):
            attributes: Attributes = {
                "gen_ai.response.model": self._models[stage.tier],
                "sage_fed.tier": stage.tier.name,
                "sage_fed.mode": route.mode.value,
                "sage_fed.device_s": stage.device_s,
            }
            if stage.verified_tokens or stage.drafter is not None:
                attributes |= {
                    "sage_fed.drafted_tokens": stage.drafted_tokens,
                    "sage_fed.verified_tokens": stage.verified_tokens,
                    "sage_fed.accepted_tokens": stage.accepted_tokens,
                    "sage_fed.draft_s": stage.draft_s,
                }
            if stage.drafter is not None:
                attributes["sage_fed.drafter"] = stage.drafter.name
            if number == 0 and finished.cascade is not None:
                attributes["sage_fed.cascade.decision"] = finished.cascade.value
            if number == 0 and finished.error_probability is not None:
                attributes["sage_fed.error_probability"] = finished.error_probability
            start_ns = arrived_ns + _ns(stage.begin_s)
            span = self._tracer.start_span(
                f"stage {stage.tier.name}", below, attributes=attributes, start_time=start_ns
            )
            span.end(start_ns + _ns(stage.queue_s + stage.prefill_s + stage.decode_s))


def _answer(finished: Finished) -> Attributes:
    usage, timing = finished.usage, finished.timing
    return {
        "gen_ai.response.finish_reasons": [finished.stop_reason.value],
        "gen_ai.usage.input_tokens": usage.prompt_tokens,
        "gen_ai.usage.cache_read.input_tokens": usage.cached_tokens,
        "gen_ai.usage.output_tokens": usage.output_tokens,
        "gen_ai.response.time_to_first_chunk": timing.time_to_first_token_s,
        "sage_fed.device_s": timing.device_s,
        "sage_fed.charged_atp": finished.price.charged_uatp / UATP_PER_ATP,
        "sage_fed.rate_card": finished.price.rate_card,
    }


def _operation(spec: JobSpec) -> str:
    return "chat" if spec.prompt.messages else "text_completion"


def _below(parent: TraceContext | None) -> Context:
    """Return where a span of this parent belongs; without one it begins a trace."""
    if parent is None:
        return Context()
    flags = TraceFlags(TraceFlags.SAMPLED if parent.sampled else TraceFlags.DEFAULT)
    remote = SpanContext(
        int(parent.trace_id, 16), int(parent.span_id, 16), is_remote=True, trace_flags=flags
    )
    return trace.set_span_in_context(NonRecordingSpan(remote), Context())


def _ns(seconds: float) -> int:
    return round(seconds * 1e9)
