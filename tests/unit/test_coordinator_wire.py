import contextlib

import pytest
from google.protobuf.message import DecodeError
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator import codec, wire
from coordinator.dtypes import DataType
from coordinator.errors import InvalidArgument
from coordinator.types import InferResult, RegionRef, TensorValue
from protos.tensor_parallel.v1 import coordinator_pb2 as pb
from protos.tensor_parallel.v1 import tensor_pb2

INPUTS = {3: {4: wire.ONE}}

tensors = st.builds(
    lambda name, dtype, shape, data: tensor_pb2.Tensor(name=name, dtype=dtype, shape=shape, data=data),
    st.text(max_size=8),
    st.sampled_from([int(dtype) for dtype in DataType]),
    st.lists(st.integers(0, 2**40), max_size=4),
    st.one_of(st.none(), st.binary(max_size=300)),
)
requests = st.builds(
    lambda model, inputs, outputs, request_id, priority: pb.ForwardRequest(
        model=model, inputs=inputs, outputs=outputs, request_id=request_id, priority=priority
    ),
    st.text(max_size=8),
    st.lists(tensors, max_size=4),
    st.lists(st.text(max_size=5), max_size=3),
    st.text(max_size=40),
    st.integers(0, 2**32 - 1),
)


@given(requests)
def test_lifting_takes_the_payloads_out_and_nothing_else(request):
    small, payloads = wire.lift(request.SerializeToString(), INPUTS)
    wanted = [tensor.data if tensor.HasField("data") else None for tensor in request.inputs]
    assert [None if p is None else bytes(p) for p in payloads] == wanted
    for tensor in request.inputs:
        if tensor.HasField("data"):
            tensor.ClearField("content")
    assert pb.ForwardRequest.FromString(small) == request


@given(requests)
def test_payloads_are_views_of_what_arrived(request):
    raw = request.SerializeToString()
    assert all(p is None or p.obj is raw for p in wire.lift(raw, INPUTS)[1])


@given(st.binary(max_size=200))
@settings(max_examples=500)
def test_bytes_that_are_no_message_are_refused_or_read_as_protobuf_reads_them(raw):
    try:
        pb.ForwardRequest.FromString(raw)
        valid = True
    except DecodeError:
        valid = False
    try:
        codec.parse_forward(raw)
    except InvalidArgument:
        return
    assert valid


@given(requests, st.data())
def test_damaged_messages_never_raise_anything_but_invalid_argument(request, data):
    raw = bytearray(request.SerializeToString())
    for _ in range(data.draw(st.integers(0, 4))):
        if raw:
            raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(InvalidArgument):
        codec.parse_forward(bytes(raw[: data.draw(st.integers(0, len(raw)))]))


@pytest.mark.parametrize(
    "raw",
    [b"\x1a", b"\x1a\xff", b"\x1a\x05abc", b"\x1a" + b"\xff" * 11, b"\x1b\x1c", b"\x09abc", b"\x08" + b"\x80" * 12],
)
def test_truncated_and_endless_fields_are_malformed(raw):
    with pytest.raises(wire.Malformed):
        wire.lift(raw, INPUTS)


def test_a_field_in_many_places_is_lifted_from_each():
    request = pb.ForwardStreamRequest(chunk=pb.TensorChunk(request_id="r", tensor="x", data=b"abc"))
    message, payloads = codec.parse_stream(request.SerializeToString())
    assert (message.chunk.tensor, message.chunk.data, bytes(payloads[0])) == ("x", b"", b"abc")
    inputs = [tensor_pb2.Tensor(data=b"1"), tensor_pb2.Tensor()]
    request = pb.ForwardStreamRequest(begin=pb.ForwardRequest(inputs=inputs))
    _, payloads = codec.parse_stream(request.SerializeToString())
    assert [p and bytes(p) for p in payloads] == [b"1", None]


@given(st.integers(0, 2**64 - 1))
def test_varints_are_those_of_protobuf(value):
    if value:
        assert pb.TensorChunk(offset=value).SerializeToString() == b"\x18" + wire.varint(value)


def test_a_response_built_in_pieces_is_the_message():
    data = bytes(range(24))
    result = InferResult(
        "m",
        "2",
        [
            TensorValue("y", DataType.FLOAT32, (2, 3), memoryview(data)),
            TensorValue("empty", DataType.INT64, (0,), b""),
            TensorValue("far", DataType.BFLOAT16, (4,), None, RegionRef("r", 8, 8)),
        ],
        request_id="id",
    )
    response = pb.ForwardResponse.FromString(b"".join(codec.response_pieces(result)))
    assert (response.model, response.version, response.request_id) == ("m", "2", "id")
    assert [tensor.name for tensor in response.outputs] == ["y", "empty", "far"]
    assert response.outputs[0].data == data
    assert list(response.outputs[0].shape) == [2, 3]
    assert response.outputs[1].HasField("data")
    assert response.outputs[2].shared_memory.offset == 8
