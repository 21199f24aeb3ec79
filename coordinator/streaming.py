"""ForwardStream: many requests on one stream, answered as they finish, tensors in pieces where they are large.

A request whose tensors come without data is put together from the chunks that follow, of which no more are taken than
its shapes announced. Answers beyond INLINE bytes go out in chunks, which is how a tensor passes gRPC's limit of 2 GiB
per message.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass
from typing import Protocol

from coordinator import codec, wire
from coordinator.errors import InvalidArgument, ResourceExhausted, ServiceError, describe
from coordinator.rpc import Call
from coordinator.types import Buffer, InferRequest, InferResult, TensorValue
from protos.tensor_parallel.v1 import coordinator_pb2 as pb

CHUNK = 2 << 20  # bytes in one message of an answer
INLINE = 4 << 20  # an answer up to this size is one message
MAX_OPEN = 64  # requests of one stream that are not answered yet
MAX_ASSEMBLED = 64 << 30  # bytes of one request's tensors
_CHUNK = pb.ForwardStreamResponse.CHUNK_FIELD_NUMBER
_RESPONSE = pb.ForwardStreamResponse.RESPONSE_FIELD_NUMBER


class Runner(Protocol):
    async def run(self, request: InferRequest, call: Call, method: str) -> InferResult: ...


@dataclass(slots=True)
class _Incoming:
    """A request whose chunks are still coming; ``have`` counts the bytes of each tensor in ``missing``."""

    request: InferRequest
    missing: dict[str, TensorValue]
    have: dict[str, int]


async def answer_stream(runner: Runner, messages: AsyncIterator[bytes], call: Call) -> AsyncGenerator[bytes, None]:
    """Answers as they are ready. A failed request is answered in-band; a malformed stream ends with ServiceError."""
    stream = _Stream(runner, call)
    reader = asyncio.create_task(stream.read(messages))
    try:
        while (answer := await stream.answers.get()) is not None:
            yield answer
        await reader
    finally:
        reader.cancel()
        stream.cancel()


class _Stream:
    def __init__(self, runner: Runner, call: Call) -> None:
        self._runner = runner
        self._call = call
        self._incoming: dict[str, _Incoming] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._places = asyncio.Semaphore(MAX_OPEN)
        self.answers: asyncio.Queue[bytes | None] = asyncio.Queue(maxsize=4)

    async def read(self, messages: AsyncIterator[bytes]) -> None:
        try:
            async for raw in messages:
                message, payloads = codec.parse_stream(raw)
                match message.WhichOneof("kind"):
                    case "begin":
                        await self._begin(message.begin, payloads)
                    case "chunk":
                        await self._chunk(message.chunk, payloads[0])
                    case _:
                        raise InvalidArgument("a message of the stream has neither begin nor chunk")
            if self._incoming:
                raise InvalidArgument(f"the stream ended within request {next(iter(self._incoming))!r}")
            await asyncio.gather(*self._tasks)
        finally:
            await self.answers.put(None)

    async def _begin(self, begin: pb.ForwardRequest, payloads: list[memoryview | None]) -> None:
        name = begin.request_id
        if not name:
            raise InvalidArgument("a request on a stream needs a request_id")
        if name in self._incoming:
            raise InvalidArgument(f"request {name!r} began twice")
        try:
            if len(self._incoming) >= MAX_OPEN:
                raise ResourceExhausted(f"{MAX_OPEN} requests of this stream still lack chunks")
            request = codec.request_of(begin, payloads)
            missing = {v.name: v for v in request.inputs if v.data is None and v.region is None and v.byte_size}
            if sum(value.byte_size for value in missing.values()) > MAX_ASSEMBLED:
                raise ResourceExhausted(f"the tensors of request {name!r} are over {MAX_ASSEMBLED} bytes")
            for value in missing.values():
                value.data = bytearray()
        except ServiceError as error:
            await self._fail(name, error)
            return
        if missing:
            self._incoming[name] = _Incoming(request, missing, dict.fromkeys(missing, 0))
        else:
            await self._run(name, request)

    async def _chunk(self, chunk: pb.TensorChunk, data: memoryview | None) -> None:
        incoming = self._incoming.get(chunk.request_id)
        if incoming is None:
            return  # of a request that was refused already
        value = incoming.missing.get(chunk.tensor)
        if value is None:
            raise InvalidArgument(f"request {chunk.request_id!r} expects no chunk of tensor {chunk.tensor!r}")
        have = incoming.have[chunk.tensor]
        piece: Buffer = data if data is not None else b""
        if chunk.offset != have:
            raise InvalidArgument(f"a chunk of {chunk.tensor!r} begins at byte {chunk.offset}, expected {have}")
        if have + len(piece) > value.byte_size:
            raise InvalidArgument(f"the chunks of {chunk.tensor!r} are more than its {value.byte_size} bytes")
        assert isinstance(value.data, bytearray)
        value.data += piece
        incoming.have[chunk.tensor] = have + len(piece)
        if chunk.last or incoming.have[chunk.tensor] == value.byte_size:
            del incoming.missing[chunk.tensor]  # a tensor cut short is found by the check of its bytes
        if not incoming.missing:
            del self._incoming[chunk.request_id]
            await self._run(chunk.request_id, incoming.request)

    async def _run(self, name: str, request: InferRequest) -> None:
        await self._places.acquire()
        task = asyncio.create_task(self._answer(name, request))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _answer(self, name: str, request: InferRequest) -> None:
        try:
            call = Call(name, self._call.deadline, self._call.trace_context)
            result = await self._runner.run(request, call, "ForwardStream")
            for message in messages_of(name, result):
                await self.answers.put(message)
        except Exception as error:
            await self._fail(name, describe(error, name))
        finally:
            self._places.release()

    async def _fail(self, name: str, error: ServiceError) -> None:
        answer = pb.ForwardStreamResponse(request_id=name, last=True)
        answer.error.code = error.code.value[0]
        answer.error.message = error.message
        answer.error.retry_after_milliseconds = error.retry_after_ms or 0
        await self.answers.put(answer.SerializeToString())

    def cancel(self) -> None:
        for task in self._tasks:
            task.cancel()


def messages_of(name: str, result: InferResult) -> list[bytes]:
    """``result`` as one message, or as its description and chunks."""
    size = sum(value.byte_size for value in result.outputs if value.region is None)
    inline = size <= INLINE
    head = pb.ForwardStreamResponse(request_id=name, last=inline).SerializeToString()
    made = [b"".join((head, *wire.nested(_RESPONSE, codec.response_pieces(result, data=inline))))]
    chunked = [] if inline else [value for value in result.outputs if value.region is None and value.byte_size]
    for value in chunked:
        data = wire.flat(value.data or b"")
        for offset in range(0, len(data), CHUNK):
            piece = data[offset : offset + CHUNK]
            ends = offset + len(piece) == len(data)
            chunk = pb.TensorChunk(request_id=name, tensor=value.name, offset=offset, last=ends)
            final = ends and value is chunked[-1]
            head = pb.ForwardStreamResponse(request_id=name, last=final).SerializeToString()
            body = (chunk.SerializeToString(), *wire.payload(pb.TensorChunk.DATA_FIELD_NUMBER, piece))
            made.append(b"".join((head, *wire.nested(_CHUNK, body))))
    return made
