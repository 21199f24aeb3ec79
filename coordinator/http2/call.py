"""One RPC: from the fields of its request to the trailers of its answer."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any, NoReturn

import grpc
from httpunk import HeaderMap

from coordinator.http2.connection import MAX_HEADER_LIST, Gone, Stream
from coordinator.http2.fields import MalformedField, Metadata, fields_of, message_field, metadata_of, seconds_of
from coordinator.http2.messages import ENCODINGS, IDENTITY, BodyError, Messages, prefix
from coordinator.logging import get_logger

Handler = Any  # grpc.RpcMethodHandler, which is generic in stubs alone

_GRPC = b"application/grpc"
_HEAD = [("content-type", "application/grpc"), ("grpc-accept-encoding", ",".join(name.decode() for name in ENCODINGS))]
_HEAD_MAP = HeaderMap(_HEAD)
_INLINE = 1 << 16  # bytes; a longer message is not copied to stand behind its prefix


@dataclass(frozen=True, slots=True)
class Serving:
    """What all calls of a server share: how a method is found, and the most bytes a message may have."""

    find: Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]]
    limit: int


class Details(grpc.HandlerCallDetails):
    """Of which method, with which metadata."""

    def __init__(self, method: str, invocation_metadata: Metadata) -> None:
        self.method = method
        self.invocation_metadata = invocation_metadata


class Aborted(grpc.aio.AbortError):
    """What ``abort`` raises; the status is in the context."""


class Context(grpc.aio.ServicerContext[Any, Any]):
    """The servicer's view of a call, as ``grpc.aio`` documents it."""

    def __init__(self, call: Call, metadata: Metadata, peer: str, ends: float | None) -> None:
        self._call = call
        self._metadata = metadata
        self._peer = peer
        self._ends = ends
        self.status: tuple[grpc.StatusCode, str] = (grpc.StatusCode.OK, "")
        self.trailing: Metadata = ()
        self.callbacks: list[Callable[[Any], None]] = []
        self.ended = False

    async def abort(
        self, code: grpc.StatusCode, details: str = "", trailing_metadata: Iterable[tuple[str, Any]] = ()
    ) -> NoReturn:
        if code is grpc.StatusCode.OK:
            code, details = grpc.StatusCode.UNKNOWN, "aborted with OK"
        self.status = (code, details)
        if trailing_metadata:
            self.trailing = tuple(trailing_metadata)
        raise Aborted(details)

    async def abort_with_status(self, status: grpc.Status) -> NoReturn:
        await self.abort(status.code, status.details or "", status.trailing_metadata or ())

    async def read(self) -> Any:
        return await anext(self._call.requests, grpc.aio.EOF)

    async def write(self, message: Any) -> None:
        await self._call.write(message)

    async def send_initial_metadata(self, initial_metadata: Iterable[tuple[str, Any]]) -> None:
        self._call.begin(fields_of(initial_metadata))
        self._call.flush()

    def set_trailing_metadata(self, trailing_metadata: Iterable[tuple[str, Any]]) -> None:
        self.trailing = tuple(trailing_metadata)

    def invocation_metadata(self) -> Any:
        return self._metadata

    def set_code(self, code: grpc.StatusCode) -> None:
        self.status = (code, self.status[1])

    def set_details(self, details: str) -> None:
        self.status = (self.status[0], details)

    def set_compression(self, compression: grpc.Compression) -> None:
        """Answers are never compressed."""

    def disable_next_message_compression(self) -> None:
        """Answers are never compressed."""

    def peer(self) -> str:
        return self._peer

    def peer_identities(self) -> None:
        return None

    def peer_identity_key(self) -> None:
        return None

    def auth_context(self) -> Mapping[str, Iterable[bytes]]:
        return {}

    def time_remaining(self) -> float | None:  # type: ignore[override]  # the stub forgets calls without a deadline
        return None if self._ends is None else max(0.0, self._ends - asyncio.get_running_loop().time())

    def trailing_metadata(self) -> Any:
        return self.trailing

    def code(self) -> Any:
        return self.status[0]

    def details(self) -> str:
        return self.status[1]

    def add_done_callback(self, callback: Callable[[Any], None]) -> None:
        self.callbacks.append(callback)

    def cancelled(self) -> bool:
        return self.ended and self.status[0] is grpc.StatusCode.CANCELLED

    def done(self) -> bool:
        return self.ended


class Call:
    """One request of an HTTP/2 connection, answered by ``run``."""

    requests: AsyncIterator[Any]

    def __init__(self, stream: Stream, serving: Serving) -> None:
        self._stream = stream
        self._serving = serving
        self._begun = False
        self._handler: Handler = None
        self._ending: grpc.StatusCode | None = None  # why the task was cancelled, if it was from here

    async def run(self) -> None:
        """Never raises but when its task is cancelled from elsewhere."""
        head = self._stream.head
        fields = head.headers.raw_items()
        named = dict(fields)
        kind = named.get(b"content-type", b"")
        try:
            if head.method != "POST" or not (kind == _GRPC or kind.startswith((_GRPC + b"+", _GRPC + b";"))):
                raise BodyError(grpc.StatusCode.UNKNOWN, "this port speaks gRPC: POST, content-type application/grpc")
            if sum(map(len, chain.from_iterable(fields))) + 32 * len(fields) > MAX_HEADER_LIST:
                message = f"the call's metadata has more than {MAX_HEADER_LIST} bytes"
                raise BodyError(grpc.StatusCode.RESOURCE_EXHAUSTED, message)
            encoding = named.get(b"grpc-encoding", IDENTITY)
            if encoding not in ENCODINGS:
                shown = encoding[:32].decode("latin-1")
                raise BodyError(grpc.StatusCode.UNIMPLEMENTED, f"the compression {shown!r} is not known here")
            timeout = named.get(b"grpc-timeout")
            seconds = None if timeout is None else seconds_of(timeout)
            details = Details(head.path or "", metadata_of(fields))
        except BodyError as error:
            await self._finish((error.code, error.message), ())
        except MalformedField as error:
            await self._finish((grpc.StatusCode.INVALID_ARGUMENT, str(error)), ())
        else:
            await self._timed(details, encoding, seconds)

    async def _timed(self, details: Details, encoding: bytes, seconds: float | None) -> None:
        """Serves until done, until the deadline, or until the client has gone."""
        loop = asyncio.get_running_loop()
        task = asyncio.current_task()
        assert task is not None
        ends = None if seconds is None else loop.time() + seconds
        timer = None if ends is None else loop.call_at(ends, self._cancel, task, grpc.StatusCode.DEADLINE_EXCEEDED)
        context = Context(self, details.invocation_metadata, self._stream.peer, ends)
        self._stream.on_gone = lambda: self._cancel(task, grpc.StatusCode.CANCELLED)
        try:
            if self._stream.gone:
                raise Gone
            await self._serve(details, encoding, context)
        except asyncio.CancelledError:
            if self._ending is None:
                raise
            task.uncancel()
            context.status = (self._ending, "")
            if self._ending is grpc.StatusCode.DEADLINE_EXCEEDED:
                await self._finish((self._ending, "the deadline passed"), ())
        except Gone:
            context.status = (grpc.StatusCode.CANCELLED, "")
        finally:
            self._stream.on_gone = None
            if timer is not None:
                timer.cancel()
            context.ended = True
            for callback in context.callbacks:
                callback(context)

    def _cancel(self, task: asyncio.Task[Any], why: grpc.StatusCode) -> None:
        if self._ending is None:
            self._ending = why
            task.cancel()

    async def _serve(self, details: Details, encoding: bytes, context: Context) -> None:
        last: bytes | None = None
        try:
            handler = self._handler = await self._serving.find(details)
            if handler is None:
                await context.abort(grpc.StatusCode.UNIMPLEMENTED, f"there is no method {details.method}")
            messages = Messages(self._stream.chunk, encoding, self._serving.limit)
            self.requests = self._parsed(messages)
            if handler.request_streaming or handler.response_streaming:
                await self._streamed(handler, messages, context)
            else:
                raw = await messages.only()
                last = self._raw(await handler.unary_unary(self._message(raw), context))
        except Aborted:
            pass
        except BodyError as error:
            context.status = (error.code, error.message)
        except Gone:
            raise
        except Exception as error:
            get_logger().error("internal_error", method=details.method, exc_info=error)
            context.status = (grpc.StatusCode.INTERNAL, "internal error; the server's log has the details")
        await self._finish(context.status, context.trailing, last)

    async def _streamed(self, handler: Handler, messages: Messages, context: Context) -> None:
        asked: Any = self.requests if handler.request_streaming else self._message(await messages.only())
        if not handler.response_streaming:
            await self.write(await handler.stream_unary(asked, context))
            return
        answers = (handler.stream_stream if handler.request_streaming else handler.unary_stream)(asked, context)
        async with contextlib.aclosing(answers):
            async for answer in answers:
                await self.write(answer)

    async def _parsed(self, messages: Messages) -> AsyncIterator[Any]:
        async for raw in messages:
            yield self._message(raw)

    def _message(self, raw: bytes) -> Any:
        parse = self._handler.request_deserializer
        return raw if parse is None else parse(raw)

    def _raw(self, message: Any) -> bytes:
        serialize = self._handler.response_serializer
        raw: bytes = message if serialize is None else serialize(message)
        return raw

    # ---- the answer

    def flush(self) -> None:
        self._stream.flush()

    def begin(self, fields: list[tuple[str, str]]) -> None:
        """Sends the head of an answer with messages, unless that is done."""
        if not self._begun:
            self._begun = True
            self._stream.begin(HeaderMap([*_HEAD, *fields]) if fields else _HEAD_MAP)

    async def write(self, message: Any) -> None:
        """One message of the answer; waits while the client does not read."""
        await self._send(self._raw(message))
        self._stream.flush()

    async def _send(self, raw: bytes) -> None:
        head = prefix(len(raw))
        self.begin([])
        if len(raw) <= _INLINE:
            await self._stream.send(head + raw)
        else:
            await self._stream.send(head)
            await self._stream.send(raw)

    async def _finish(self, status: tuple[grpc.StatusCode, str], trailing: Metadata, last: bytes | None = None) -> None:
        """The end of the answer, behind ``last`` if the status is OK; the whole of it if nothing was sent yet."""
        code, details = status
        trailers = [("grpc-status", str(code.value[0]))]
        if details:
            trailers.append(("grpc-message", message_field(details)))
        if trailing:
            trailers += fields_of(trailing)
        try:
            if last is not None and code is grpc.StatusCode.OK:
                await self._send(last)
            if self._begun:
                self._stream.end(HeaderMap(trailers))
            else:
                self._stream.begin(HeaderMap([*_HEAD, *trailers]), end=True)
            self._stream.flush()
        except BodyError as error:
            await self._finish((error.code, error.message), ())
        except Gone:
            pass
