"""Bytes that are no message are the client's fault, on every kind of call and both kinds of server."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from concurrent import futures

import grpc
import pytest
from grpc_health.v1 import health_pb2

from protos.malformed import AsyncMalformedInterceptor, MalformedInterceptor

GOOD = health_pb2.HealthCheckRequest(service="x").SerializeToString()
BAD = b"\xff\xff\xff\xff"
KINDS = ("unary_unary", "unary_stream", "stream_unary", "stream_stream")


def _handlers(asynchronous: bool) -> grpc.GenericRpcHandler:
    def reply(request):
        return request.service.encode()

    async def uu(request, context):
        return reply(request)

    async def us(request, context):
        yield reply(request)

    async def su(requests, context):
        return b"".join([reply(r) async for r in requests])

    async def ss(requests, context):
        async for request in requests:
            yield reply(request)

    def sync_us(request, context):
        yield reply(request)

    def sync_ss(requests, context):
        for request in requests:
            yield reply(request)

    aio = {"unary_unary": uu, "unary_stream": us, "stream_unary": su, "stream_stream": ss}
    sync = {
        "unary_unary": lambda request, context: reply(request),
        "unary_stream": sync_us,
        "stream_unary": lambda requests, context: b"".join(map(reply, requests)),
        "stream_stream": sync_ss,
    }
    handlers = {
        kind: getattr(grpc, f"{kind}_rpc_method_handler")(
            (aio if asynchronous else sync)[kind], request_deserializer=health_pb2.HealthCheckRequest.FromString
        )
        for kind in KINDS
    }
    return grpc.method_handlers_generic_handler("test", handlers)


@pytest.fixture(params=["threads", "aio"], scope="module")
def channel(request) -> Iterator[grpc.Channel]:
    if request.param == "threads":
        server = grpc.server(futures.ThreadPoolExecutor(4), interceptors=[MalformedInterceptor()])
        server.add_generic_rpc_handlers((_handlers(False),))
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            yield channel
        server.stop(None).wait(10)
        return
    ready, done, ports = threading.Event(), [], []

    async def serve() -> None:
        server = grpc.aio.server(interceptors=[AsyncMalformedInterceptor()])
        server.add_generic_rpc_handlers((_handlers(True),))
        ports.append(server.add_insecure_port("127.0.0.1:0"))
        await server.start()
        stop = asyncio.Event()
        done.append((asyncio.get_running_loop(), stop))
        ready.set()
        await stop.wait()
        await server.stop(None)

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    assert ready.wait(10)
    with grpc.insecure_channel(f"127.0.0.1:{ports[0]}") as channel:
        yield channel
    loop, stop = done[0]
    loop.call_soon_threadsafe(stop.set)
    thread.join(10)


def _call(channel: grpc.Channel, kind: str, message: bytes) -> bytes:
    call: Callable = getattr(channel, kind)(f"/test/{kind}")
    answer = call(iter([message]) if kind.startswith("stream") else message, timeout=10)
    return b"".join(answer) if kind.endswith("stream") else answer


@pytest.mark.parametrize("kind", KINDS)
def test_good_message_passes(channel, kind):
    assert _call(channel, kind, GOOD) == b"x"


@pytest.mark.parametrize("kind", KINDS)
def test_bad_message_is_invalid_argument(channel, kind):
    with pytest.raises(grpc.RpcError) as caught:
        _call(channel, kind, BAD)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "cannot be parsed" in caught.value.details()
