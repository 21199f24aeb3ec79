"""Spans of a real coordinator over real ranks, as a collector receives them over OTLP."""

import queue
from concurrent import futures

import grpc
import numpy as np
import pytest

from tests.service.clusters import Cluster, forward_request

traces = pytest.importorskip(
    "opentelemetry.proto.collector.trace.v1.trace_service_pb2", reason="the otel extra is not installed"
)
pytest.importorskip("opentelemetry.exporter.otlp.proto.grpc.trace_exporter", reason="the otel extra is not installed")

SERVICE = "opentelemetry.proto.collector.trace.v1.TraceService"
TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"


@pytest.fixture
def collector():
    """An OTLP endpoint, and the spans that it received."""
    received = queue.Queue()

    def export(request, _context):
        for resource in request.resource_spans:
            service = next(a.value.string_value for a in resource.resource.attributes if a.key == "service.name")
            for scope in resource.scope_spans:
                for span in scope.spans:
                    received.put((service, span))
        return traces.ExportTraceServiceResponse()

    handler = grpc.unary_unary_rpc_method_handler(
        export,
        request_deserializer=traces.ExportTraceServiceRequest.FromString,
        response_serializer=traces.ExportTraceServiceResponse.SerializeToString,
    )
    server = grpc.server(futures.ThreadPoolExecutor(2))
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, {"Export": handler}),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    received.endpoint = f"http://127.0.0.1:{port}"
    yield received
    server.stop(None).wait(10)


def test_a_request_s_spans_reach_the_collector(collector, tmp_path, monkeypatch):
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.endpoint)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_INSECURE", "true")
    with Cluster(2, tmp_path) as cluster:
        cluster.load("m", "tests.service.shard_models:mlp", kind="factory")
        request = forward_request("m", {"x": np.zeros((2, 16), np.float32)})
        parent = (("traceparent", f"00-{TRACE}-00f067aa0ba902b7-01"),)
        cluster.stub.Forward(request, timeout=20, metadata=parent)
        assert cluster.coordinator.stop() == 0
    spans = {}
    while not collector.empty():
        service, span = collector.get()
        assert service == "coordinator"
        spans.setdefault(span.name, []).append(span)
    (root,) = spans["Forward"]
    assert root.trace_id.hex() == TRACE
    assert root.parent_span_id.hex() == "00f067aa0ba902b7"
    (dispatch,) = spans["dispatch"]
    assert dispatch.parent_span_id == root.span_id
    assert len(spans["rank"]) == len(spans["collectives"]) == 2
    assert all(span.parent_span_id == dispatch.span_id for span in spans["rank"])
    assert all(span.end_time_unix_nano <= root.end_time_unix_nano for span in spans["dispatch"] + spans["queue"])
