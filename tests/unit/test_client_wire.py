"""The client's hand-written encodings against protobuf's, and arrays of every type in both directions."""

from __future__ import annotations

import sys
from contextlib import suppress

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.client import Client, InvalidInputError, RequestError, arrays, calls, stream
from coordinator.client.connection import new_request_id
from protos.tensor_parallel.v1 import coordinator_pb2 as pb
from protos.tensor_parallel.v1 import tensor_pb2

NUMPY = [
    "float64", "float32", "float16", "int64", "int32", "int16", "int8", "uint8", "uint16", "uint32", "uint64", "bool",
    ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2,
]  # fmt: skip


def call(inputs, **changes):
    given = {"outputs": None, "request_id": "r", "version": "", "priority": 0, "streamed": None} | changes
    return calls.forward_call("m", inputs, **given)


def through(inputs):
    """What a server that echoes its inputs would have the client return."""
    sent = call(inputs)
    request = pb.ForwardRequest.FromString(sent.encode())
    return request, sent.decode(pb.ForwardResponse(outputs=request.inputs, request_id="r").SerializeToString())


@pytest.mark.parametrize("dtype", NUMPY, ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (5,), (2, 3, 4)], ids=str)
def test_numpy_of_every_type_and_shape_comes_back_bit_for_bit(dtype, shape):
    raw = np.random.default_rng(0).integers(0, 2, (*shape, np.dtype(dtype).itemsize), np.uint8)
    array = np.ascontiguousarray(raw).view(dtype).reshape(shape)
    request, out = through({"x": array})
    assert list(request.inputs[0].shape) == list(shape)
    assert request.inputs[0].data == array.tobytes()
    assert out["x"].dtype == array.dtype
    assert out["x"].shape == shape
    assert out["x"].tobytes() == array.tobytes()


@pytest.mark.parametrize("name", ["float32", "float64", "float16", "bfloat16", "float8_e5m2", "int64", "bool", "uint8"])
@pytest.mark.parametrize("shape", [(), (0, 2), (4, 3)], ids=str)
def test_torch_tensors_go_in_and_come_out(name, shape):
    tensor = torch.randint(0, 2, shape).to(getattr(torch, name)).requires_grad_(name == "float32")
    _, out = through({"x": tensor})
    assert isinstance(out["x"], torch.Tensor)
    assert out["x"].dtype == tensor.dtype
    assert torch.equal(out["x"].float(), tensor.detach().float())
    out["x"].add_(1) if name in ("float32", "int64") else None  # its own, writable memory


def test_outputs_are_numpy_although_torch_is_imported():
    assert isinstance(through({"x": np.ones(2)})[1]["x"], np.ndarray)


@pytest.mark.parametrize(
    "array",
    [
        np.arange(24).reshape(4, 6)[::2, ::-1],
        np.arange(6, dtype=">i4"),
        np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    ],
    ids=["strided", "big-endian", "fortran"],
)
def test_any_layout_is_sent_little_endian_and_row_major(array):
    np.testing.assert_array_equal(through({"x": array})[1]["x"], array)


def test_transposed_torch_tensor():
    tensor = torch.arange(6.0).reshape(2, 3).T
    assert torch.equal(through({"x": tensor})[1]["x"], tensor)


def test_contiguous_arrays_are_not_copied_and_outputs_are_views():
    array = np.arange(4.0)
    (sent,), _ = arrays.to_wire({"x": array})
    array[0] = 7
    assert np.frombuffer(sent.data)[0] == 7
    assert not through({"x": array})[1]["x"].flags.owndata


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (np.array(["a"]), "<U1|str"),
        (np.array([object()]), "object"),
        (np.array([1j]), "complex128"),
        ([[1], [2, 3]], "'x'"),
        (torch.tensor([1j]), "complex64"),
    ],
    ids=["string", "object", "complex", "ragged", "torch complex"],
)
def test_what_is_no_tensor_is_refused_by_name(value, says):
    with pytest.raises(InvalidInputError, match=says) as caught:
        call({"x": value})
    assert caught.value.code().name == "INVALID_ARGUMENT"
    assert "'x'" in caught.value.details()
    assert caught.value.request_id == "r"
    assert isinstance(caught.value, ValueError)


def test_inputs_must_be_named():
    with pytest.raises(InvalidInputError, match="mapping"):
        call([np.ones(2)])
    with pytest.raises(InvalidInputError, match="not a string"):
        call({1: np.ones(2)})
    with pytest.raises(InvalidInputError, match="list of output names"):
        call({"x": np.ones(2)}, outputs="y")


def test_encoding_is_what_protobuf_would_write():
    sent = call({"a": np.arange(3), "b": np.float32(2)}, outputs=["o"], version="4", priority=2)
    expected = pb.ForwardRequest(model="m", version="4", outputs=["o"], request_id="r", priority=2)
    expected.inputs.add(name="a", dtype=tensor_pb2.INT64, shape=[3], data=np.arange(3).tobytes())
    expected.inputs.add(name="b", dtype=tensor_pb2.FLOAT32, data=np.float32(2).tobytes())
    assert pb.ForwardRequest.FromString(sent.encode()) == expected


def test_size_and_shape_that_disagree_are_an_internal_error():
    answer = pb.ForwardResponse()
    answer.outputs.add(name="o", dtype=tensor_pb2.FLOAT32, shape=[2], data=b"12345")
    with pytest.raises(RequestError, match="5 bytes, not 8") as caught:
        call({}).decode(answer.SerializeToString())
    assert caught.value.code().name == "INTERNAL"
    assert caught.value.request_id == "r"


def test_unknown_type_asks_for_an_update():
    answer = pb.ForwardResponse()
    answer.outputs.add(name="o", dtype=99, shape=[1], data=b"1")
    with pytest.raises(RequestError, match="update this client"):
        call({}).decode(answer.SerializeToString())


def test_without_ml_dtypes_bfloat16_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    arrays.numpy_dtype.cache_clear()
    answer = pb.ForwardResponse()
    answer.outputs.add(name="o", dtype=tensor_pb2.BFLOAT16, shape=[1], data=b"12")
    with pytest.raises(RequestError, match="pip install ml_dtypes"):
        call({}).decode(answer.SerializeToString())


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=60) | st.integers(0, 40).map(lambda cut: GOOD[:cut] + b"\xff" + GOOD[cut + 1 :]))
def test_hostile_answers_raise_nothing_but_request_errors(message):
    with suppress(RequestError):
        call({}).decode(message)


GOOD = pb.ForwardResponse(
    model="m",
    outputs=[tensor_pb2.Tensor(name="o", dtype=tensor_pb2.FLOAT32, shape=[2], data=b"12345678")],
    request_id="r",
).SerializeToString()


def test_pieces_cover_every_byte_in_order():
    big, small = np.arange(1000, dtype=np.int32), np.zeros((0, 3), np.float32)
    sent = call({"big": big, "small": small}, streamed=True)
    begin, *rest = [pb.ForwardStreamRequest.FromString(each) for each in stream.requests(sent, chunk_bytes=900)]
    assert [each.WhichOneof("content") for each in begin.begin.inputs] == [None, "data"]
    assert [each.chunk.offset for each in rest] == list(range(0, 4000, 900))
    assert [each.chunk.last for each in rest] == [False] * 4 + [True]
    assert b"".join(each.chunk.data for each in rest) == big.tobytes()


@pytest.mark.parametrize("fault", ["unannounced", "gap", "beyond", "missing"])
def test_pieces_that_do_not_fit_are_an_internal_error(fault):
    assembler = stream.Assembler(call({}))
    answer = pb.ForwardResponse()
    answer.outputs.add(name="o", dtype=tensor_pb2.UINT8, shape=[4])
    assembler.feed(pb.ForwardStreamResponse(response=answer))
    bad = {
        "unannounced": pb.TensorChunk(tensor="p", data=b"1"),
        "gap": pb.TensorChunk(tensor="o", offset=1, data=b"1"),
        "beyond": pb.TensorChunk(tensor="o", data=b"12345"),
        "missing": pb.TensorChunk(tensor="o", data=b"123"),
    }[fault]
    with pytest.raises(RequestError) as caught:  # noqa: PT012 - whichever of the two notices
        assembler.feed(pb.ForwardStreamResponse(chunk=bad, last=True))
        assembler.outputs()
    assert caught.value.code().name == "INTERNAL"


def test_load_options_from_python_values():
    options = calls.load_options(
        kind="hf", dtype="bfloat16", inputs={"x": ("int64", [-1, 8])}, verify=False, max_delay=0.002,
        max_batch_size=4, arguments={"width": 2},
    )  # fmt: skip
    assert options.inputs[0] == tensor_pb2.TensorSpec(name="x", dtype=tensor_pb2.INT64, shape=[-1, 8])
    assert options.HasField("verify")
    assert not options.verify
    assert options.batching.max_delay_microseconds == 2000
    assert options.arguments_json == '{"width": 2}'
    assert not calls.load_options().HasField("verify")


@pytest.mark.parametrize(
    "options", [{"colour": 1}, {"inputs": {"x": ("int7", [1])}}, {"inputs": {"x": 3}}, {"max_batch_size": -1}], ids=str
)
def test_bad_load_options_are_invalid_arguments(options):
    with pytest.raises(InvalidInputError):
        calls.load_request("m", "p", "", options)


def test_dictionaries_have_every_field_and_plain_values():
    model = pb.ModelInfo(name="m", bytes_per_rank=[1 << 40], collectives={"all_reduces": 2})
    model.inputs.add(name="x", dtype=tensor_pb2.INT64, shape=[-1], maximum=7)
    found = calls.to_dict(model)
    assert set(found) == {field.name for field in pb.ModelInfo.DESCRIPTOR.fields}
    assert found["bytes_per_rank"] == [1 << 40]
    assert found["collectives"] == {"all_reduces": 2}
    assert found["inputs"] == [
        {"name": "x", "dtype": "int64", "shape": [-1], "optional": False, "minimum": None, "maximum": 7}
    ]
    assert calls.to_dict(pb.LoadProgress(stage=pb.LoadProgress.READING))["stage"] == "READING"


@pytest.mark.parametrize("given", ["a\nb", "two words", "\u00e9", "x" * 129], ids=ascii)
def test_a_request_id_that_metadata_cannot_carry_is_the_callers_error(given):
    with pytest.raises(InvalidInputError, match="request id"):
        new_request_id(given)
    assert new_request_id("job-7/3") == "job-7/3"


def test_a_token_that_metadata_cannot_carry_is_refused_and_not_shown():
    with pytest.raises(InvalidInputError, match="token") as caught:
        Client("127.0.0.1:1", token="s\u00e9cret\n")
    assert "cret" not in str(caught.value)
