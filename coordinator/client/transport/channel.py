"""What the client uses in a ``grpc.Channel``'s place."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import grpc
from httpunk import _httpunk as h2

from coordinator.client.connection import Connection
from coordinator.client.transport.address import Address
from coordinator.client.transport.deadline import Deadline
from coordinator.client.transport.failures import CallFailed, Unprocessed
from coordinator.client.transport.pool import Pool
from coordinator.types import Buffer

_CLOSED = "the client is closed"


class Channel:
    """Unary calls over connections of its own, driven by the threads that call; streams over a channel of grpcio,
    which is opened with the first of them. Safe to share between threads."""

    def __init__(self, connection: Connection, address: Address) -> None:
        fields = (
            ("te", "trailers"),
            ("content-type", "application/grpc"),
            ("user-agent", f"grpc-python-httpunk/{h2.__version__}"),
            ("grpc-accept-encoding", "identity"),
        )
        self._connection = connection
        self._pool = Pool(address, fields)
        self._lock = threading.Lock()
        self._streams: grpc.Channel | None = None

    def unary_unary(
        self,
        method: str,
        request_serializer: Callable[[Any], Buffer] | None = None,
        response_deserializer: Callable[[Any], Any] | None = None,
    ) -> Callable[..., Any]:
        """The call is a function of the request, ``timeout`` and ``metadata``, as grpcio's.

        Without a deserializer it returns the answer's bytes as a read-only memoryview. It raises a ``grpc.RpcError``,
        or ValueError once the channel is closed.
        """

        def call(request: Any, *, timeout: float | None = None, metadata: tuple[tuple[str, str], ...] = ()) -> Any:
            message = request if request_serializer is None else request_serializer(request)
            answer = self._call(method, message, metadata, Deadline(timeout))
            return answer if response_deserializer is None else response_deserializer(answer)

        return call

    def unary_stream(self, *how: Any, **more: Any) -> Any:
        return self._grpc().unary_stream(*how, **more)

    def stream_stream(self, *how: Any, **more: Any) -> Any:
        return self._grpc().stream_stream(*how, **more)

    def close(self) -> None:
        """Ends the calls that run: they raise ValueError."""
        self._pool.close()
        with self._lock:
            if self._streams is not None:
                self._streams.close()

    def _call(
        self, method: str, message: Buffer, metadata: tuple[tuple[str, str], ...], deadline: Deadline
    ) -> memoryview:
        if self._pool.closed:
            raise ValueError(_CLOSED)
        try:
            deadline.remaining()
            try:
                return self._once(method, message, metadata, deadline, fresh=False)
            except Unprocessed:  # where that happens again, it is for the caller to know
                return self._once(method, message, metadata, deadline, fresh=True)
        except CallFailed:
            if self._pool.closed:
                raise ValueError(_CLOSED) from None
            raise

    def _once(
        self, method: str, message: Buffer, metadata: tuple[tuple[str, str], ...], deadline: Deadline, *, fresh: bool
    ) -> memoryview:
        session = self._pool.take(deadline, fresh=fresh)
        try:
            answer = session.call(method, message, metadata, deadline)
        except BaseException:
            self._pool.drop(session)
            raise
        self._pool.give_back(session)
        return answer.message()

    def _grpc(self) -> grpc.Channel:
        with self._lock:
            if self._pool.closed:
                raise ValueError(_CLOSED)
            if self._streams is None:
                self._streams = grpc.insecure_channel(self._connection.target, self._connection.options)
            return self._streams
