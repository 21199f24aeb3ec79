"""What sharded layers do without any peer: initialisation, shapes, validation, copies, and a world of one."""

import copy
import io
import math
import pickle

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from tensor_parallel import ColumnParallelLinear, Group, RowParallelLinear, VocabParallelEmbedding
from tensor_parallel.errors import ConfigError, GroupUnbound, ShapeError
from tensor_parallel.partition import split_offsets, split_range, split_sizes

LINEARS = [RowParallelLinear, ColumnParallelLinear]


@pytest.mark.parametrize("size", [0, 1, 2, 7, 10, 4096])
@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_a_split_covers_everything_in_order_and_is_even_to_within_one(size: int, world_size: int) -> None:
    sizes = split_sizes(size, world_size)
    assert sum(sizes) == size
    assert max(sizes) - min(sizes) <= 1
    ranges = [split_range(size, world_size, rank) for rank in range(world_size)]
    assert ranges == [(start, start + length) for start, length in zip(split_offsets(sizes), sizes, strict=True)]
    assert [len(part) for part in torch.arange(size).tensor_split(world_size)] == list(sizes)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_shards_partition_the_weight_and_hold_nothing_twice(world_size: int) -> None:
    linear = nn.Linear(10, 7)
    rows = [RowParallelLinear.from_linear(linear, world_size, rank) for rank in range(world_size)]
    columns = [ColumnParallelLinear.from_linear(linear, world_size, rank) for rank in range(world_size)]
    assert torch.equal(torch.cat([layer.weight for layer in rows], 0), linear.weight)
    assert torch.equal(torch.cat([layer.bias for layer in rows], 0), linear.bias)
    assert torch.equal(torch.cat([layer.weight for layer in columns], 1), linear.weight)
    assert all(torch.equal(layer.bias, linear.bias) for layer in columns)


@pytest.mark.parametrize("layer", LINEARS)
def test_features_are_the_global_ones_and_uneven_sizes_are_not_padded(layer: type) -> None:
    shards = [layer(10, 7, world_size=3, rank=rank) for rank in range(3)]
    assert {(shard.in_features, shard.out_features) for shard in shards} == {(10, 7)}
    assert sum(shard.weight.numel() for shard in shards) == 70


@pytest.mark.parametrize("layer", LINEARS)
def test_initial_weights_are_in_the_bounds_of_the_whole_layer(layer: type) -> None:
    torch.manual_seed(0)
    shard = layer(256, 512, world_size=4, rank=1)
    bound = 1 / math.sqrt(256)
    assert shard.weight.abs().max() <= bound
    assert_close(shard.weight.std().item(), bound / math.sqrt(3), rtol=0.05, atol=0)
    assert abs(shard.weight.mean().item()) < bound / 20


@pytest.mark.parametrize("layer", LINEARS)
def test_ranks_seeded_alike_draw_different_shards_and_keep_their_generators_alike(layer: type) -> None:
    shards, following = [], []
    for rank in range(3):
        torch.manual_seed(5)
        shards.append(layer(30, 30, world_size=3, rank=rank).weight)
        following.append(torch.rand(()).item())
    assert not torch.equal(shards[0], shards[1])
    assert not torch.equal(shards[1], shards[2])
    assert following[0] == following[1] == following[2]
    torch.manual_seed(5)
    assert torch.equal(layer(30, 30, world_size=3, rank=1).weight, shards[1])


def test_a_replicated_bias_is_equal_on_ranks_seeded_differently() -> None:
    biases = []
    for rank in range(2):
        torch.manual_seed(rank)
        biases.append(ColumnParallelLinear(6, 5, world_size=2, rank=rank).bias)
    assert torch.equal(*biases)


@pytest.mark.parametrize("layer", LINEARS)
def test_initialisation_makes_no_whole_matrix(layer: type) -> None:
    meta = layer(1 << 20, 1 << 20, world_size=8, rank=0, device="meta", dtype=torch.bfloat16)
    assert meta.weight.is_meta
    assert meta.weight.numel() == 1 << 37
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        layer(512, 1024, world_size=8, rank=3)
    allocated = [event.self_cpu_memory_usage for event in profile.key_averages()]
    assert 0 < max(allocated) < 512 * 1024 * 4 // 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("layer", LINEARS)
def test_one_rank_is_nn_linear_without_any_group(layer: type, dtype: torch.dtype) -> None:
    linear = nn.Linear(6, 4, dtype=dtype)
    sharded = layer.from_linear(linear, 1, 0)
    x = torch.randn(3, 6, dtype=dtype)
    assert torch.equal(sharded(x), linear(x))
    assert sharded.weight.dtype == dtype


@pytest.mark.parametrize("layer", LINEARS)
@pytest.mark.parametrize("bias", [True, False])
def test_parameters_have_the_names_of_nn_linear(layer: type, bias: bool) -> None:
    sharded = layer(6, 4, bias, world_size=2, rank=0)
    assert [name for name, _ in sharded.named_parameters()] == [
        name for name, _ in nn.Linear(6, 4, bias).named_parameters()
    ]


@pytest.mark.parametrize("layer", LINEARS)
def test_from_linear_keeps_dtype_mode_and_what_is_frozen(layer: type) -> None:
    linear = nn.Linear(6, 4, dtype=torch.bfloat16).eval()
    linear.weight.requires_grad_(False)
    sharded = layer.from_linear(linear, 2, 1)
    assert sharded.weight.dtype == torch.bfloat16
    assert not sharded.training
    assert not sharded.weight.requires_grad
    assert sharded.bias.requires_grad
    assert sharded.weight.data_ptr() != linear.weight.data_ptr()


@pytest.mark.parametrize("layer", LINEARS)
def test_state_dict_round_trip(layer: type) -> None:
    source, target = (layer(10, 7, world_size=3, rank=1) for _ in range(2))
    target.load_state_dict(source.state_dict())
    assert all(torch.equal(source.state_dict()[name], value) for name, value in target.state_dict().items())
    with pytest.raises(RuntimeError, match="size mismatch"):
        layer(10, 7, world_size=2, rank=1).load_state_dict(source.state_dict())


def test_a_layer_survives_copying_and_pickling() -> None:
    group = Group(0, 2)
    layer = RowParallelLinear(4, 6, world_size=2, rank=0, group=group)
    assert copy.deepcopy(layer).group is group
    restored = pickle.loads(pickle.dumps(layer))  # noqa: S301
    assert torch.equal(restored.weight, layer.weight)
    assert (restored.group.rank, restored.group.world_size, restored.group.bound) == (0, 2, False)
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)


def test_output_rows_need_no_communication() -> None:
    linear = nn.Linear(5, 7, dtype=torch.float64)
    x = torch.randn(4, 5, dtype=torch.float64)
    with torch.no_grad():
        parts = [RowParallelLinear.from_linear(linear, 3, rank, group=Group(rank, 3))(x) for rank in range(3)]
    assert [part.shape[-1] for part in parts] == [3, 2, 2]
    assert_close(torch.cat(parts, -1), linear(x))


@pytest.mark.parametrize(
    ("layer", "options", "wanted"),
    [
        (RowParallelLinear, {}, 10),
        (ColumnParallelLinear, {}, 3),
        (ColumnParallelLinear, {"input_is_parallel": False}, 10),
    ],
)
def test_a_wrong_width_names_both_sizes_and_the_rank(layer: type, options: dict[str, bool], wanted: int) -> None:
    sharded = layer(10, 7, world_size=3, rank=1, group=Group(1, 3), **options)
    with pytest.raises(ShapeError, match=rf"rank 1 of 3 expects a last dimension of {wanted} .* shape \(2, 9\)"):
        sharded(torch.zeros(2, 9))
    with pytest.raises(ValueError, match=r"shape \(\)"):
        sharded(torch.tensor(1.0))


def test_a_whole_input_given_to_a_parallel_input_layer_is_explained() -> None:
    layer = ColumnParallelLinear(10, 7, world_size=2, rank=0, group=Group(0, 2))
    with pytest.raises(ShapeError, match="input_is_parallel=False"):
        layer(torch.zeros(2, 10))


@pytest.mark.parametrize("layer", LINEARS)
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"world_size": 0, "rank": 0}, "world_size"),
        ({"world_size": 2, "rank": 2}, "rank"),
        ({"world_size": 2, "rank": -1}, "rank"),
    ],
)
def test_an_impossible_place_is_refused(layer: type, arguments: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        layer(4, 4, **arguments)


@pytest.mark.parametrize("layer", LINEARS)
def test_impossible_sizes_are_refused(layer: type) -> None:
    with pytest.raises(ConfigError, match="in_features=0"):
        layer(0, 4, world_size=2, rank=0)


def test_a_group_of_another_place_is_refused() -> None:
    with pytest.raises(ConfigError, match="built for rank 0 of 2"):
        RowParallelLinear(4, 4, world_size=2, rank=0, group=Group(1, 2))
    layer = ColumnParallelLinear(4, 4, world_size=2, rank=0)
    with pytest.raises(ConfigError, match="init_tensor_parallel"):
        layer(torch.zeros(1, 2))  # the default group is a world of one


def test_a_group_without_a_backend_is_named() -> None:
    layer = ColumnParallelLinear(4, 4, world_size=2, rank=0, group=Group(0, 2))
    with pytest.raises(GroupUnbound, match="rank 0 of 2"):
        layer(torch.zeros(1, 2))


def test_the_names_are_explained_where_they_are_defined() -> None:
    assert "Megatron-LM" in (RowParallelLinear.__doc__ or "")
    assert "Megatron-LM" in (ColumnParallelLinear.__doc__ or "")
    assert "holds rows 4:7" in repr(RowParallelLinear(5, 7, world_size=2, rank=1))
    assert "holds columns 0:3" in repr(ColumnParallelLinear(5, 7, world_size=2, rank=0))


def test_embedding_of_one_rank_is_nn_embedding() -> None:
    embedding = nn.Embedding(11, 4, padding_idx=2)
    ids = torch.tensor([[0, 2, 10]])
    assert torch.equal(VocabParallelEmbedding.from_embedding(embedding, 1, 0)(ids), embedding(ids))


@pytest.mark.parametrize("padding_idx", [None, 0, 7, -1])
def test_embedding_shards_partition_the_vocabulary(padding_idx: int | None) -> None:
    embedding = nn.Embedding(11, 4, padding_idx=padding_idx)
    shards = [VocabParallelEmbedding.from_embedding(embedding, 3, rank) for rank in range(3)]
    assert torch.equal(torch.cat([shard.weight for shard in shards]), embedding.weight)
    assert {shard.padding_idx for shard in shards} == {embedding.padding_idx}


def test_embedding_initialises_its_padding_row_to_zero_on_the_rank_that_holds_it() -> None:
    shards = [VocabParallelEmbedding(10, 4, padding_idx=7, world_size=2, rank=rank) for rank in range(2)]
    assert not shards[1].weight[2].any()
    assert (torch.cat([shards[0].weight, shards[1].weight]).abs().sum(1) == 0).sum() == 1


@pytest.mark.parametrize("bad", [-1, 11])
def test_an_id_outside_the_vocabulary_is_an_error_and_not_a_row_of_zeros(bad: int) -> None:
    layer = VocabParallelEmbedding(11, 4, world_size=2, rank=0, group=Group(0, 2))
    with pytest.raises(IndexError, match=rf"\[0, 11\), got one of {bad}"):
        layer(torch.tensor([3, bad]))


def test_embedding_refuses_what_it_cannot_do() -> None:
    with pytest.raises(ConfigError, match="max_norm"):
        VocabParallelEmbedding.from_embedding(nn.Embedding(4, 4, max_norm=1.0), 2, 0)
    with pytest.raises(ConfigError, match="padding_idx 9"):
        VocabParallelEmbedding(8, 4, padding_idx=9, world_size=2, rank=0)
    with pytest.raises(ConfigError, match="positive"):
        VocabParallelEmbedding(0, 4, world_size=2, rank=0)


@pytest.mark.parametrize("kind", LINEARS)
def test_from_linear_names_what_is_no_linear(kind) -> None:
    with pytest.raises(TypeError, match=r"linear: an nn\.Linear is needed, not Conv1d"):
        kind.from_linear(nn.Conv1d(4, 4, 1), 2, 0)
