"""One RPC: from the fields of its request to the trailers of its answer."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import grpc
from httpunk import HeaderMap

from coordinator.errors import NO_MEMORY
from coordinator.http2.context import Aborted, Context, Details
from coordinator.http2.fields import MalformedField, Metadata, fields_of, message_field
from coordinator.http2.heads import Heads
from coordinator.http2.messages import ENCODINGS, BodyError, Messages, prefix
from coordinator.http2.stream import Gone, Stream
from coordinator.logging import get_logger
from coordinator.types import Answer, Buffer

Handler = Any  # grpc.RpcMethodHandler, which is generic in stubs alone

_HEAD = [("content-type", "application/grpc"), ("grpc-accept-encoding", ",".join(name.decode() for name in ENCODINGS))]
_HEAD_MAP = HeaderMap(_HEAD)
_OK = ("grpc-status", "0")
_TURN = 100  # messages of one call that are read before others have their turn
_INLINE = 1 << 16  # bytes; a longer message is not copied to stand behind its prefix
_PIECE = 1 << 20  # bytes of it that are copied at a time, and still in a core's cache when they are sent
_BYTES_TURN = 4 << 20  # of an answer that are sent before others have their turn
# Answers that may be on their way in pieces: these stay where they are, in memory that the ranks need, for as long as
# their clients take to read them.
_IN_PIECES = 16


@dataclass(slots=True)
class Serving:
    """What all calls of a server share: how a method is found, the most bytes a message may have, and how many answers
    are on their way in pieces."""

    find: Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]]
    limit: int
    heads: Heads = field(default_factory=Heads)
    in_pieces: int = 0


class Requests:
    """The messages of a request, parsed. Unlike a generator it goes on after a read that was cancelled."""

    def __init__(self, messages: Messages, parse: Callable[[Buffer], Any]) -> None:
        self._messages = messages
        self._parse = parse
        self._read = 0

    def __aiter__(self) -> AsyncIterator[Any]:
        return self

    async def __anext__(self) -> Any:
        self._read += 1
        if not self._read % _TURN:
            await asyncio.sleep(0)  # those that have arrived are read without any wait
        return self._parse(await self._messages.__anext__())


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
        frame = self._stream.head
        try:
            head = self._serving.heads.of(frame.method, frame.headers.raw_items())
        except BodyError as error:
            await self._finish((error.code, error.message), ())
        except MalformedField as error:
            await self._finish((grpc.StatusCode.INVALID_ARGUMENT, str(error)), ())
        else:
            await self._timed(Details(frame.path or "", head.metadata), head.encoding, head.seconds)

    async def _timed(self, details: Details, encoding: bytes, seconds: float | None) -> None:
        """Serves until done, until the deadline, or until the client has gone."""
        loop = asyncio.get_running_loop()
        task = self._stream.task
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
            if self._ending is None:  # the servicer raised it, or the server stops: the client must not wait for ever
                context.status = (grpc.StatusCode.CANCELLED, "")
                await self._finish((grpc.StatusCode.CANCELLED, "the server cancelled the call"), ())
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
            context.finished()

    def _cancel(self, task: asyncio.Task[Any], why: grpc.StatusCode) -> None:
        if self._ending is None:
            self._ending = why
            task.cancel()

    async def _serve(self, details: Details, encoding: bytes, context: Context) -> None:
        last: Answer | None = None
        try:
            handler = self._handler = await self._serving.find(details)
            if handler is None:
                await context.abort(grpc.StatusCode.UNIMPLEMENTED, f"there is no method {details.method}")
            messages = Messages(self._stream.chunk, encoding, self._serving.limit)
            if handler.request_streaming or handler.response_streaming:
                self.requests = Requests(messages, self._message)
                await self._streamed(handler, messages, context)
            else:
                last = self._raw(await handler.unary_unary(self._message(await messages.only()), context))
        except Aborted:
            pass
        except BodyError as error:
            context.status = (error.code, error.message)
        except Gone:
            raise
        except MemoryError as error:
            get_logger().warning("no_memory", method=self._stream.head.path, error=str(error))
            context.status = (grpc.StatusCode.RESOURCE_EXHAUSTED, NO_MEMORY)
        except Exception as error:
            context.status = self._bug(error)
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

    def _message(self, raw: Buffer) -> Any:
        parse = self._handler.request_deserializer
        return raw if parse is None else parse(raw)

    def _raw(self, message: Any) -> Answer:
        serialize = self._handler.response_serializer
        raw: Answer = message if serialize is None else serialize(message)
        if not isinstance(raw, (bytes, bytearray, memoryview, list)):
            raise TypeError(f"the servicer of {self._stream.head.path} answered with {type(raw).__name__}")
        return raw

    def _bug(self, error: Exception) -> tuple[grpc.StatusCode, str]:
        get_logger().error("internal_error", method=self._stream.head.path, exc_info=error)
        return grpc.StatusCode.INTERNAL, "internal error; the server's log has the details"

    # ---- the answer

    @property
    def takes_pieces(self) -> bool:
        return self._serving.in_pieces < _IN_PIECES

    def flush(self) -> None:
        self._stream.flush()

    def begin(self, fields: list[tuple[str, str]]) -> None:
        """Sends the head of an answer with messages, unless that is done."""
        if not self._begun:
            head = HeaderMap([*_HEAD, *fields]) if fields else _HEAD_MAP
            self._begun = True
            self._stream.begin(head)

    async def write(self, message: Any) -> None:
        """One message of the answer; waits while the client does not read."""
        await self._send(self._raw(message))
        self._stream.flush()

    async def _send(self, raw: Answer) -> None:
        if isinstance(raw, bytes) and len(raw) <= _INLINE:
            head = prefix(len(raw))
            self.begin([])
            await self._stream.send(head + raw)
            return
        if not isinstance(raw, list):
            await self._send_pieces([raw])
            return
        self._serving.in_pieces += 1
        try:
            await self._send_pieces(raw)
        finally:
            self._serving.in_pieces -= 1

    async def _send_pieces(self, pieces: list[Buffer]) -> None:
        head = prefix(sum(map(len, pieces)))
        self.begin([])
        await self._stream.send(head)
        sent = 0
        for piece in pieces:
            for start in range(0, len(piece), _PIECE):
                part = bytes(piece[start : start + _PIECE])
                await self._stream.send(part)
                sent += len(part)
                if sent >= _BYTES_TURN:
                    sent = 0
                    await asyncio.sleep(0)  # a client that reads as fast as this sends leaves nothing to wait for

    async def _finish(
        self, status: tuple[grpc.StatusCode, str], trailing: Metadata, last: Answer | None = None
    ) -> None:
        """The end of the answer, behind ``last`` if the status is OK; the whole of it if nothing was sent yet."""
        code, details = status
        fields = [_OK if code is grpc.StatusCode.OK else ("grpc-status", str(code.value[0]))]
        if details:
            fields.append(("grpc-message", message_field(details)))
        try:
            trailers = HeaderMap([*fields, *fields_of(trailing)])
        except (TypeError, ValueError) as error:  # the servicer's metadata cannot be sent
            await self._finish(self._bug(error), ())
            return
        try:
            if last is not None and code is grpc.StatusCode.OK:
                await self._send(last)
            if self._begun:
                self._stream.end(trailers)
            else:
                self._stream.begin(HeaderMap([*_HEAD, *trailers.items()]), end=True)
            self._stream.flush()
        except BodyError as error:
            await self._finish((error.code, error.message), ())
        except Gone:
            pass
