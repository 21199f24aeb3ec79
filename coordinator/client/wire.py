"""Forward's messages around protobuf's copies, by `coordinator.wire`.

Tensor bytes are written straight from the array's memory, and an output's array points into the bytes that gRPC
delivered.
"""

from __future__ import annotations

from typing import cast

from coordinator.client.arrays import WireTensor
from coordinator.types import Buffer
from coordinator.wire import ONE, SMALL, lift, nested, payload
from protos.tensor_parallel.v1 import coordinator_pb2 as pb
from protos.tensor_parallel.v1 import tensor_pb2

_INPUTS = pb.ForwardRequest.INPUTS_FIELD_NUMBER
_DATA = tensor_pb2.Tensor.DATA_FIELD_NUMBER
_CHUNK = pb.ForwardStreamRequest.CHUNK_FIELD_NUMBER
_CHUNK_DATA = pb.TensorChunk.DATA_FIELD_NUMBER
_OUTPUT_DATA = {pb.ForwardResponse.OUTPUTS_FIELD_NUMBER: {_DATA: ONE}}


def encode_forward(head: pb.ForwardRequest, tensors: list[WireTensor]) -> bytes:
    """The encoding of ``head`` with ``tensors`` as its inputs; copies each tensor's bytes once, or not at all."""
    pieces: list[Buffer] = [head.SerializeToString()]
    for tensor in tensors:
        dtype = cast(tensor_pb2.DataType, tensor.dtype)
        meta = tensor_pb2.Tensor(name=tensor.name, dtype=dtype, shape=tensor.shape, shared_memory=tensor.shared)
        data = payload(_DATA, tensor.data) if tensor.shared is None else []
        pieces += nested(_INPUTS, (meta.SerializeToString(), *data))
    return b"".join(pieces)


def encode_chunk(head: pb.TensorChunk, data: memoryview) -> bytes:
    """The encoding of a ForwardStreamRequest that is the chunk ``head`` with ``data``."""
    return b"".join(nested(_CHUNK, (head.SerializeToString(), *payload(_CHUNK_DATA, data))))


def decode_forward(message: Buffer) -> list[tuple[tensor_pb2.Tensor, memoryview]]:
    """Each output's description, with a view of its bytes (empty where they are elsewhere).

    Raises ValueError, or protobuf's DecodeError, for bytes that are no ForwardResponse.
    """
    if len(message) < SMALL:
        return [(meta, memoryview(meta.data)) for meta in pb.ForwardResponse.FromString(bytes(message)).outputs]
    rest, found = lift(message, _OUTPUT_DATA)
    outputs = pb.ForwardResponse.FromString(rest).outputs
    return [(meta, data or memoryview(b"")) for meta, data in zip(outputs, found, strict=True)]
