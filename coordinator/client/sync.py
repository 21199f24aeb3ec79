"""The blocking client."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Self, TypeVar

import grpc
import numpy.typing as npt
from google.protobuf.message import Message

from coordinator.client import calls, stream
from coordinator.client.calls import Json
from coordinator.client.connection import Connection, Options, TlsSetting, new_request_id
from coordinator.client.errors import RequestError, from_rpc
from coordinator.client.memory import DEFAULT_PREFIX, Regions, SharedRegion, allow_registered, forgotten
from coordinator.client.transport import channel_to
from coordinator.retry import Attempts, RetryPolicy
from coordinator.types import Buffer
from protos.tensor_parallel.v1 import coordinator_pb2 as pb

_Answer = TypeVar("_Answer")
_Reply = TypeVar("_Reply", bound=Message)

DEFAULT_TIMEOUT = 60.0
LOAD_TIMEOUT = 3600.0


class Client:
    """A blocking client of one coordinator; safe to share between threads.

    ``target`` is HOST:PORT or unix:/path. ``retries`` makes failed calls again: a number, True (until the call's
    deadline), or a `RetryPolicy`; default none. ``timeout`` is the deadline of a call, retries included, in seconds,
    unless the call is given its own. ``tls`` is True, a CA file, or a `Tls`; ``token`` a bearer token; ``options`` gRPC
    channel options, with which every call is grpcio's; `coordinator.client.transport` tells what else is.

    Every failure raises `RequestError`, with ``.code()``, ``.details()``, ``.request_id`` and ``.retry_after``.

    >>> import numpy as np
    >>> with Client(target, retries=True) as client:
    ...     model = client.load("double", "models/double")
    ...     outputs = client.forward("double", {"x": np.ones((2, 3), np.float32)})
    >>> outputs["output"]
    array([[2., 2., 2.],
           [2., 2., 2.]], dtype=float32)
    """

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
        self._connection = connection = Connection.of(target, token, tls, retries, timeout, options)
        self._channel = channel_to(connection)
        self._regions = Regions({})
        self._forward: Any = self._channel.unary_unary(calls.FORWARD)

    @property
    def target(self) -> str:
        return self._connection.target

    def load(
        self,
        name: str,
        path: object,
        *,
        version: str = "",
        timeout: float | None = LOAD_TIMEOUT,
        progress: Callable[[Json], None] | None = None,
        **options: Any,
    ) -> Json:
        """Loads ``path`` on every rank and serves it as ``name``; returns the model's description once it serves.

        ``options`` are those of `load_options`: kind, dtype, architecture, inputs, verify, max_batch_size,
        max_joined_rows, max_delay (seconds), arguments, execution (``eager`` or ``compile``). ``progress`` is called
        with each report: ``stage`` and ``ranks`` (bytes_done, bytes_total, bytes_per_second, eta_seconds, stage). An
        older version goes on serving.
        """
        request = calls.load_request(name, path, version, options)

        def once(remaining: float | None, metadata: tuple[tuple[str, str], ...]) -> Json:
            method: Any = self._channel.unary_stream(
                calls.LOAD, pb.LoadRequest.SerializeToString, response_deserializer=pb.LoadProgress.FromString
            )
            call = method(request, timeout=remaining, metadata=metadata)
            last = pb.LoadProgress()
            try:
                for last in call:
                    if progress is not None:
                        progress(calls.to_dict(last))
            finally:
                call.cancel()  # where progress() raised; a finished call does not mind
            return calls.loaded(last)

        return self._retry(once, timeout, new_request_id())

    def unload(self, name: str, *, timeout: float | None = None) -> None:
        self._unary(calls.UNLOAD, pb.UnloadRequest(name=name), pb.UnloadResponse, timeout)

    def forward(
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
        """Runs the model ``name`` on ``inputs``; returns its outputs (those named in ``outputs``; None: all) by name.

        Inputs are numpy arrays, or torch tensors; outputs are torch tensors if an input was one. numpy outputs are
        views of the received message: read-only, copy one to change it. ``streamed`` sends tensors in pieces; None:
        where the inputs are beyond 1 GiB. Set it for outputs beyond 2 GiB. ``into`` puts
        outputs into arrays of a `shared_memory` region; inputs that lie in one are sent by reference.
        """
        call = calls.forward_call(
            name, inputs, outputs, new_request_id(request_id), version, priority, streamed, into, self._regions
        )
        try:
            return self._forward_once_registered(call, timeout)
        except RequestError as error:
            if not forgotten(error):
                raise
        for region in self._regions.open.values():
            self._register(region)
        return self._forward_once_registered(call, timeout)

    def _forward_once_registered(self, call: calls.ForwardCall, timeout: float | None) -> dict[str, Any]:
        if call.streamed:
            return self._retry(lambda *how: self._stream_once(call, *how), timeout, call.request_id)
        payload = call.encode()
        answer: Buffer = self._retry(
            lambda remaining, metadata: self._forward(payload, timeout=remaining, metadata=metadata),
            timeout,
            call.request_id,
        )
        return call.decode(answer)

    def health(self, *, timeout: float | None = None) -> Json:
        """What the coordinator knows of itself, its models and its ranks; never retried, which would hide the answer.

        Keys: ``serving``, ``reason``, ``generation``, ``coordinator`` {``pid``, ``state``}, ``models`` [{``name``,
        ``version``, ``serving``}], ``ranks`` [{``rank``, ``pid``, ``host``, ``device``, ``state``, ``loads``,
        ``generation``, ``bytes_held``, ``peak_bytes``, ``last_error``}] and more of the same kind.
        """
        answer = self._unary(calls.HEALTH, pb.HealthRequest(), pb.HealthResponse, timeout, RetryPolicy.of(0))
        return calls.to_dict(answer)

    def models(self, *, timeout: float | None = None) -> list[Json]:
        """Every model loaded: name, version, path, serving, inputs, outputs, bytes_per_rank, collectives, ..."""
        answer = self._unary(calls.LIST_MODELS, pb.ListModelsRequest(), pb.ListModelsResponse, timeout)
        return [calls.to_dict(model) for model in answer.models]

    def plan(
        self, path: object, *, ranks: int = 0, device_memory: int = 0, timeout: float | None = None, **options: Any
    ) -> Json:
        """What sharding ``path`` over ``ranks`` (0: the service's own number) would cost, before a weight is read."""
        request = pb.PlanRequest(
            path=str(path), options=calls.load_options(**options), ranks=ranks, device_memory=device_memory
        )
        return calls.plan_answer(self._unary(calls.PLAN, request, pb.PlanResponse, timeout))

    @contextlib.contextmanager
    def shared_memory(self, byte_size: int, prefix: str = DEFAULT_PREFIX) -> Iterator[SharedRegion]:
        """Memory shared with a coordinator on this host, whose ``--enable-shared-memory`` is ``prefix`` or begins it.

        >>> with client.shared_memory(1 << 20) as region:  # doctest: +SKIP
        ...     x, y = region.array((2, 3), np.float32), region.array((2, 3), np.float32)
        ...     x[:] = 1
        ...     client.forward("double", {"x": x}, into={"output": y})
        """
        region = SharedRegion(byte_size, prefix)
        try:
            self._register(region)
            self._regions.open[region.name] = region
            yield region
        finally:
            if self._regions.open.pop(region.name, None) is not None:
                with contextlib.suppress(RequestError):  # it may be gone, and its registrations with it
                    request = pb.UnregisterSharedMemoryRequest(name=region.name)
                    self._unary(calls.UNREGISTER, request, pb.UnregisterSharedMemoryResponse, 5.0)
            region.close()

    def _register(self, region: SharedRegion) -> None:
        with allow_registered():
            self._unary(calls.REGISTER, region.registration(), pb.RegisterSharedMemoryResponse, None)

    def close(self) -> None:
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _stream_once(
        self, call: calls.ForwardCall, remaining: float | None, metadata: tuple[tuple[str, str], ...]
    ) -> dict[str, Any]:
        assembler = stream.Assembler(call)
        method: Any = self._channel.stream_stream(
            calls.FORWARD_STREAM, response_deserializer=pb.ForwardStreamResponse.FromString
        )
        answers = method(stream.requests(call), timeout=remaining, metadata=metadata)
        try:
            for answer in answers:
                if assembler.feed(answer):
                    return assembler.outputs()
        finally:
            answers.cancel()
        raise RequestError(grpc.StatusCode.INTERNAL, "the answer ended early", request_id=call.request_id)

    def _unary(
        self,
        method: str,
        request: Message,
        reply: type[_Reply],
        timeout: float | None,
        policy: RetryPolicy | None = None,
    ) -> _Reply:
        rpc: Any = self._channel.unary_unary(method, type(request).SerializeToString, reply.FromString)
        answer: _Reply = self._retry(
            lambda remaining, metadata: rpc(request, timeout=remaining, metadata=metadata),
            timeout,
            new_request_id(),
            policy,
        )
        return answer

    def _retry(
        self,
        once: Callable[[float | None, tuple[tuple[str, str], ...]], _Answer],
        timeout: float | None,
        request_id: str,
        policy: RetryPolicy | None = None,
    ) -> _Answer:
        attempts = Attempts(policy or self._connection.policy, self._connection.timeout if timeout is None else timeout)
        metadata = self._connection.metadata(request_id)
        while True:
            try:
                return once(attempts.remaining(), metadata)
            except grpc.RpcError as cause:
                error = from_rpc(cause, request_id)
                pause = attempts.pause_after(error)
                if pause is None:
                    raise error from None
            except ValueError as cause:  # a closed channel
                raise RequestError(grpc.StatusCode.CANCELLED, str(cause), request_id=request_id) from None
            time.sleep(pause)
