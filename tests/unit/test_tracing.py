"""Trace context from a call's metadata to the ranks, and the spans of a request."""

import asyncio
import sys

import pytest
import structlog

from coordinator import tracing
from coordinator.errors import Unavailable
from coordinator.types import InferRequest, InferResult, Timings

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
PARENT = f"00-{TRACE}-00f067aa0ba902b7-01"


def request(**context):
    return InferRequest(model="mlp", inputs=[], request_id="r1", trace_context=context)


class Core:
    """Answers with fixed timings, or fails."""

    def __init__(self, failure=None):
        self.failure = failure
        self.passed_on = None

    async def forward(self, request):
        self.passed_on = dict(request.trace_context)
        if self.failure is not None:
            raise self.failure
        timings = Timings(queue=0.25, dispatch=0.5, forward=0.4, collective=0.1, copy=0.05, total=0.75, rows=3)
        timings.ranks = [(0.4, 0.1, 0.05), (0.3, 0.05, 0.05)]
        return InferResult(request.model, "1", [], timings, request.request_id)


@pytest.mark.parametrize(
    ("metadata", "carrier"),
    [
        (None, {}),
        ([], {}),
        ([("x-request-id", "a")], {}),
        ([("traceparent", PARENT)], {"traceparent": PARENT}),
        ([("traceparent", PARENT), ("tracestate", "a=b")], {"traceparent": PARENT, "tracestate": "a=b"}),
        ([("traceparent", PARENT), ("tracestate", "a" * 600)], {"traceparent": PARENT}),
        ([("tracestate", "a=b")], {}),
        ([("traceparent", f"00-{'0' * 32}-00f067aa0ba902b7-01")], {}),
        ([("traceparent", f"00-{TRACE}-{'0' * 16}-01")], {}),
        ([("traceparent", PARENT.upper())], {}),
        ([("traceparent", PARENT + "\nforged")], {}),
        ([("traceparent", "ff" + PARENT[2:])], {}),
        ([("traceparent", b"bytes")], {}),
    ],
)
def test_only_well_formed_context_is_passed_on(metadata, carrier):
    assert tracing.carrier_of(metadata) == carrier


def test_without_a_provider_the_context_goes_through_unchanged():
    core = Core()
    asyncio.run(tracing.Tracing().forward(core, request(traceparent=PARENT), "ModelInfer"))
    assert core.passed_on == {"traceparent": PARENT}


def test_no_endpoint_no_exporter():
    assert tracing.from_environment({})._provider is None
    disabled = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1", "OTEL_SDK_DISABLED": "true"}
    assert tracing.from_environment(disabled)._provider is None


@pytest.fixture
def spans():
    pytest.importorskip("opentelemetry.sdk", reason="the otel extra is not installed")
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))

    def run(core, made):
        asyncio.run(tracing.Tracing(provider).forward(core, made, "ModelInfer"))

    def name_of(span):
        return span.name if "rank" not in span.attributes else f"{span.name} {span.attributes['rank']}"

    run.finished = lambda: {name_of(span): span for span in exporter.get_finished_spans()}
    return run


def test_a_request_is_a_span_with_its_queue_and_dispatch(spans):
    core = Core()
    spans(core, request(traceparent=PARENT))
    made = spans.finished()
    ranks = {f"{name} {rank}" for name in ("rank", "collectives") for rank in range(2)}
    assert set(made) == {"ModelInfer", "queue", "dispatch", *ranks}
    root = made["ModelInfer"]
    assert format(root.context.trace_id, "032x") == TRACE
    assert format(root.parent.span_id, "016x") == "00f067aa0ba902b7"
    assert dict(root.attributes) == {"rpc.system": "grpc", "model": "mlp", "request_id": "r1"}
    for name, seconds in (("queue", 0.25), ("dispatch", 0.5)):
        assert made[name].parent.span_id == root.context.span_id
        assert (made[name].end_time - made[name].start_time) / 1e9 == pytest.approx(seconds)
    assert made["dispatch"].start_time == made["queue"].end_time
    assert made["dispatch"].attributes["batch.rows"] == 3


def test_each_rank_and_its_collectives_are_below_the_dispatch(spans):
    spans(Core(), request())
    made = spans.finished()
    for rank, (worked, collective) in enumerate([(0.45, 0.1), (0.35, 0.05)]):
        span, inner = made[f"rank {rank}"], made[f"collectives {rank}"]
        assert span.parent.span_id == made["dispatch"].context.span_id
        assert inner.parent.span_id == span.context.span_id
        assert (span.end_time - span.start_time) / 1e9 == pytest.approx(worked)
        assert (inner.end_time - inner.start_time) / 1e9 == pytest.approx(collective)
        assert span.start_time <= inner.start_time
        assert inner.end_time == span.end_time


def test_the_ranks_continue_the_request_s_span(spans):
    core = Core()
    spans(core, request(traceparent=PARENT, tracestate="vendor=1"))
    span = spans.finished()["ModelInfer"].context.span_id
    assert core.passed_on == {"traceparent": f"00-{TRACE}-{span:016x}-01", "tracestate": "vendor=1"}


def test_a_request_without_context_begins_a_trace(spans):
    core = Core()
    spans(core, request())
    root = spans.finished()["ModelInfer"]
    assert root.parent is None
    assert core.passed_on["traceparent"].startswith(f"00-{root.context.trace_id:032x}-")


def test_a_failure_is_on_the_span(spans):
    with pytest.raises(Unavailable):
        spans(Core(Unavailable("rank 1 was lost")), request())
    root = spans.finished()["ModelInfer"]
    assert root.attributes["rpc.grpc.status"] == "UNAVAILABLE"
    assert root.status.description == "rank 1 was lost"
    assert not root.status.is_ok


def test_without_the_exporter_it_says_so_and_goes_on(monkeypatch):
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.grpc.trace_exporter", None)
    with structlog.testing.capture_logs() as lines:
        made = tracing.from_environment({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1"})
    assert made._provider is None
    assert [line["event"] for line in lines] == ["tracing_unavailable"]
