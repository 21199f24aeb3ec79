"""``inference.GRPCInferenceService`` (Open Inference Protocol v2 with Triton's extensions): converts and delegates.

Status codes are those that clients of Triton expect: a model that is unknown is NOT_FOUND, one that is known but cannot
serve is UNAVAILABLE, whatever is wrong with a request is INVALID_ARGUMENT.  ``ModelReady`` never fails.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import replace
from itertools import count
from typing import TYPE_CHECKING, Any

import grpc
from google.protobuf.message import DecodeError

from coordinator import inference_codec, inference_models, inference_repository, requests
from coordinator.errors import (
    AlreadyExists,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    ServiceError,
    Unavailable,
    Unimplemented,
    abort,
    describe,
)
from coordinator.inference_stream import answer_in_order
from coordinator.logging import bound
from coordinator.rpc import REQUEST_ID, Call, answer_of, call_of
from coordinator.tracing import Tracing
from coordinator.types import Answer, Buffer, InferResult
from coordinator.version import DISTRIBUTION, version
from protos.inference import SERVICE_NAME, message, service
from protos.tensor_parallel.v1 import coordinator_pb2 as pb

if TYPE_CHECKING:
    from coordinator.core import Core

Context = grpc.aio.ServicerContext[Any, Any]
Unary = Callable[[Any, Call], Awaitable[Any]]

EXTENSIONS = (
    *("model_repository", "model_repository(unload_dependents)", "model_configuration", "system_shared_memory"),
    *("statistics", "parameters", "binary_tensor_data"),
)
STRICT_STREAM = "triton_grpc_error"  # metadata: a failed request ends the stream with its status, as Triton has it


def inference_handler(core: Core, tracing: Tracing | None = None) -> grpc.GenericRpcHandler:
    """The service as a handler for ``server.add_generic_rpc_handlers``: its messages are in a pool of their own."""
    servicer = InferenceService(core, tracing or Tracing())
    methods: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
        "ModelInfer": grpc.unary_unary_rpc_method_handler(servicer.infer),
        "ModelStreamInfer": grpc.stream_stream_rpc_method_handler(servicer.stream_infer),
    }
    for method in service.methods:
        if method.name not in methods:
            behave = _guarded(getattr(servicer, method.name), message(method.input_type.name))
            methods[method.name] = grpc.unary_unary_rpc_method_handler(behave)
    return grpc.method_handlers_generic_handler(SERVICE_NAME, methods)


def _guarded(behave: Unary, request_class: Any) -> Callable[[bytes, Context], Awaitable[bytes]]:
    """Parses here, because gRPC itself would answer INTERNAL to bytes that are no message."""

    async def handle(data: bytes, context: Context) -> bytes:
        call = call_of(context)
        try:
            with bound(request_id=call.request_id):
                answer: bytes = (await behave(_parse(request_class, data), call)).SerializeToString()
        except Exception as error:
            await abort(context, error, call.request_id)
        context.set_trailing_metadata(((REQUEST_ID, call.request_id),))
        return answer

    return handle


def _parse(request_class: Any, data: bytes) -> Any:
    try:
        return request_class.FromString(data)
    except DecodeError as error:
        raise InvalidArgument(f"the request is no {request_class.DESCRIPTOR.name}: {error}") from None


def _answer(kind: str, /, **fields: Any) -> Any:
    return message(kind)(**fields)


class InferenceService:
    """One method for each of the protocol's, named as it names them; the two that carry tensors take and give bytes."""

    def __init__(self, core: Core, tracing: Tracing) -> None:
        self._core = core
        self._tracing = tracing

    # ---- inference

    async def infer(self, data: Buffer, context: Context) -> Answer:
        call = call_of(context)
        try:
            decoded = inference_codec.decode(data)
            call = call.named(decoded.id)
            pieces = inference_codec.encode(await self._forward(decoded, call, "ModelInfer"), decoded.id)
        except Exception as error:
            await abort(context, error, call.request_id)
        context.set_trailing_metadata(((REQUEST_ID, call.request_id),))
        # Counted behind the answer.
        asyncio.get_running_loop().call_soon(self._core.metrics.carried, len(data), sum(map(len, pieces)))
        return answer_of(pieces, context)

    async def stream_infer(self, messages: AsyncIterator[bytes], context: Context) -> AsyncIterator[bytes]:
        about = call_of(context)
        number = count(1)
        strict = (STRICT_STREAM, "true") in (context.invocation_metadata() or ())

        async def one(data: bytes) -> bytes:
            id = ""
            call = replace(about, request_id=f"{about.request_id}.{next(number)}")
            try:
                decoded = inference_codec.decode(data)
                id = decoded.id
                call = call.named(id)
                result = await self._forward(decoded, call, "ModelStreamInfer")
                answer = b"".join(inference_codec.encode_streamed(result, id))
            except Exception as error:
                shown = describe(error, call.request_id)
                if strict:
                    raise shown from error
                return inference_codec.encode_failure(shown, id)
            self._core.metrics.carried(len(data), len(answer))
            return answer

        try:
            async with aclosing(answer_in_order(messages, one)) as answers:
                async for answer in answers:
                    yield answer
        except ServiceError as error:
            await abort(context, error, about.request_id)

    def _forward(self, decoded: inference_codec.Decoded, call: Call, method: str) -> Awaitable[InferResult]:
        if decoded.timeout is not None:
            decoded.request.deadline = asyncio.get_running_loop().time() + decoded.timeout
        return requests.run(self._core, self._tracing, decoded.request, call, method, unready=True)

    # ---- health and metadata

    async def ServerLive(self, _request: Any, _call: Call) -> Any:
        return _answer("ServerLiveResponse", live=True)

    async def ServerReady(self, _request: Any, _call: Call) -> Any:
        return _answer("ServerReadyResponse", ready=bool(self._core.is_serving("")))

    async def ModelReady(self, request: Any, _call: Call) -> Any:
        try:
            known = self._core.model(request.name, request.version)
        except ServiceError:
            return _answer("ModelReadyResponse", ready=False)
        return _answer("ModelReadyResponse", ready=known.serving and bool(self._core.is_serving(request.name)))

    async def ServerMetadata(self, _request: Any, _call: Call) -> Any:
        return _answer("ServerMetadataResponse", name=DISTRIBUTION, version=version(), extensions=EXTENSIONS)

    async def ModelMetadata(self, request: Any, _call: Call) -> Any:
        info = self._model(request.name, request.version)
        return inference_models.metadata(info, [info.version])

    async def ModelConfig(self, request: Any, _call: Call) -> Any:
        return _answer(
            "ModelConfigResponse", config=inference_models.config(self._model(request.name, request.version))
        )

    async def ModelStatistics(self, request: Any, _call: Call) -> Any:
        infos = [self._model(request.name, request.version)] if request.name else self._core.models()
        device = "GPU" if any(rank.device.startswith("cuda") for rank in self._core.health().ranks) else "CPU"
        answer = _answer("ModelStatisticsResponse")
        for info in infos:
            for number, totals in self._core.statistics(info.name, request.version).items():
                answer.model_stats.append(inference_models.statistics(info, number, totals, device))
        return answer

    def _model(self, name: str, number: str) -> pb.ModelInfo:
        try:
            return self._core.model(name, number)
        except FailedPrecondition as error:
            raise Unavailable(error.message) from error

    # ---- model repository

    async def RepositoryIndex(self, request: Any, _call: Call) -> Any:
        reasons = {model.name: model.reason for model in self._core.health().models}
        return inference_models.index(self._core.models(), reasons, request.ready)

    async def RepositoryModelLoad(self, request: Any, call: Call) -> Any:
        load = inference_repository.load_request(request)
        async for _progress in self._core.load(load, call.request_id):
            pass
        return _answer("RepositoryModelLoadResponse")

    async def RepositoryModelUnload(self, request: Any, _call: Call) -> Any:
        await self._core.unload(request.model_name)
        return _answer("RepositoryModelUnloadResponse")

    # ---- shared memory

    async def SystemSharedMemoryStatus(self, request: Any, _call: Call) -> Any:
        regions = self._core.regions()
        if request.name and request.name not in regions:
            raise NotFound(f"Unable to find system shared memory region: {request.name!r}")
        answer = _answer("SystemSharedMemoryStatusResponse")
        for name, (key, part) in regions.items():
            if request.name in ("", name):
                shown = answer.regions[name]
                shown.name, shown.key, shown.offset, shown.byte_size = name, key, part.offset, part.byte_size
        return answer

    async def SystemSharedMemoryRegister(self, request: Any, _call: Call) -> Any:
        if not request.name:
            raise InvalidArgument("a shared-memory region needs a name")
        if request.name in self._core.regions():
            raise AlreadyExists(f"shared memory region {request.name!r} already in manager")
        await self._core.register_region(request.name, request.key, request.offset, request.byte_size)
        return _answer("SystemSharedMemoryRegisterResponse")

    async def SystemSharedMemoryUnregister(self, request: Any, _call: Call) -> Any:
        if not request.name or request.name in self._core.regions():  # an unknown region is gone already, as in Triton
            await self._core.unregister_region(request.name)
        return _answer("SystemSharedMemoryUnregisterResponse")

    async def CudaSharedMemoryStatus(self, request: Any, _call: Call) -> Any:
        if request.name:
            raise NotFound(f"Unable to find cuda shared memory region: {request.name!r}")
        return _answer("CudaSharedMemoryStatusResponse")

    async def CudaSharedMemoryRegister(self, request: Any, _call: Call) -> Any:
        raise Unimplemented("CUDA shared memory is not served here; register system shared memory")

    async def CudaSharedMemoryUnregister(self, _request: Any, _call: Call) -> Any:
        return _answer("CudaSharedMemoryUnregisterResponse")
