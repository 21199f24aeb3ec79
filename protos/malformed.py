"""Answers a message that cannot be parsed with INVALID_ARGUMENT.

gRPC itself answers INTERNAL and logs a traceback, which reads as a fault of the server and pages somebody. These
interceptors take parsing away from it: the handler gets raw bytes, and parses them before the servicer sees them.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

import grpc

Handler = Any  # grpc.RpcMethodHandler, which is generic in stubs alone

_BUILDERS: dict[tuple[bool, bool], Callable[..., Handler]] = {
    (False, False): grpc.unary_unary_rpc_method_handler,
    (False, True): grpc.unary_stream_rpc_method_handler,
    (True, False): grpc.stream_unary_rpc_method_handler,
    (True, True): grpc.stream_stream_rpc_method_handler,
}


def _behavior(handler: Handler) -> Any:
    return handler.unary_unary or handler.unary_stream or handler.stream_unary or handler.stream_stream


def _rebuilt(handler: Handler, behavior: Any) -> Handler:
    build = _BUILDERS[handler.request_streaming, handler.response_streaming]
    return build(behavior, request_deserializer=None, response_serializer=handler.response_serializer)


def _message(method: str, error: Exception) -> str:
    return f"{method} got a message that cannot be parsed: {error}"[:300]


class MalformedInterceptor(grpc.ServerInterceptor):
    """For a threaded server."""

    def intercept_service(self, continuation: Callable[[Any], Handler | None], details: Any) -> Handler | None:
        handler = continuation(details)
        if handler is None or handler.request_deserializer is None:
            return handler
        parse, behavior, method = handler.request_deserializer, _behavior(handler), details.method

        def parsed(raw: bytes, context: grpc.ServicerContext) -> Any:
            try:
                return parse(raw)
            except Exception as error:
                context.abort(grpc.StatusCode.INVALID_ARGUMENT, _message(method, error))

        def unary(raw: bytes, context: grpc.ServicerContext) -> Any:
            return behavior(parsed(raw, context), context)

        def stream(requests: Iterator[bytes], context: grpc.ServicerContext) -> Any:
            return behavior((parsed(raw, context) for raw in requests), context)

        return _rebuilt(handler, stream if handler.request_streaming else unary)


class AsyncMalformedInterceptor(grpc.aio.ServerInterceptor):
    """For a grpc.aio server; servicers iterate over streamed requests (``context.read()`` would see raw bytes)."""

    async def intercept_service(
        self, continuation: Callable[[Any], Awaitable[Handler | None]], details: Any
    ) -> Handler | None:
        handler = await continuation(details)
        if handler is None or handler.request_deserializer is None:
            return handler
        parse, behavior, method = handler.request_deserializer, _behavior(handler), details.method

        async def parsed(raw: bytes, context: Any) -> Any:
            try:
                return parse(raw)
            except Exception as error:
                await context.abort(grpc.StatusCode.INVALID_ARGUMENT, _message(method, error))

        async def iterate(requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[Any]:
            async for raw in requests:
                yield await parsed(raw, context)

        async def one_to_one(raw: bytes, context: Any) -> Any:
            return await behavior(await parsed(raw, context), context)

        async def one_to_many(raw: bytes, context: Any) -> AsyncIterator[Any]:
            async for response in behavior(await parsed(raw, context), context):
                yield response

        async def many_to_one(requests: AsyncIterator[bytes], context: Any) -> Any:
            return await behavior(iterate(requests, context), context)

        async def many_to_many(requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[Any]:
            async for response in behavior(iterate(requests, context), context):
                yield response

        behaviors = {
            (False, False): one_to_one,
            (False, True): one_to_many,
            (True, False): many_to_one,
            (True, True): many_to_many,
        }
        return _rebuilt(handler, behaviors[handler.request_streaming, handler.response_streaming])
