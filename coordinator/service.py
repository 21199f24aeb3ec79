"""``tensor_parallel.v1.Coordinator``: converts and delegates."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import Any, TypeAlias

import grpc
from google.protobuf.message import DecodeError, Message

from coordinator import codec, requests
from coordinator.core import Core
from coordinator.errors import InvalidArgument, ServiceError, abort
from coordinator.rpc import REQUEST_ID, Call, answer_of, call_of
from coordinator.streaming import answer_stream
from coordinator.tracing import Tracing
from coordinator.types import Answer, Buffer, InferRequest, InferResult
from protos.tensor_parallel.v1 import coordinator_pb2 as pb

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
SERVICE = "tensor_parallel.v1.Coordinator"


class CoordinatorService:
    """Every method takes and gives bytes: gRPC's own parsing would answer INTERNAL to what is no message."""

    def __init__(self, core: Core, tracing: Tracing) -> None:
        self._core = core
        self._tracing = tracing

    def handler(self) -> grpc.GenericRpcHandler:
        unary = {
            "Forward": self.forward,
            "Unload": self._unary(pb.UnloadRequest, self._unload),
            "Health": self._unary(pb.HealthRequest, self._health),
            "ListModels": self._unary(pb.ListModelsRequest, self._list_models),
            "Plan": self._unary(pb.PlanRequest, self._plan),
            "RegisterSharedMemory": self._unary(pb.RegisterSharedMemoryRequest, self._register),
            "UnregisterSharedMemory": self._unary(pb.UnregisterSharedMemoryRequest, self._unregister),
        }
        methods: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
            name: grpc.unary_unary_rpc_method_handler(behave) for name, behave in unary.items()
        }
        methods["Load"] = grpc.unary_stream_rpc_method_handler(self.load)
        methods["ForwardStream"] = grpc.stream_stream_rpc_method_handler(self.forward_stream)
        return grpc.method_handlers_generic_handler(SERVICE, methods)

    def _unary(
        self, kind: type[Message], behave: Callable[[Any], Awaitable[Message]]
    ) -> Callable[[bytes, Context], Awaitable[bytes]]:
        async def call(raw: bytes, context: Context) -> bytes:
            about = call_of(context)
            try:
                answer = (await behave(_parse(kind, raw))).SerializeToString()
            except Exception as error:
                await abort(context, error, about.request_id)
            context.set_trailing_metadata(((REQUEST_ID, about.request_id),))
            return answer

        return call

    # ---- forward

    async def forward(self, raw: Buffer, context: Context) -> Answer:
        call = call_of(context)
        try:
            request = codec.parse_forward(raw)
            if request.request_id:
                call = call_of(context, request.request_id)
            result = await self.run(request, call, "Forward")
            pieces = codec.response_pieces(result)
        except Exception as error:
            await abort(context, error, call.request_id)
        context.set_trailing_metadata(((REQUEST_ID, call.request_id),))
        # Counted behind the answer.
        asyncio.get_running_loop().call_soon(self._core.metrics.carried, len(raw), sum(map(len, pieces)))
        return answer_of(pieces, context)

    async def run(self, request: InferRequest, call: Call, method: str) -> InferResult:
        """One forward, traced, logged and counted. Raises ServiceError."""
        return await requests.run(self._core, self._tracing, request, call, method)

    async def forward_stream(self, messages: AsyncIterator[bytes], context: Context) -> AsyncIterator[bytes]:
        call = call_of(context)
        try:
            async with aclosing(answer_stream(self, messages, call)) as answers:
                async for answer in answers:
                    yield answer
        except ServiceError as error:
            await abort(context, error, call.request_id)

    # ---- models

    async def load(self, raw: bytes, context: Context) -> AsyncIterator[bytes]:
        call = call_of(context)
        try:
            async with aclosing(self._core.load(_parse(pb.LoadRequest, raw), call.request_id)) as messages:
                async for message in messages:
                    yield message.SerializeToString()
        except Exception as error:
            await abort(context, error, call.request_id)
        context.set_trailing_metadata(((REQUEST_ID, call.request_id),))

    async def _unload(self, request: pb.UnloadRequest) -> pb.UnloadResponse:
        await self._core.unload(request.name)
        return pb.UnloadResponse()

    async def _list_models(self, _request: pb.ListModelsRequest) -> pb.ListModelsResponse:
        return pb.ListModelsResponse(models=self._core.models())

    async def _plan(self, request: pb.PlanRequest) -> pb.PlanResponse:
        return await self._core.plan(request)

    async def _health(self, _request: pb.HealthRequest) -> pb.HealthResponse:
        return self._core.health()

    # ---- shared memory

    async def _register(self, request: pb.RegisterSharedMemoryRequest) -> pb.RegisterSharedMemoryResponse:
        await self._core.register_region(request.name, request.key, request.offset, request.byte_size)
        return pb.RegisterSharedMemoryResponse()

    async def _unregister(self, request: pb.UnregisterSharedMemoryRequest) -> pb.UnregisterSharedMemoryResponse:
        await self._core.unregister_region(request.name)
        return pb.UnregisterSharedMemoryResponse()


def _parse(kind: type[Message], raw: bytes) -> Any:
    message = kind()
    try:
        message.ParseFromString(raw)
    except DecodeError:
        raise InvalidArgument(f"the request is no {kind.__name__}") from None
    return message
