"""Traces: a caller's header, the spans of a call and its job, and a collector that gets them."""

from __future__ import annotations

import http.server
import queue
import sys
import threading
from collections.abc import Iterator
from contextlib import AsyncExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
from daemon_process import DaemonProcess
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from sage_fed.core import (
    CascadeOutcome,
    Finished,
    JobSpec,
    Message,
    Mode,
    Price,
    Prompt,
    Route,
    SamplingRequest,
    StageTiming,
    Started,
    StopReason,
    Tier,
    Timing,
    TraceContext,
    Usage,
    parse_traceparent,
)
from sage_fed.daemon.build import start_watching
from sage_fed.engine import DeviceDescription
from sage_fed.errors import ConfigError, NoSuchAccount, QueueFull
from sage_fed.metrics import Metrics
from sage_fed.settings import load_settings
from sage_fed.tracing import Tracing
from sage_fed.v1 import inference_pb2, inference_pb2_grpc, types_pb2

TRACE_ID, SPAN_ID = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
CALLER = TraceContext(TRACE_ID, SPAN_ID, sampled=True)
MODELS = {Tier.TACTICAL: "small", Tier.STRATEGIC: "large"}
STARTED = Started("job-1", Route(Tier.STRATEGIC, "auto_complex", None), 5_000_000, 20, 7, 64)
FINISHED = Finished(
    StopReason.LENGTH,
    Usage(prompt_tokens=20, cached_tokens=4, output_tokens=64),
    Timing(
        queue_s=0.1, prefill_s=0.2, decode_s=0.5, time_to_first_token_s=0.4, total_s=1.0,
        device_s=0.3,
    ),
    Price(charged_uatp=4_000_000, held_uatp=5_000_000, rate_card="card-1"),
    balance_uatp=0,
)  # fmt: skip


@pytest.mark.parametrize(
    ("header", "sampled"),
    [
        (f"00-{TRACE_ID}-{SPAN_ID}-01", True),
        (f"00-{TRACE_ID}-{SPAN_ID}-00", False),
        (f"00-{TRACE_ID}-{SPAN_ID}-ff", True),
        # A later version may say more.
        (f"01-{TRACE_ID}-{SPAN_ID}-01-more", True),
    ],
)
def test_a_well_formed_header_is_a_trace(header: str, *, sampled: bool) -> None:
    """Its ids and the caller's decision are read from it."""
    assert TraceContext(TRACE_ID, SPAN_ID, sampled=sampled) == parse_traceparent(header)


@pytest.mark.parametrize(
    "header",
    [
        "",
        f"00-{TRACE_ID}-{SPAN_ID}",
        f"00-{TRACE_ID.upper()}-{SPAN_ID}-01",
        f"00-{'0' * 32}-{SPAN_ID}-01",
        f"00-{TRACE_ID}-{'0' * 16}-01",
        f"ff-{TRACE_ID}-{SPAN_ID}-01",
        f"00-{TRACE_ID}-{SPAN_ID}-01-more",
        f"00-{TRACE_ID}-{SPAN_ID}-01\n",
    ],
)
def test_a_malformed_header_is_no_trace(header: str) -> None:
    """What the standard forbids begins no trace, and fails no request."""
    assert parse_traceparent(header) is None


@given(st.text(max_size=80))
def test_no_header_is_an_error(header: str) -> None:
    """Whatever a client sends, it is a trace or none."""
    parse_traceparent(header)


# Tracing, collected in memory


@pytest.fixture
def collected() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
def spans(collected: InMemorySpanExporter) -> Tracing:
    return Tracing(SimpleSpanProcessor(collected), sample_ratio=1.0, version="1", models=MODELS)


def job(trace: TraceContext | None = CALLER, **changes: Any) -> JobSpec:  # noqa: ANN401
    values = {
        "account": "secret-account",
        "prompt": Prompt(messages=(Message("user", "secret prompt"),)),
        "sampling": SamplingRequest(temperature=0.5),
    }
    return JobSpec(**{**values, **changes}, trace=trace)


def attributes(span: ReadableSpan) -> dict[str, Any]:
    return dict(span.attributes or {})


def test_a_job_is_a_span_of_the_genai_conventions(
    spans: Tracing, collected: InMemorySpanExporter
) -> None:
    """Operation, models, tokens, the reason it stopped and our price, below the caller's span."""
    spans.job_ended(job(), STARTED, FINISHED)
    *_, span = collected.get_finished_spans()

    assert "chat auto" != span.name
    assert ("chat large", SpanKind.INTERNAL) == (span.name, span.kind)
    assert span.parent is not None
    assert (int(TRACE_ID, 16), int(SPAN_ID, 16)) == (span.parent.trace_id, span.parent.span_id)
    assert {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "sage_fed",
        "gen_ai.request.model": "auto",
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.max_tokens": 64,
        "gen_ai.response.id": "job-1",
        "gen_ai.response.model": "large",
        "gen_ai.response.finish_reasons": ("length",),
        "gen_ai.response.time_to_first_chunk": 0.4,
        "gen_ai.usage.input_tokens": 20,
        "gen_ai.usage.cache_read.input_tokens": 4,
        "gen_ai.usage.output_tokens": 64,
        "sage_fed.tier": "strategic",
        "sage_fed.mode": "single",
        "sage_fed.tier.requested": "auto",
        "sage_fed.route.reason": "auto_complex",
        "sage_fed.held_atp": 5.0,
        "sage_fed.charged_atp": 4.0,
        "sage_fed.device_s": 0.3,
        "sage_fed.rate_card": "card-1",
    } == attributes(span)


def test_a_jobs_phases_lie_within_it(spans: Tracing, collected: InMemorySpanExporter) -> None:
    """Queue, prefill and decode follow each other, and end no later than the job."""
    spans.job_ended(job(), STARTED, FINISHED)
    by_name = {span.name: span for span in collected.get_finished_spans()}
    whole = by_name.pop("chat large")
    lengths_s = {}
    for name, span in by_name.items():
        assert span.start_time is not None
        assert span.end_time is not None
        lengths_s[name] = (span.end_time - span.start_time) / 1e9
        assert span.parent == whole.context

    assert {"queue": 0.1, "prefill": 0.2, "decode": 0.5} == pytest.approx(lengths_s)
    assert by_name["queue"].end_time == by_name["prefill"].start_time
    assert by_name["prefill"].end_time == by_name["decode"].start_time
    assert whole.start_time is not None
    assert whole.end_time is not None
    assert whole.start_time <= by_name["queue"].start_time  # type: ignore[operator]
    assert by_name["decode"].end_time <= whole.end_time  # type: ignore[operator]


def test_a_stage_is_a_span_with_what_it_drafted_and_decided(
    spans: Tracing, collected: InMemorySpanExporter
) -> None:
    """Each on its tier, in order and within the job; the first one's answer was decided on."""
    started = replace(STARTED, route=replace(STARTED.route, mode=Mode.CASCADE))
    first = StageTiming(Tier.TACTICAL, 0.1, 0.1, 0.1, device_s=0.2)
    second = StageTiming(
        Tier.STRATEGIC, 0.1, 0.2, 0.3, device_s=0.4, drafter=Tier.TACTICAL, draft_s=0.05,
        begin_s=0.35, drafted_tokens=7, verified_tokens=30, accepted_tokens=21,
    )  # fmt: skip
    spans.job_ended(
        job(),
        started,
        replace(
            FINISHED,
            timing=replace(FINISHED.timing, stages=(first, second)),
            cascade=CascadeOutcome.ESCALATED,
            error_probability=0.4,
        ),
    )
    by_name = {span.name: span for span in collected.get_finished_spans()}
    tactical, strategic = by_name["stage tactical"], by_name["stage strategic"]
    whole = by_name["chat large"]

    for span, seconds in ((tactical, 0.3), (strategic, 0.6)):
        assert whole.context == span.parent
        assert span.start_time is not None
        assert span.end_time is not None
        assert pytest.approx(seconds) == (span.end_time - span.start_time) / 1e9
    assert tactical.end_time <= strategic.start_time  # type: ignore[operator]
    assert strategic.end_time <= whole.end_time  # type: ignore[operator]
    assert {
        "gen_ai.response.model": "small",
        "sage_fed.tier": "tactical",
        "sage_fed.mode": "cascade",
        "sage_fed.device_s": 0.2,
        "sage_fed.cascade.decision": "escalated",
        "sage_fed.error_probability": 0.4,
    } == attributes(tactical)
    assert {
        "gen_ai.response.model": "large",
        "sage_fed.tier": "strategic",
        "sage_fed.mode": "cascade",
        "sage_fed.device_s": 0.4,
        "sage_fed.drafter": "tactical",
        "sage_fed.draft_s": 0.05,
        "sage_fed.drafted_tokens": 7,
        "sage_fed.verified_tokens": 30,
        "sage_fed.accepted_tokens": 21,
    } == attributes(strategic)


def test_a_refused_job_is_an_error_with_its_reason(
    spans: Tracing, collected: InMemorySpanExporter
) -> None:
    """It has a type of error and no answer."""
    spans.job_ended(job(requested=Tier.TACTICAL), None, QueueFull("128 wait", 1.0))
    (span,) = collected.get_finished_spans()

    assert "chat small" == span.name
    assert "queue_full" == attributes(span)["error.type"]
    assert StatusCode.ERROR == span.status.status_code
    assert "gen_ai.response.model" not in attributes(span)


def test_a_span_has_no_prompt_and_no_account(
    spans: Tracing, collected: InMemorySpanExporter
) -> None:
    """A collector is somebody else's machine: what was asked and by whom stays here."""
    spans.job_ended(job(), STARTED, FINISHED)
    spans.job_ended(job(), None, NoSuchAccount("secret-account has no budget"))

    told = "".join(span.to_json() for span in collected.get_finished_spans())
    assert "secret" not in told


def test_the_callers_decision_is_honoured(spans: Tracing, collected: InMemorySpanExporter) -> None:
    """A caller that does not sample gets no spans, whatever our own share is."""
    spans.job_ended(job(TraceContext(TRACE_ID, SPAN_ID, sampled=False)), STARTED, FINISHED)
    with spans.call("x/Y", TraceContext(TRACE_ID, SPAN_ID, sampled=False)) as call:
        call.ended("OK")
    assert () == collected.get_finished_spans()


def test_our_share_is_for_callers_without_a_trace(collected: InMemorySpanExporter) -> None:
    """A share of 0 traces nobody but those who ask for it."""
    spans = Tracing(SimpleSpanProcessor(collected), sample_ratio=0.0, version="1", models=MODELS)
    spans.job_ended(job(None), STARTED, FINISHED)
    assert () == collected.get_finished_spans()

    spans.job_ended(job(), STARTED, FINISHED)
    assert collected.get_finished_spans()


@pytest.mark.parametrize(
    ("status", "fault"),
    [
        ("OK", False),
        ("RESOURCE_EXHAUSTED", False),
        ("INVALID_ARGUMENT", False),
        ("UNAVAILABLE", True),
        ("INTERNAL", True),
    ],
)
def test_a_call_is_a_span_of_the_rpc_conventions(
    spans: Tracing, collected: InMemorySpanExporter, status: str, *, fault: bool
) -> None:
    """Its status is on it; only what the conventions call the server's fault is an error."""
    with spans.call("sage_fed.v1.InferenceService/Generate", CALLER) as call:
        call.ended(status)
    (span,) = collected.get_finished_spans()

    assert ("sage_fed.v1.InferenceService/Generate", SpanKind.SERVER) == (span.name, span.kind)
    assert ("grpc", status) == (
        attributes(span)["rpc.system.name"],
        attributes(span)["rpc.response.status_code"],
    )
    assert fault is (span.status.status_code is StatusCode.ERROR)


async def test_without_the_extra_the_setting_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It names the setting and what to install, and traces nothing silently."""
    monkeypatch.setitem(sys.modules, "opentelemetry", None)
    monkeypatch.delitem(sys.modules, "sage_fed.tracing")
    flags = {
        "profile": "demo",
        "state_dir": str(tmp_path),
        "tracing.otlp_endpoint": "http://127.0.0.1:1/",
    }
    settings = load_settings(flags, {}, None).settings

    with pytest.raises(ConfigError, match=r"tracing\.otlp_endpoint: .*sage-fed\[otel\]"):
        async with AsyncExitStack() as stack:
            start_watching(settings, DeviceDescription("cpu", 1), Metrics(), stack)


# A real daemon and a real collector's door


@contextmanager
def collector() -> Iterator[tuple[str, queue.Queue[Span]]]:
    """An OTLP/HTTP endpoint: its URL, and the spans that arrive."""
    arrived: queue.Queue[Span] = queue.Queue()

    class Door(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            """Take an export."""
            body = self.rfile.read(int(self.headers["Content-Length"]))
            for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                for scope in resource.scope_spans:
                    for span in scope.spans:
                        arrived.put(span)
            answer = ExportTraceServiceResponse().SerializeToString()
            self.send_response(200)
            self.send_header("Content-Type", "application/x-protobuf")
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Door) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}/v1/traces", arrived
        finally:
            server.shutdown()
            thread.join(10)


def ask(address: str, sampled: str = "01") -> None:
    """One job that is served and one that is refused, in the caller's trace."""
    trace = (("traceparent", f"00-{TRACE_ID}-{SPAN_ID}-{sampled}"),)
    with grpc.insecure_channel(address) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        job = types_pb2.JobSpec(text="What is 1 plus 2?", tier=types_pb2.TIER_TACTICAL)
        stub.Generate(inference_pb2.GenerateRequest(job=job), metadata=trace, timeout=30)
        job.max_cost_uatp = 1
        with pytest.raises(grpc.RpcError):
            stub.Generate(inference_pb2.GenerateRequest(job=job), metadata=trace, timeout=30)


def test_a_collector_gets_the_whole_story(tmp_path: Path) -> None:
    """The call below the caller's span, the job below the call, its phases below the job."""
    with collector() as (url, arrived):
        daemon = DaemonProcess.start(
            tmp_path / "state", "--set", f"tracing.otlp_endpoint={url}", wait_for=("tactical",)
        )
        ask(daemon.address)
        # What is left is exported before the daemon ends.
        assert 0 == daemon.stop(), daemon.log.read_text()
    spans = [arrived.get_nowait() for _ in range(arrived.qsize())]
    served, refused = sorted(
        (span for span in spans if span.kind == Span.SPAN_KIND_SERVER),
        key=lambda span: span.start_time_unix_nano,
    )
    names = {span.span_id: span.name for span in spans}
    below = {
        (names.get(span.parent_span_id, "the caller"), span.name)
        for span in spans
        if span.name != refused.name or span.span_id == served.span_id
    }

    assert {bytes.fromhex(TRACE_ID)} == {span.trace_id for span in spans}
    assert bytes.fromhex(SPAN_ID) == served.parent_span_id
    assert {
        ("the caller", "sage_fed.v1.InferenceService/Generate"),
        ("sage_fed.v1.InferenceService/Generate", "chat demo-tactical"),
        ("chat demo-tactical", "stage tactical"),
        ("chat demo-tactical", "queue"),
        ("chat demo-tactical", "prefill"),
        ("chat demo-tactical", "decode"),
    } == below
    statuses = [
        next(a.value.string_value for a in span.attributes if a.key == "rpc.response.status_code")
        for span in (served, refused)
    ]
    assert ["OK", "RESOURCE_EXHAUSTED"] == statuses
    (failed,) = [span for span in spans if span.status.code == Status.STATUS_CODE_ERROR]
    assert "chat demo-tactical" == failed.name


def test_a_collector_that_is_away_costs_no_request(tmp_path: Path) -> None:
    """Jobs are served, and the daemon ends in order and in time."""
    daemon = DaemonProcess.start(
        tmp_path / "state",
        *("--set", "tracing.otlp_endpoint=http://127.0.0.1:1/v1/traces"),
        wait_for=("tactical",),
    )
    ask(daemon.address)
    assert 0 == daemon.stop(), daemon.log.read_text()
    assert "Traceback" not in daemon.log.read_text()
