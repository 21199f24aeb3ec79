"""The same client for asyncio."""
# ruff: noqa: ASYNC109 - a call's timeout also goes to the server, as its deadline

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Self, TypeVar

import grpc
import numpy.typing as npt
from google.protobuf.message import Message

from coordinator.aio_status import FirstStatus
from coordinator.client import calls, stream
from coordinator.client.calls import Json
from coordinator.client.connection import Connection, Options, TlsSetting, new_request_id
from coordinator.client.errors import RequestError, from_rpc
from coordinator.client.memory import DEFAULT_PREFIX, Regions, SharedRegion, allow_registered, forgotten
from coordinator.client.sync import DEFAULT_TIMEOUT, LOAD_TIMEOUT
from coordinator.retry import Attempts, RetryPolicy
from protos.tensor_parallel.v1 import coordinator_pb2 as pb

_Answer = TypeVar("_Answer")
_Reply = TypeVar("_Reply", bound=Message)


class AsyncClient:
    """`Client` for asyncio: the same arguments, methods, results and errors, awaited; use it within one event loop."""

    def __init__(
        self,
        target: str,
        *,
        token: str | None = None,
        tls: TlsSetting = None,
        retries: RetryPolicy | int | bool | None = None,
        timeout: float | None = DEFAULT_TIMEOUT,
        options: Options | None = None,
    ) -> None:
        self._connection = Connection.of(target, token, tls, retries, timeout, options)
        self._opened: grpc.aio.Channel | None = None
        self._closed = False
        self._regions = Regions({})

    @property
    def target(self) -> str:
        return self._connection.target

    @property
    def _channel(self) -> grpc.aio.Channel:
        # Opened at first use: gRPC binds a channel to the loop that is current then.
        if self._closed:
            raise RequestError(grpc.StatusCode.CANCELLED, "this client is closed")
        if self._opened is None:
            connection = self._connection
            if connection.credentials is None:
                self._opened = grpc.aio.insecure_channel(connection.target, connection.options)
            else:
                self._opened = grpc.aio.secure_channel(connection.target, connection.credentials, connection.options)
        return self._opened

    async def load(
        self,
        name: str,
        path: object,
        *,
        version: str = "",
        timeout: float | None = LOAD_TIMEOUT,
        progress: Callable[[Json], None] | None = None,
        **options: Any,
    ) -> Json:
        """See `Client.load`."""
        request = calls.load_request(name, path, version, options)
        method = self._channel.unary_stream(
            calls.LOAD, pb.LoadRequest.SerializeToString, response_deserializer=pb.LoadProgress.FromString
        )

        async def once(remaining: float | None, metadata: tuple[tuple[str, str], ...]) -> Json:
            call = method(request, timeout=remaining, metadata=metadata)
            last = pb.LoadProgress()
            try:
                async for last in call:
                    if progress is not None:
                        progress(calls.to_dict(last))
            finally:
                call.cancel()
            return calls.loaded(last)

        return await self._retry(once, timeout, new_request_id())

    async def unload(self, name: str, *, timeout: float | None = None) -> None:
        await self._unary(calls.UNLOAD, pb.UnloadRequest(name=name), pb.UnloadResponse, timeout)

    async def forward(
        self,
        name: str,
        inputs: Mapping[str, Any],
        *,
        outputs: Sequence[str] | None = None,
        timeout: float | None = None,
        request_id: str | None = None,
        version: str = "",
        priority: int = 0,
        streamed: bool | None = None,
        into: Mapping[str, npt.NDArray[Any]] | None = None,
    ) -> dict[str, Any]:
        """See `Client.forward`."""
        call = calls.forward_call(
            name, inputs, outputs, new_request_id(request_id), version, priority, streamed, into, self._regions
        )
        try:
            return await self._forward_once_registered(call, timeout)
        except RequestError as error:
            if not forgotten(error):
                raise
        for region in self._regions.open.values():
            await self._register(region)
        return await self._forward_once_registered(call, timeout)

    async def _forward_once_registered(self, call: calls.ForwardCall, timeout: float | None) -> dict[str, Any]:
        if call.streamed:
            return await self._retry(lambda *how: self._stream_once(call, *how), timeout, call.request_id)
        payload = call.encode()
        method: Any = self._channel.unary_unary(calls.FORWARD)

        async def once(remaining: float | None, metadata: tuple[tuple[str, str], ...]) -> bytes:
            answer: bytes = await method(payload, timeout=remaining, metadata=metadata)
            return answer

        return call.decode(await self._retry(once, timeout, call.request_id))

    async def health(self, *, timeout: float | None = None) -> Json:
        """See `Client.health`."""
        answer = await self._unary(calls.HEALTH, pb.HealthRequest(), pb.HealthResponse, timeout, RetryPolicy.of(0))
        return calls.to_dict(answer)

    async def models(self, *, timeout: float | None = None) -> list[Json]:
        """See `Client.models`."""
        answer = await self._unary(calls.LIST_MODELS, pb.ListModelsRequest(), pb.ListModelsResponse, timeout)
        return [calls.to_dict(model) for model in answer.models]

    async def plan(
        self, path: object, *, ranks: int = 0, device_memory: int = 0, timeout: float | None = None, **options: Any
    ) -> Json:
        """See `Client.plan`."""
        request = pb.PlanRequest(
            path=str(path), options=calls.load_options(**options), ranks=ranks, device_memory=device_memory
        )
        return calls.plan_answer(await self._unary(calls.PLAN, request, pb.PlanResponse, timeout))

    @contextlib.asynccontextmanager
    async def shared_memory(self, byte_size: int, prefix: str = DEFAULT_PREFIX) -> AsyncIterator[SharedRegion]:
        """See `Client.shared_memory`."""
        region = SharedRegion(byte_size, prefix)
        try:
            await self._register(region)
            self._regions.open[region.name] = region
            yield region
        finally:
            if self._regions.open.pop(region.name, None) is not None:
                with contextlib.suppress(RequestError):  # it may be gone, and its registrations with it
                    request = pb.UnregisterSharedMemoryRequest(name=region.name)
                    await self._unary(calls.UNREGISTER, request, pb.UnregisterSharedMemoryResponse, 5.0)
            region.close()

    async def _register(self, region: SharedRegion) -> None:
        with allow_registered():
            await self._unary(calls.REGISTER, region.registration(), pb.RegisterSharedMemoryResponse, None)

    async def close(self) -> None:
        self._closed = True
        if self._opened is not None:
            await self._opened.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _stream_once(
        self, call: calls.ForwardCall, remaining: float | None, metadata: tuple[tuple[str, str], ...]
    ) -> dict[str, Any]:
        async def requests() -> AsyncIterator[bytes]:
            for request in stream.requests(call):
                yield request

        assembler = stream.Assembler(call)
        method: Any = self._channel.stream_stream(
            calls.FORWARD_STREAM, response_deserializer=pb.ForwardStreamResponse.FromString
        )
        answers = method(requests(), timeout=remaining, metadata=metadata)
        status = FirstStatus(answers)
        try:
            async for answer in answers:
                if assembler.feed(answer):
                    return assembler.outputs()
        except grpc.aio.AioRpcError as error:
            raise status.instead_of(error) from None
        finally:
            answers.cancel()
        raise RequestError(grpc.StatusCode.INTERNAL, "the answer ended early", request_id=call.request_id)

    async def _unary(
        self,
        method: str,
        request: Message,
        reply: type[_Reply],
        timeout: float | None,
        policy: RetryPolicy | None = None,
    ) -> _Reply:
        rpc = self._channel.unary_unary(method, type(request).SerializeToString, reply.FromString)

        async def once(remaining: float | None, metadata: tuple[tuple[str, str], ...]) -> _Reply:
            answer: _Reply = await rpc(request, timeout=remaining, metadata=metadata)
            return answer

        return await self._retry(once, timeout, new_request_id(), policy)

    async def _retry(
        self,
        once: Callable[[float | None, tuple[tuple[str, str], ...]], Awaitable[_Answer]],
        timeout: float | None,
        request_id: str,
        policy: RetryPolicy | None = None,
    ) -> _Answer:
        attempts = Attempts(policy or self._connection.policy, self._connection.timeout if timeout is None else timeout)
        metadata = self._connection.metadata(request_id)
        while True:
            try:
                return await once(attempts.remaining(), metadata)
            except grpc.RpcError as cause:
                error = from_rpc(cause, request_id)
                pause = attempts.pause_after(error)
                if pause is None:
                    raise error from None
            await asyncio.sleep(pause)
