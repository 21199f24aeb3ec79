"""Forward in pieces, for tensors that no single message can hold."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import grpc

from coordinator.client import wire
from coordinator.client.arrays import WireTensor, byte_size
from coordinator.client.calls import ForwardCall
from coordinator.client.errors import RequestError
from protos.tensor_parallel.v1 import coordinator_pb2 as pb
from protos.tensor_parallel.v1 import tensor_pb2

# Large enough that a chunk's overhead is nothing, small enough that flow control bounds memory.
CHUNK_BYTES = 4 << 20
_CODES = {code.value[0]: code for code in grpc.StatusCode}


def requests(call: ForwardCall, chunk_bytes: int | None = None) -> Iterator[bytes]:
    """The encoded ForwardStreamRequests of ``call``: `begin`, then the bytes of each tensor larger than one chunk."""
    chunk_bytes = chunk_bytes or CHUNK_BYTES
    begin = pb.ForwardRequest()
    begin.CopyFrom(call.head)
    pieces: list[WireTensor] = []
    for tensor in call.tensors:
        sent = begin.inputs.add(name=tensor.name, dtype=tensor.dtype, shape=tensor.shape)  # type: ignore[arg-type]
        if tensor.shared is not None:
            sent.shared_memory.CopyFrom(tensor.shared)
        elif tensor.data.nbytes > chunk_bytes:
            pieces.append(tensor)
        else:
            sent.data = bytes(tensor.data)
    yield pb.ForwardStreamRequest(begin=begin).SerializeToString()
    for tensor in pieces:
        size = tensor.data.nbytes
        for offset in range(0, size, chunk_bytes):
            stop = min(offset + chunk_bytes, size)
            head = pb.TensorChunk(request_id=call.request_id, tensor=tensor.name, offset=offset, last=stop == size)
            yield wire.encode_chunk(head, tensor.data[offset:stop])


class Assembler:
    """Puts one request's answers together: feed it until it says that it is done, then take the outputs."""

    def __init__(self, call: ForwardCall) -> None:
        self._call = call
        self._metas: dict[str, tensor_pb2.Tensor] = {}
        self._buffers: dict[str, bytearray] = {}
        self._received: dict[str, int] = {}

    def feed(self, answer: pb.ForwardStreamResponse) -> bool:
        """True once nothing more comes. Raises RequestError for an error answer, INTERNAL for one out of order."""
        kind = answer.WhichOneof("kind")
        if kind == "error":
            raise self._error(answer.error)
        if kind == "response":
            for output in answer.response.outputs:
                self._expect(output)
        elif kind == "chunk":
            self._place(answer.chunk)
        return answer.last

    def outputs(self) -> dict[str, Any]:
        """Raises RequestError (INTERNAL) if bytes are missing."""
        for name, buffer in self._buffers.items():
            if self._received[name] != len(buffer):
                raise self._internal(f"output {name!r} came with {self._received[name]} of {len(buffer)} bytes")
        return {name: self._call.output(meta, self._buffers[name]) for name, meta in self._metas.items()}

    def _expect(self, output: tensor_pb2.Tensor) -> None:
        name = output.name
        content = output.WhichOneof("content")
        if content == "shared_memory":
            self._metas[name] = output
            self._buffers[name], self._received[name] = bytearray(), 0
            return
        if content == "data":
            self._buffers[name] = bytearray(output.data)
            self._received[name] = len(output.data)
        else:
            self._buffers[name] = bytearray(byte_size(output.dtype, output.shape))
            self._received[name] = 0
        self._metas[name] = tensor_pb2.Tensor(name=name, dtype=output.dtype, shape=output.shape)

    def _place(self, chunk: pb.TensorChunk) -> None:
        buffer = self._buffers.get(chunk.tensor)
        if buffer is None:
            raise self._internal(f"bytes came for output {chunk.tensor!r}, which was not announced")
        data = chunk.data
        if chunk.offset != self._received[chunk.tensor] or chunk.offset + len(data) > len(buffer):
            raise self._internal(f"output {chunk.tensor!r} came out of order at byte {chunk.offset}")
        buffer[chunk.offset : chunk.offset + len(data)] = data
        self._received[chunk.tensor] += len(data)

    def _error(self, error: pb.Error) -> RequestError:
        retry_after = error.retry_after_milliseconds / 1000 if error.retry_after_milliseconds else None
        code = _CODES.get(error.code, grpc.StatusCode.UNKNOWN)
        return RequestError(code, error.message, request_id=self._call.request_id, retry_after=retry_after)

    def _internal(self, message: str) -> RequestError:
        return RequestError(grpc.StatusCode.INTERNAL, message, request_id=self._call.request_id)
