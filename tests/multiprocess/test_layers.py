"""Sharded layers and small models against the unsharded ones, forward and backward, over real ranks.

A case builds the unsharded module from the seed on every rank, shards it, and compares in float64: outputs, the
gradient of the input, and every shard of every parameter's gradient.
"""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from tensor_parallel import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding, scatter
from tensor_parallel.backends.shm_library import load_library
from tests.multiprocess.ranks import Place, on_ranks

WORLDS = [2, 3, 4]
KINDS = ["gloo", *(["shm"] if load_library() is not None else [])]


def shard_of(place: Place, whole: Tensor, dim: int) -> Tensor:
    return whole.tensor_split(place.world_size, dim)[place.rank]


def both_inputs(*shape: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    x = torch.randn(shape, dtype=dtype)
    return x.clone().requires_grad_(), x.clone().requires_grad_()


def assert_linear_grads(place: Place, layer: nn.Module, linear: nn.Linear, dim: int) -> None:
    assert linear.weight.grad is not None
    assert_close(layer.weight.grad, shard_of(place, linear.weight.grad, dim))
    if linear.bias is not None:
        assert_close(layer.bias.grad, shard_of(place, linear.bias.grad, 0) if dim == 0 else linear.bias.grad)


def row_linear(place: Place, kind: str, shape: tuple[int, ...], out: int, bias: bool, gather: bool) -> None:
    linear = nn.Linear(shape[-1], out, bias, dtype=torch.float64)
    layer = RowParallelLinear.from_linear(
        linear, place.world_size, place.rank, gather_output=gather, group=place.group(kind)
    )
    x, reference = both_inputs(*shape)
    wanted = linear(reference)
    got = layer(x)
    assert_close(got, wanted if gather else shard_of(place, wanted, -1))
    weights = torch.randn_like(wanted)  # the loss weighs each output differently
    (wanted * weights).sum().backward()
    (got * (weights if gather else shard_of(place, weights, -1))).sum().backward()
    assert_close(x.grad, reference.grad)
    assert_linear_grads(place, layer, linear, 0)


def column_linear(place: Place, kind: str, shape: tuple[int, ...], out: int, bias: bool, parallel: bool) -> None:
    linear = nn.Linear(shape[-1], out, bias, dtype=torch.float64)
    group = place.group(kind)
    layer = ColumnParallelLinear.from_linear(
        linear, place.world_size, place.rank, input_is_parallel=parallel, group=group
    )
    x, reference = both_inputs(*shape)
    wanted = linear(reference)
    got = layer(scatter(x, -1, group) if parallel else x)
    assert_close(got, wanted)
    weights = torch.randn_like(wanted)
    (wanted * weights).sum().backward()
    (got * weights).sum().backward()
    assert_close(x.grad, reference.grad)
    assert_linear_grads(place, layer, linear, 1)


class Model(nn.Module):
    """Embedding, residual MLP, normalisation, head: every layer of this package in one model."""

    def __init__(self, embed: nn.Module, up: nn.Module, down: nn.Module, norm: nn.LayerNorm, head: nn.Module) -> None:
        super().__init__()
        self.embed, self.up, self.down, self.norm, self.head = embed, up, down, norm, head
        self.recompute = False

    def mlp(self, x: Tensor) -> Tensor:
        return self.down(functional.gelu(self.up(x)))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        y = checkpoint(self.mlp, x, use_reentrant=False) if self.recompute else self.mlp(x)
        return self.head(self.norm(x + y))


def whole_model(dtype: torch.dtype) -> Model:
    embed, head = nn.Embedding(29, 10, padding_idx=3, dtype=dtype), nn.Linear(10, 29, bias=False, dtype=dtype)
    head.weight = embed.weight
    up, down = nn.Linear(10, 23, dtype=dtype), nn.Linear(23, 10, dtype=dtype)
    return Model(embed, up, down, nn.LayerNorm(10, dtype=dtype), head)


def sharded_model(place: Place, whole: Model, kind: str) -> Model:
    place_ = {"world_size": place.world_size, "rank": place.rank, "group": place.group(kind)}
    embed = VocabParallelEmbedding.from_embedding(whole.embed, **place_)
    head = RowParallelLinear.from_linear(whole.head, gather_output=True, **place_)
    head.weight = embed.weight
    norm = nn.LayerNorm(10, dtype=whole.norm.weight.dtype)
    norm.load_state_dict(whole.norm.state_dict())
    up = RowParallelLinear.from_linear(whole.up, **place_)
    return Model(embed, up, ColumnParallelLinear.from_linear(whole.down, **place_), norm, head)


def compare_parameters(place: Place, sharded: Model, whole: Model, attribute: str) -> None:
    def of(parameter: nn.Parameter) -> Tensor:
        value = parameter.grad if attribute == "grad" else parameter.detach()
        assert value is not None
        return value

    dims = {"embed.weight": 0, "up.weight": 0, "up.bias": 0, "down.weight": 1}
    wanted = dict(whole.named_parameters())
    names = [name for name, _ in sharded.named_parameters()]
    assert names == list(wanted)
    for name, parameter in sharded.named_parameters():
        whole_value = of(wanted[name])
        assert_close(of(parameter), shard_of(place, whole_value, dims[name]) if name in dims else whole_value)


def train(place: Place, kind: str, recompute: bool) -> None:
    """Five AdamW steps with tied embedding and head: same losses, same gradients, same weights."""
    whole = whole_model(torch.float64)
    sharded = sharded_model(place, whole, kind)
    sharded.recompute = recompute
    optimizers = [torch.optim.AdamW(model.parameters(), lr=0.02) for model in (whole, sharded)]
    for _ in range(5):
        ids = torch.randint(0, 29, (4, 6))
        losses = []
        for model, optimizer in zip((whole, sharded), optimizers, strict=True):
            optimizer.zero_grad()
            loss = functional.cross_entropy(model(ids).flatten(0, 1), ids.flatten())
            loss.backward()
            losses.append(loss)
        assert_close(*losses)
        compare_parameters(place, sharded, whole, "grad")
        for optimizer in optimizers:
            optimizer.step()
        compare_parameters(place, sharded, whole, "data")


def inference(place: Place, kind: str) -> dict[str, int | float]:
    whole = whole_model(torch.float64).eval()
    group = place.group(kind)
    sharded = sharded_model(place, whole, kind).eval()
    ids = torch.randint(0, 29, (2, 5))
    group.stats.reset()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert_close(sharded(ids), whole(ids))
    return group.stats.snapshot()


def backward_counts(place: Place, kind: str) -> dict[str, int | float]:
    """Collectives of the backward of an MLP: one all-reduce, as Megatron-LM's."""
    group = place.group(kind)
    options = {"world_size": place.world_size, "rank": place.rank, "group": group}
    up, down = RowParallelLinear(8, 16, **options), ColumnParallelLinear(16, 8, **options)
    y = down(functional.gelu(up(torch.randn(2, 8, requires_grad=True))))
    group.stats.reset()
    y.sum().backward()
    return group.stats.snapshot()


def narrow_dtypes(place: Place, kind: str) -> None:
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.float16, 4e-3), (torch.bfloat16, 3e-2)):
        up, down = nn.Linear(64, 130, dtype=dtype), nn.Linear(130, 64, dtype=dtype)
        options = {"world_size": place.world_size, "rank": place.rank, "group": place.group(kind)}
        x = torch.randn(9, 64, dtype=dtype)
        with torch.no_grad():
            hidden = RowParallelLinear.from_linear(up, **options)(x).relu()
            got = ColumnParallelLinear.from_linear(down, **options)(hidden)
            wanted = down.double()(up.double()(x.double()).relu())
        assert got.dtype == dtype
        assert (got.double() - wanted).norm() / wanted.norm() < tolerance


def extreme_values(place: Place, kind: str) -> None:
    """Large, tiny, infinite and undefined values come out as from the unsharded layer."""
    linear = nn.Linear(12, 5, dtype=torch.float64)
    options = {"world_size": place.world_size, "rank": place.rank, "group": place.group(kind)}
    layer = ColumnParallelLinear.from_linear(linear, input_is_parallel=False, **options)
    x = torch.randn(4, 12, dtype=torch.float64)
    for scale in (1e150, 1e-150):
        assert_close(layer(x * scale), linear(x * scale), rtol=1e-9, atol=0)
    x[0, 0], x[1, 11] = float("inf"), float("nan")
    assert_close(layer(x), linear(x), equal_nan=True)
    half = ColumnParallelLinear.from_linear(nn.Linear(12, 1, bias=False).half(), input_is_parallel=False, **options)
    with torch.no_grad():
        half.weight.fill_(1.0)
        assert half(torch.full((1, 12), 5000.0, dtype=torch.float16)).item() == 60000.0


def same_on_every_rank(place: Place, kind: str) -> bytes:
    options = {"world_size": place.world_size, "rank": place.rank, "group": place.group(kind)}
    layer = ColumnParallelLinear.from_linear(nn.Linear(64, 64), input_is_parallel=False, **options)
    return bytes(layer(torch.randn(32, 64)).detach().numpy().tobytes())


def awkward_inputs(place: Place, kind: str) -> None:
    """Transposed, strided, expanded and empty inputs; one, three and five dimensions; fewer features than ranks."""
    options = {"world_size": place.world_size, "rank": place.rank, "group": place.group(kind)}
    linear = nn.Linear(6, 5, dtype=torch.float64)
    row = RowParallelLinear.from_linear(linear, gather_output=True, **options)
    column = ColumnParallelLinear.from_linear(linear, input_is_parallel=False, **options)
    inputs = [
        torch.randn(6, 4, dtype=torch.float64).t(),
        torch.randn(4, 12, dtype=torch.float64)[:, ::2],
        torch.randn(1, 6, dtype=torch.float64).expand(3, 6),
        torch.randn(0, 6, dtype=torch.float64),
        torch.randn(6, dtype=torch.float64),
        torch.randn(2, 0, 3, 6, dtype=torch.float64),
        torch.randn(2, 1, 3, 2, 6, dtype=torch.float64),
    ]
    for x in inputs:
        for layer in (row, column):
            ours, reference = x.detach().requires_grad_(), x.detach().clone().requires_grad_()
            got, wanted = layer(ours), linear(reference)
            assert_close(got, wanted)
            got.square().sum().backward()
            wanted.square().sum().backward()
            assert_close(ours.grad, reference.grad)


def fewer_features_than_ranks(place: Place, kind: str) -> None:
    options = {"world_size": place.world_size, "rank": place.rank, "group": place.group(kind)}
    up, down = nn.Linear(3, 1, dtype=torch.float64), nn.Linear(1, 2, dtype=torch.float64)
    embedding = nn.Embedding(2, 3, dtype=torch.float64)
    ids = torch.tensor([0, 1, 1])
    sharded = VocabParallelEmbedding.from_embedding(embedding, **options)
    row, column = RowParallelLinear.from_linear(up, **options), ColumnParallelLinear.from_linear(down, **options)
    got, wanted = column(row(sharded(ids))), down(up(embedding(ids)))
    assert_close(got, wanted)
    got.square().sum().backward()
    wanted.square().sum().backward()
    assert_close(row.weight.grad, shard_of(place, up.weight.grad, 0))
    assert_close(column.weight.grad, shard_of(place, down.weight.grad, 1))
    assert_close(sharded.weight.grad, shard_of(place, embedding.weight.grad, 0))


def frozen_and_partial_gradients(place: Place, kind: str) -> None:
    """Frozen weights under a trained input, and a trained weight under a frozen input."""
    options = {"world_size": place.world_size, "rank": place.rank, "group": place.group(kind)}
    linear = nn.Linear(6, 5, dtype=torch.float64).requires_grad_(False)
    layer = RowParallelLinear.from_linear(linear, gather_output=True, **options)
    x, reference = both_inputs(2, 6)
    layer(x).sum().backward()
    linear(reference).sum().backward()
    assert_close(x.grad, reference.grad)
    assert layer.weight.grad is None
    trained = RowParallelLinear(6, 5, gather_output=True, dtype=torch.float64, **options)
    trained(torch.randn(2, 6, dtype=torch.float64)).sum().backward()
    assert trained.weight.grad is not None


def whole_layer_gradcheck(place: Place, kind: str) -> None:
    """The numerical derivative of the sharded MLP itself, every rank perturbing the same replicated input."""
    options = {"world_size": place.world_size, "rank": place.rank, "group": place.group(kind), "dtype": torch.float64}
    up, down = RowParallelLinear(3, 5, **options), ColumnParallelLinear(5, 2, **options)
    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda value: down(torch.tanh(up(value))), (x,))


ROW_CASES = [((4, 8), 8, True), ((4, 7), 10, True), ((2, 3, 5), 7, False)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("world_size", WORLDS)
@pytest.mark.parametrize("gather", [False, True])
@pytest.mark.parametrize(("shape", "out", "bias"), ROW_CASES)
def test_row_parallel_linear(
    kind: str, world_size: int, gather: bool, shape: tuple[int, ...], out: int, bias: bool
) -> None:
    on_ranks(world_size, row_linear, kind, shape, out, bias, gather)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("world_size", WORLDS)
@pytest.mark.parametrize("parallel", [True, False])
@pytest.mark.parametrize(("shape", "out", "bias"), ROW_CASES)
def test_column_parallel_linear(
    kind: str, world_size: int, parallel: bool, shape: tuple[int, ...], out: int, bias: bool
) -> None:
    on_ranks(world_size, column_linear, kind, shape, out, bias, parallel)


@pytest.mark.parametrize("world_size", WORLDS)
@pytest.mark.parametrize("recompute", [False, True], ids=["plain", "checkpointed"])
def test_training_a_whole_model_is_training_the_unsharded_one(world_size: int, recompute: bool) -> None:
    on_ranks(world_size, train, "gloo", recompute)


@pytest.mark.parametrize("world_size", [2, 3])
def test_inference_equals_the_unsharded_model_with_megatrons_collectives(world_size: int) -> None:
    for stats in on_ranks(world_size, inference, "gloo"):
        assert (stats["all_reduces"], stats["all_gathers"]) == (2 * 2, 2 * 1)


def test_the_backward_of_an_mlp_is_one_all_reduce() -> None:
    for stats in on_ranks(2, backward_counts, "gloo"):
        assert (stats["all_reduces"], stats["all_gathers"], stats["reduce_scatters"]) == (1, 0, 0)


@pytest.mark.parametrize("kind", KINDS)
def test_narrow_dtypes_stay_near_the_exact_result(kind: str) -> None:
    on_ranks(2, narrow_dtypes, kind)


@pytest.mark.parametrize("kind", KINDS)
def test_extreme_values(kind: str) -> None:
    on_ranks(2, extreme_values, kind)


@pytest.mark.parametrize("kind", KINDS)
def test_a_replicated_output_has_the_same_bits_on_every_rank(kind: str) -> None:
    first, *others = on_ranks(3, same_on_every_rank, kind)
    assert all(other == first for other in others)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("world_size", [2, 3])
def test_awkward_inputs(kind: str, world_size: int) -> None:
    on_ranks(world_size, awkward_inputs, kind)


@pytest.mark.parametrize("kind", KINDS)
def test_fewer_features_than_ranks(kind: str) -> None:
    on_ranks(3, fewer_features_than_ranks, kind)


def test_frozen_weights_and_frozen_inputs() -> None:
    on_ranks(2, frozen_and_partial_gradients, "gloo")


@pytest.mark.parametrize("world_size", [2, 3])
def test_numerical_derivative_of_a_whole_layer(world_size: int) -> None:
    on_ranks(world_size, whole_layer_gradcheck, "gloo")
