"""Tensors on the wire, and the stream form of the channel."""

from __future__ import annotations

import struct
import threading

import pytest
import torch

from protos.tensor_parallel.v1 import shard_pb2, tensor_pb2
from shardd import tensors
from shardd.channel import PART_BYTES, StreamChannel, whole
from shardd.errors import InvalidRequest


@pytest.mark.parametrize("dtype", list(tensors.WIRE_DTYPES), ids=str)
@pytest.mark.parametrize("shape", [(), (0, 3), (2, 3)])
def test_round_trip(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    value = torch.arange(6).reshape(2, 3).to(dtype) if shape == (2, 3) else torch.ones(shape).to(dtype)
    message = tensors.describe(shard_pb2.ExecuteResult().outputs, "x", value)
    message.data = bytes(tensors.raw(value))
    assert len(message.data) == tensors.byte_size(message) == value.nbytes
    back = whole(message)
    assert back.dtype == dtype
    assert back.shape == value.shape
    assert bytes(tensors.raw(back)) == message.data


def test_every_wire_dtype_has_a_torch_one() -> None:
    assert set(tensors.TORCH_DTYPES) == set(tensor_pb2.DataType.values()) - {0}


@pytest.mark.parametrize(
    "message",
    [
        tensor_pb2.Tensor(name="x", dtype=0, shape=[1]),
        tensor_pb2.Tensor(name="x", dtype=99, shape=[1]),
        tensor_pb2.Tensor(name="x", dtype=tensor_pb2.FLOAT32, shape=[-1]),
        tensor_pb2.Tensor(name="x", dtype=tensor_pb2.FLOAT32, shape=[2**62, 2**62]),
        tensor_pb2.Tensor(name="x", dtype=tensor_pb2.FLOAT32, shape=[1] * 65),
        tensor_pb2.Tensor(name="x", dtype=tensor_pb2.FLOAT32, shape=[2], data=b"1234567"),
        tensor_pb2.Tensor(name="x", dtype=tensor_pb2.FLOAT32, shape=[2], data=b"123456789"),
        tensor_pb2.Tensor(name="x", dtype=tensor_pb2.FLOAT32, shape=[2**40]),
    ],
)
def test_tensors_that_make_no_sense(message: tensor_pb2.Tensor) -> None:
    with pytest.raises(InvalidRequest, match="'x'"):
        whole(message)


@pytest.mark.parametrize("count", [1, 3])
def test_values_whose_bytes_have_the_other_sign_are_sent_as_they_are(count: int) -> None:
    """A view of a conjugate's imaginary part only remembers that it is negated."""
    value = torch.complex(torch.zeros(count), torch.arange(1.0, count + 1)).conj().imag
    assert value.is_neg()
    (host,) = tensors.to_host([value])
    assert struct.unpack(f"{count}f", tensors.copied(host)) == tuple(-float(number) for number in range(1, count + 1))


def test_views_into_a_buffer_keep_to_it() -> None:
    message = tensor_pb2.Tensor(name="x", dtype=tensor_pb2.INT32, shape=[2])
    assert tensors.decode(message, bytearray(range(16)), 8).tolist() == [0x0B0A0908, 0x0F0E0D0C]
    for offset in (9, 12):
        with pytest.raises(InvalidRequest):
            tensors.decode(message, bytearray(16), offset)


def request(seq: int, **command) -> shard_pb2.ChannelRequest:
    return shard_pb2.ChannelRequest(generation=1, seq=seq, **command)


def part(seq: int, name: str, offset: int, data: bytes) -> shard_pb2.ChannelRequest:
    return request(seq, part=shard_pb2.TensorPart(tensor=name, offset=offset, data=data))


def execute(*inputs: tensor_pb2.Tensor) -> shard_pb2.ExecuteModel:
    return shard_pb2.ExecuteModel(model="m", inputs=inputs)


pytestmark = pytest.mark.filterwarnings("ignore:The given buffer is not writable")

X = tensor_pb2.Tensor(name="x", dtype=tensor_pb2.UINT8, shape=[6])


def fed(*requests: shard_pb2.ChannelRequest) -> StreamChannel:
    channel = StreamChannel(1)
    thread = threading.Thread(target=channel.feed, args=(iter(requests),), daemon=True)
    thread.start()
    return channel


def test_parts_are_joined() -> None:
    channel = fed(part(0, "x", 0, b"abc"), part(0, "x", 3, b"def"), request(0, execute=execute(X)))
    command = channel.receive()
    assert bytes(channel.inputs(command.execute)["x"].tolist()) == b"abcdef"
    assert channel.receive() is None
    assert channel.lost


@pytest.mark.parametrize(
    "parts",
    [
        [part(0, "x", 0, b"abc")],
        [part(0, "x", 3, b"def"), part(0, "x", 0, b"abc")],
        [part(0, "x", 0, b"abcdefg")],
        [part(1, "x", 0, b"abcdef")],
        [part(0, "x", 0, b"abcdef"), part(0, "y", 0, b"a")],
    ],
    ids=["short", "out of order", "long", "of another command", "of an unknown input"],
)
def test_parts_that_do_not_fit_fail_the_command_alone(parts: list[shard_pb2.ChannelRequest]) -> None:
    good = tensor_pb2.Tensor(name="x", dtype=tensor_pb2.UINT8, shape=[1], data=b"z")
    channel = fed(*parts, request(0, execute=execute(X)), request(1, execute=execute(good)))
    with pytest.raises(InvalidRequest):
        channel.inputs(channel.receive().execute)
    assert channel.inputs(channel.receive().execute)["x"].tolist() == [ord("z")]


def test_an_input_twice() -> None:
    one = tensor_pb2.Tensor(name="x", dtype=tensor_pb2.UINT8, shape=[1], data=b"z")
    channel = fed(request(0, execute=execute(one, one)))
    with pytest.raises(InvalidRequest, match="twice"):
        channel.inputs(channel.receive().execute)


def test_large_outputs_travel_in_parts() -> None:
    channel = StreamChannel(1)
    big = torch.arange(PART_BYTES + 8, dtype=torch.uint8)
    small = torch.ones(2)
    response = shard_pb2.ChannelResponse(generation=1, seq=0)
    channel.outputs(execute(), response, {"big": big, "small": small})
    channel.reply(response)
    channel.close("done")
    first, second, result, broken = list(channel.answers())
    assert first.part.data + second.part.data == bytes(tensors.raw(big))
    assert (first.part.offset, second.part.offset) == (0, PART_BYTES)
    assert [(output.name, len(output.data)) for output in result.execute.outputs] == [("big", 0), ("small", 8)]
    assert broken.broken.reason == "done"


def test_closing_wakes_a_blocked_receive_and_ends_the_answers() -> None:
    channel = StreamChannel(1)
    got: list[object] = []
    thread = threading.Thread(target=lambda: got.append(channel.receive()))
    thread.start()
    channel.close("fenced")
    channel.close("again")
    thread.join(5)
    assert got == [None]
    assert [answer.broken.reason for answer in channel.answers()] == ["fenced"]
    assert not channel.lost


def test_the_reader_stays_a_command_ahead_and_no_more() -> None:
    taken: list[int] = []

    def source():
        for seq in range(10):
            taken.append(seq)
            yield request(seq, probe=shard_pb2.Probe())

    channel = StreamChannel(1)
    thread = threading.Thread(target=channel.feed, args=(source(),), daemon=True)
    thread.start()
    for seq in range(10):
        assert channel.receive().seq == seq
        assert len(taken) <= seq + 5
    thread.join(5)
    assert channel.receive() is None


def sent(name: str, data: bytes, shape: tuple[int, ...] = (2,), dtype: int = tensor_pb2.FLOAT32) -> tensor_pb2.Tensor:
    return tensor_pb2.Tensor(name=name, dtype=dtype, shape=shape, data=data)


def test_small_inputs_of_one_description_take_turns_in_one_place_and_others_have_their_own() -> None:
    kept = tensors.Kept()
    first = kept.value(sent("x", struct.pack("2f", 1, 2)))
    assert first.tolist() == [1, 2]
    other, turned = kept.value(sent("y", struct.pack("2f", 3, 4))), kept.value(sent("x", bytes(8), (2, 1)))
    assert (first.tolist(), other.tolist(), turned.tolist()) == ([1, 2], [3, 4], [[0], [0]])
    again = kept.value(sent("x", struct.pack("2f", 5, 6)))
    assert again.tolist() == [5, 6]
    assert again.data_ptr() == first.data_ptr()


def test_a_small_input_must_have_its_size_whatever_was_kept() -> None:
    kept = tensors.Kept()
    for _ in range(2):
        with pytest.raises(InvalidRequest, match="needs 8 bytes, 4 came"):
            kept.value(sent("x", bytes(4)))
        with pytest.raises(InvalidRequest, match="came"):
            kept.value(sent("x", bytes(8), (2**40,)))
        assert kept.value(sent("x", bytes(8))).tolist() == [0, 0]


def test_no_more_small_inputs_are_kept_than_a_few() -> None:
    kept = tensors.Kept()
    for size in range(1, 3 * tensors.MOST_KEPT):
        assert kept.value(sent("x", b"\x01" * size, (size,), tensor_pb2.UINT8)).tolist() == [1] * size
    assert len(kept._known) <= tensors.MOST_KEPT
