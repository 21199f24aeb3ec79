"""Bytes that are no message are the caller's mistake: INVALID_ARGUMENT, where gRPC on its own says INTERNAL."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from shardd.errors import InvalidRequest


class _Malformed:
    """Stands for a request that could not be parsed."""


_MALFORMED = _Malformed()


class MalformedInterceptor(grpc.ServerInterceptor):  # type: ignore[misc]
    """Parses requests so that a bad one reaches the handler as a refusal instead of an internal error."""

    def intercept_service(
        self, continuation: Callable[[Any], Any], handler_call_details: grpc.HandlerCallDetails
    ) -> Any:
        handler = continuation(handler_call_details)
        if handler is None or handler.request_deserializer is None:
            return handler
        parse = _lenient(handler.request_deserializer)
        make, behaviour = _shape(handler)
        guarded = _guard_stream(behaviour) if handler.request_streaming else _guard(behaviour)
        for name in ("experimental_non_blocking", "experimental_thread_pool"):  # how gRPC runs health's Watch
            if hasattr(behaviour, name):
                setattr(guarded, name, getattr(behaviour, name))
        return make(guarded, parse, handler.response_serializer)


def _lenient(parse: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    def lenient(data: bytes) -> Any:
        try:
            return parse(data)
        except DecodeError:
            return _MALFORMED

    return lenient


def _shape(handler: Any) -> tuple[Callable[..., Any], Callable[..., Any]]:
    if handler.request_streaming:
        return grpc.stream_stream_rpc_method_handler, handler.stream_stream
    if handler.response_streaming:
        return grpc.unary_stream_rpc_method_handler, handler.unary_stream
    return grpc.unary_unary_rpc_method_handler, handler.unary_unary


def _guard(behaviour: Callable[..., Any]) -> Callable[..., Any]:
    def call(request: Any, context: grpc.ServicerContext, *more: Any) -> Any:
        if request is _MALFORMED:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, "the request is not a message of this method")
        return behaviour(request, context, *more)

    return call


def _guard_stream(behaviour: Callable[..., Any]) -> Callable[..., Any]:
    def parsed(requests: Iterator[Any]) -> Iterator[Any]:
        for request in requests:
            if request is _MALFORMED:
                raise InvalidRequest("a message of the stream makes no sense")
            yield request

    def call(requests: Iterator[Any], context: grpc.ServicerContext) -> Any:
        return behaviour(parsed(requests), context)

    return call
