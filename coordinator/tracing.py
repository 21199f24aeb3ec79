"""W3C trace context from clients to ranks, and OpenTelemetry spans where they are wanted.

Without OpenTelemetry (or without an endpoint to send to) a request's ``traceparent`` still travels on, so that a trace
continues in whatever the ranks record.  With it, each request is a span; its children are its time in the queue and
its dispatch, below that each rank, and below that the rank's collectives.  Spans are made when the answer is there,
from the timings that were taken anyway.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Awaitable, Iterable, Mapping
from typing import Any, Protocol

from coordinator.errors import ServiceError
from coordinator.logging import get_logger
from coordinator.types import InferRequest, InferResult

_TRACEPARENT = re.compile(r"(?!ff)[0-9a-f]{2}-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}(-.*)?")
_ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
_MAX_STATE = 512  # characters that https://www.w3.org/TR/trace-context/ asks to pass on at least


def carrier_of(metadata: Iterable[tuple[str, str | bytes]] | None) -> dict[str, str]:
    """``traceparent`` and ``tracestate`` of a call's metadata; empty when there is none or it is malformed."""
    found: dict[str, str] = {}
    for key, value in metadata or ():
        if key in ("traceparent", "tracestate") and isinstance(value, str):
            found[key] = value
    if not found or not _TRACEPARENT.fullmatch(found.get("traceparent", "")):
        return {}
    if len(found.get("tracestate", "")) > _MAX_STATE:
        del found["tracestate"]
    return found


class Forwards(Protocol):
    """The part of ``Core`` that is traced."""

    def forward(self, request: InferRequest) -> Awaitable[InferResult]: ...


class Tracing:
    """Spans of this process's requests; with ``provider`` None it makes none and costs nothing."""

    def __init__(self, provider: Any = None) -> None:
        self._provider = provider
        if provider is not None:
            from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

            self._tracer = provider.get_tracer("coordinator")
            self._propagator = TraceContextTextMapPropagator()

    def forward(self, core: Forwards, request: InferRequest, method: str) -> Awaitable[InferResult]:
        """``core.forward(request)`` under a span; ``request.trace_context`` goes in as the client's, out as ours."""
        return core.forward(request) if self._provider is None else self._traced(core, request, method)

    async def _traced(self, core: Forwards, request: InferRequest, method: str) -> InferResult:
        from opentelemetry.trace import SpanKind

        parent = self._propagator.extract(request.trace_context)
        began = time.time_ns()
        span = self._tracer.start_span(
            method, context=parent, kind=SpanKind.SERVER, start_time=began, attributes=_attributes(request)
        )
        try:
            request.trace_context = self._inject(span)
            result = await core.forward(request)
            self._parts(span, began, result)
            return result
        except BaseException as error:
            _failed(span, error)
            raise
        finally:
            span.end()

    def close(self) -> None:
        """Sends what is left; blocks for at most some seconds, so call it off the event loop."""
        if self._provider is not None:
            self._provider.force_flush(3000)
            self._provider.shutdown()

    def _inject(self, span: Any) -> dict[str, str]:
        from opentelemetry.trace import set_span_in_context

        carrier: dict[str, str] = {}
        self._propagator.inject(carrier, set_span_in_context(span))
        return carrier

    def _parts(self, span: Any, began: int, result: InferResult) -> None:
        timings = result.timings
        dispatched = began + _ns(timings.queue)
        answered = dispatched + _ns(timings.dispatch or max(timings.total - timings.queue, 0.0))
        self._child(span, "queue", began, dispatched)
        dispatch = self._child(span, "dispatch", dispatched, answered, {"batch.rows": timings.rows})
        for rank, (forward, collective, copy) in enumerate(timings.ranks):
            # A rank reports how long, not when: its span begins with the dispatch, and the sum of its collectives
            # (waiting for other ranks included) is drawn at its end.
            end = dispatched + _ns(copy + forward)
            about = {"rank": rank, "forward.seconds": forward, "collective.seconds": collective, "copy.seconds": copy}
            worked = self._child(dispatch, "rank", dispatched, end, about)
            self._child(worked, "collectives", end - _ns(collective), end, {"rank": rank})

    def _child(self, parent: Any, name: str, start: int, end: int, attributes: Any = None) -> Any:
        from opentelemetry.trace import set_span_in_context

        context = set_span_in_context(parent)
        span = self._tracer.start_span(name, context=context, start_time=start, attributes=attributes)
        span.end(end)
        return span


def _ns(seconds: float) -> int:
    return int(seconds * 1e9)


def from_environment(environ: Mapping[str, str] = os.environ) -> Tracing:
    """Exports by OTLP where one of OpenTelemetry's endpoint variables is set; without the extra, warns and goes on."""
    if not any(environ.get(name) for name in _ENDPOINTS) or environ.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return Tracing()
    try:
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        get_logger().warning(
            "tracing_unavailable", missing=error.name, hint="pip install 'tensor-parallel-service[otel]'"
        )
        return Tracing()
    named = {} if environ.get("OTEL_SERVICE_NAME") else {"service.name": "coordinator"}
    provider = TracerProvider(resource=Resource.create(named))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return Tracing(provider)


def _attributes(request: InferRequest) -> dict[str, str]:
    return {"rpc.system": "grpc", "model": request.model, "request_id": request.request_id}


def _failed(span: Any, error: BaseException) -> None:
    from opentelemetry.trace import Status, StatusCode

    code = error.code.name if isinstance(error, ServiceError) else type(error).__name__
    span.set_attribute("rpc.grpc.status", code)
    span.set_status(Status(StatusCode.ERROR, str(error)))
