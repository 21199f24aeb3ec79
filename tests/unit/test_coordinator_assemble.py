import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.assemble import assemble, split
from coordinator.commands import Executed
from coordinator.dtypes import DataType, from_numpy
from coordinator.errors import Internal
from coordinator.types import TensorValue
from protos.tensor_parallel.v1 import shard_pb2 as pb


def value(name, array):
    array = np.ascontiguousarray(array)
    return TensorValue(name, from_numpy(array.dtype), array.shape, memoryview(array.tobytes()))


def array(value):
    return np.frombuffer(value.data, value.dtype.storage_dtype).reshape(value.shape)


@given(
    st.integers(1, 4),
    st.lists(st.integers(1, 5), min_size=1, max_size=3),
    st.data(),
)
def test_sharded_outputs_are_put_together_from_any_runs(ranks, shape, data):
    dim = data.draw(st.integers(-len(shape), len(shape) - 1))
    width = data.draw(st.integers(1, 12))
    whole_shape = list(shape)
    whole_shape[dim] = width
    whole = np.arange(np.prod(whole_shape), dtype=np.float32).reshape(whole_shape)
    owners = data.draw(st.lists(st.integers(0, ranks - 1), min_size=width, max_size=width))
    answers, placements = [], []
    for rank in range(ranks):
        held = data.draw(st.permutations([i for i in range(width) if owners[i] == rank]))
        runs = [pb.OutputPlacement.Run(start=i, stop=i + 1) for i in held]
        placements.append({"y": pb.OutputPlacement(name="y", sharded=True, dim=dim, runs=runs)})
        answers.append(Executed([value("y", np.take(whole, held, axis=dim))]))
    (made,) = assemble(answers, placements)
    np.testing.assert_array_equal(array(made), whole)


def test_replicated_outputs_are_rank_0s_own_bytes():
    mine = value("y", np.arange(4.0))
    answers = [Executed([mine]), Executed([])]
    placements = [{"y": pb.OutputPlacement(name="y")}, {}]
    assert assemble(answers, placements)[0].data is mine.data
    assert assemble(answers, [{}, {}])[0] is mine


def test_bfloat16_moves_as_bits():
    half = TensorValue("y", DataType.BFLOAT16, (1, 2), b"\x01\x02\x03\x04")
    placements = [
        {"y": pb.OutputPlacement(name="y", sharded=True, dim=1, runs=[pb.OutputPlacement.Run(start=s, stop=s + 2)])}
        for s in (2, 0)
    ]
    (made,) = assemble([Executed([half]), Executed([half])], placements)
    assert (made.dtype, made.shape, bytes(made.data)) == (DataType.BFLOAT16, (1, 4), b"\x01\x02\x03\x04" * 2)


@pytest.mark.parametrize("second", [Executed([]), None, Executed([value("y", np.zeros((2, 2)))])])
def test_parts_that_do_not_fit_are_our_bug(second):
    runs = [pb.OutputPlacement.Run(start=0, stop=1)], [pb.OutputPlacement.Run(start=1, stop=2)]
    placements = [{"y": pb.OutputPlacement(name="y", sharded=True, dim=1, runs=run)} for run in runs]
    with pytest.raises(Internal, match="rank 1 gave"):
        assemble([Executed([value("y", np.zeros((2, 1)))]), second], placements)


def test_rows_are_split_without_copies():
    outputs = [value("y", np.arange(12.0).reshape(6, 2)), value("z", np.arange(6, dtype=np.int32))]
    parts = split(outputs, [1, 3, 2])
    np.testing.assert_array_equal(array(parts[1][0]), np.arange(2.0, 8.0).reshape(3, 2))
    np.testing.assert_array_equal(array(parts[2][1]), [4, 5])
    assert all(part.data.obj is outputs[0].data.obj for part in (parts[0][0], parts[2][0]))


def test_a_joined_batch_whose_rows_got_lost_is_our_bug():
    with pytest.raises(Internal, match="for a batch of 3 rows"):
        split([value("y", np.zeros((4, 2)))], [1, 2])
