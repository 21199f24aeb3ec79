"""Forward's messages written and read around protobuf's copies.

protobuf copies tensor bytes into the message and again when it serialises; here they are written straight from the
array's memory, and an output's array points into the bytes that gRPC delivered. The small fields still go through
protobuf: concatenated encodings of one message are that message, which is what makes the split legal
(https://protobuf.dev/programming-guides/encoding/#last-one-wins).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeVar, cast

from coordinator.client.arrays import WireTensor
from protos.tensor_parallel.v1 import coordinator_pb2 as pb
from protos.tensor_parallel.v1 import tensor_pb2

_INPUTS = pb.ForwardRequest.INPUTS_FIELD_NUMBER
_OUTPUTS = pb.ForwardResponse.OUTPUTS_FIELD_NUMBER
_DATA = tensor_pb2.Tensor.DATA_FIELD_NUMBER
_CHUNK_DATA = pb.TensorChunk.DATA_FIELD_NUMBER
_Message = TypeVar("_Message", pb.ForwardResponse, tensor_pb2.Tensor)
_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5


def varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def length_field(number: int, size: int) -> bytes:
    """What precedes a length-delimited field: its tag and the ``size`` of its bytes."""
    return varint(number << 3 | _LENGTH) + varint(size)


def encode_forward(head: pb.ForwardRequest, tensors: list[WireTensor]) -> bytes:
    """The encoding of ``head`` with ``tensors`` as its inputs; copies each tensor's bytes once, or not at all."""
    parts: list[bytes | memoryview] = [head.SerializeToString()]
    for tensor in tensors:
        meta = tensor_pb2.Tensor(
            name=tensor.name, dtype=cast(tensor_pb2.DataType, tensor.dtype), shape=tensor.shape
        ).SerializeToString()
        if tensor.shared is not None:
            meta += tensor_pb2.Tensor(shared_memory=tensor.shared).SerializeToString()
            parts += (length_field(_INPUTS, len(meta)), meta)
            continue
        data = length_field(_DATA, tensor.data.nbytes)
        parts += (length_field(_INPUTS, len(meta) + len(data) + tensor.data.nbytes), meta, data, tensor.data)
    return b"".join(parts)


def encode_chunk(head: pb.TensorChunk, data: memoryview) -> bytes:
    """The encoding of a ForwardStreamRequest that is the chunk ``head`` with ``data``."""
    meta = head.SerializeToString()
    prefix = length_field(_CHUNK_DATA, data.nbytes)
    outer = length_field(pb.ForwardStreamRequest.CHUNK_FIELD_NUMBER, len(meta) + len(prefix) + data.nbytes)
    return b"".join((outer, meta, prefix, data))


def decode_forward(message: bytes) -> tuple[pb.ForwardResponse, list[tuple[tensor_pb2.Tensor, memoryview]]]:
    """The response without its outputs, and each output's description with a view of its bytes in ``message``.

    Raises ValueError for bytes that are no such message.
    """
    rest, found = _split(memoryview(message), _OUTPUTS)
    outputs = []
    for view in found:
        meta, data = _split(view, _DATA)
        outputs.append((_parse(tensor_pb2.Tensor, meta), data[-1] if data else memoryview(b"")))
    return _parse(pb.ForwardResponse, rest), outputs


def _parse(kind: type[_Message], encoded: bytes) -> _Message:
    return kind.FromString(encoded)


def _split(view: memoryview, number: int) -> tuple[bytes, list[memoryview]]:
    """The length-delimited fields ``number`` as views, and everything else as it was."""
    rest: list[memoryview] = []
    found: list[memoryview] = []
    for field, wire, start, value, stop in _fields(view):
        if field == number and wire == _LENGTH:
            found.append(view[value:stop])
        else:
            rest.append(view[start:stop])
    return b"".join(rest), found


def _fields(view: memoryview) -> Iterator[tuple[int, int, int, int, int]]:
    """(number, wire type, start of the tag, start of the value, end) of each field."""
    position, end = 0, len(view)
    while position < end:
        start = position
        tag, position = _read_varint(view, position)
        value, wire = position, tag & 7
        if wire == _LENGTH:
            size, value = _read_varint(view, position)
            position = value + size
        elif wire == _VARINT:
            _, position = _read_varint(view, position)
        elif wire in (_FIXED64, _FIXED32):
            position += 8 if wire == _FIXED64 else 4
        else:
            raise ValueError(f"wire type {wire} at byte {start}")
        if position > end:
            raise ValueError(f"the field at byte {start} is longer than its message")
        yield tag >> 3, wire, start, value, position


def _read_varint(view: memoryview, position: int) -> tuple[int, int]:
    value = shift = 0
    while position < len(view) and shift < 70:
        byte = view[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7
    raise ValueError(f"no number ends at byte {position}")
