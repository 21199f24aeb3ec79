"""Collectives as functions: values, gradients by the convention of a replicated loss, and what is counted."""

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from tensor_parallel import (
    all_gather_concat,
    all_reduce_sum,
    broadcast_tensor,
    copy_to_ranks,
    reduce_scatter_sum,
    scatter,
    synchronize_across_ranks,
    take_slice,
)
from tests.multiprocess.ranks import Place, on_ranks

WORLDS = [2, 3]


def leaf(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64).requires_grad_()


def values_are_functional(place: Place) -> None:
    """No collective changes its argument, contiguous or not, recorded or not."""
    group = place.group()
    for recorded in (False, True):
        x = torch.arange(12.0).reshape(3, 4).t().requires_grad_(recorded)
        before = x.detach().clone()
        assert_close(all_reduce_sum(x, group), before * place.world_size)
        assert_close(all_gather_concat(x, 0, group), torch.cat([before] * place.world_size))
        assert_close(all_gather_concat(x, -1, group), torch.cat([before] * place.world_size, -1))
        part = before.tensor_split(place.world_size)[place.rank]
        assert_close(reduce_scatter_sum(x, 0, group), part * place.world_size)
        assert_close(scatter(x, 0, group), part)
        assert_close(broadcast_tensor(x * (place.rank + 1), 1, group), before * 2)
        assert torch.equal(x, before)


def in_place(place: Place) -> None:
    x = torch.ones(4)
    assert all_reduce_sum(x, place.group(), in_place=True) is x
    assert x[0] == place.world_size
    y = torch.ones(4, 2).t()
    assert all_reduce_sum(y, place.group(), in_place=True)[0, 0] == place.world_size
    assert y[0, 0] == 1


def uneven_sizes_are_found_out(place: Place) -> None:
    group = place.group()
    group.stats.reset()
    mine = torch.full((2, place.rank), float(place.rank))
    wanted = torch.cat([torch.full((2, rank), float(rank)) for rank in range(place.world_size)], 1)
    assert_close(all_gather_concat(mine, 1, group), wanted)
    assert (group.stats.all_gathers, group.stats.size_exchanges) == (1, 1)
    assert_close(all_gather_concat(mine, 1, group, sizes=range(place.world_size)), wanted)
    assert (group.stats.all_gathers, group.stats.size_exchanges) == (2, 1)


def gradients(place: Place) -> None:
    """A replicated computation written with collectives has the gradients of the plain one, on every rank."""
    group = place.group()
    x = leaf(5, 7)
    reference = x.detach().clone().requires_grad_()
    weights = torch.randn(5, 7, dtype=torch.float64)

    def pieces(index: object) -> Tensor:
        """Each rank squares its part of a replicated x; the parts are put together again."""
        part = take_slice(x, 1, index, group)
        return all_gather_concat(part.square(), 1, group)

    ranges = [(0, 3), (3, 7)] if place.world_size == 2 else [(0, 1), (1, 5), (5, 7)]
    order = torch.tensor([6, 2, 0, 1, 3, 5, 4])
    shuffled = list(order.split([stop - start for start, stop in ranges]))
    (reference.square() * weights).sum().backward()
    for index in (ranges, ranges[place.rank], shuffled, shuffled[place.rank]):
        x.grad = None
        columns = order if isinstance(index, Tensor) or isinstance(index[0], Tensor) else torch.arange(7)
        (pieces(index) * weights[:, columns]).sum().backward()
        assert_close(x.grad, reference.grad)
    x.grad = None
    (all_gather_concat(scatter(x, 1, group).square(), 1, group) * weights).sum().backward()
    assert_close(x.grad, reference.grad)


def sharded_sum(place: Place) -> None:
    """f and g: what each rank contributes to an all-reduce gets the whole gradient, its replicated input their sum."""
    group = place.group()
    x = leaf(4)
    factors = torch.arange(1.0, place.world_size + 1, dtype=torch.float64)
    y = all_reduce_sum(copy_to_ranks(x, group) * factors[place.rank], group)
    assert_close(y, x * factors.sum())
    y.backward(torch.arange(4.0, dtype=torch.float64))
    assert_close(x.grad, torch.arange(4.0, dtype=torch.float64) * factors.sum())


def sequence_parallel(place: Place) -> None:
    """An MLP between all-gather and reduce-scatter along the sequence (Korthikanti et al.) against the plain one."""
    group = place.group()
    world, rank = place.world_size, place.rank
    x, up, down = leaf(7, 4), leaf(6, 4), leaf(4, 6)
    (torch.tanh(x @ up.t()) @ down.t()).sin().sum().backward()
    wanted = [value.grad for value in (x, up, down)]
    sizes = [len(part) for part in torch.arange(7).tensor_split(world)]
    mine = x.detach().tensor_split(world)[rank].clone().requires_grad_()
    my_up = up.detach().tensor_split(world)[rank].clone().requires_grad_()
    my_down = down.detach().tensor_split(world, 1)[rank].clone().requires_grad_()
    whole = all_gather_concat(mine, 0, group, sizes, grad="reduce_scatter")
    y = reduce_scatter_sum(torch.tanh(whole @ my_up.t()) @ my_down.t(), 0, group, sizes)
    y.sin().sum().backward()
    for got, full, dim in ((mine, wanted[0], 0), (my_up, wanted[1], 0), (my_down, wanted[2], 1)):
        assert_close(got.grad, full.tensor_split(world, dim)[rank])


def broadcast_gradient(place: Place) -> None:
    x = leaf(3)
    broadcast_tensor(x, 1, place.group()).sum().backward()
    assert_close(x.grad, torch.full((3,), float(place.rank == 1), dtype=torch.float64))


def second_derivative(place: Place) -> None:
    """Gradients of gradients pass through: sum((x w)^3) over a sharded w."""
    group = place.group()
    x, w = torch.tensor(0.7, dtype=torch.float64, requires_grad=True), torch.tensor([1.0, 2.0, 3.0, 4.0]).double()
    mine = scatter(w, 0, group)
    y = all_reduce_sum((copy_to_ranks(x, group) * mine).pow(3).sum(), group)
    (first,) = torch.autograd.grad(y, x, create_graph=True)
    assert_close(first, 3 * x.detach() ** 2 * w.pow(3).sum())
    (second,) = torch.autograd.grad(first, x)
    assert_close(second, 6 * x.detach() * w.pow(3).sum())


def counted(place: Place) -> dict[str, int | float]:
    group = place.group()
    group.stats.reset()
    x = torch.ones(10, 2)
    all_reduce_sum(x, group)
    all_gather_concat(x, 0, group, sizes=[10] * place.world_size)
    reduce_scatter_sum(x, 0, group)
    broadcast_tensor(x, 0, group)
    synchronize_across_ranks(group)
    copy_to_ranks(x, group)
    scatter(x, 0, group)
    return group.stats.snapshot()


def empty_tensors(place: Place) -> None:
    group = place.group()
    assert all_reduce_sum(torch.zeros(0, 3), group).shape == (0, 3)
    assert all_gather_concat(torch.zeros(0, 3), 1, group).shape == (0, 3 * place.world_size)
    assert all_gather_concat(torch.zeros(0, 3), 0, group).shape == (0, 3)
    assert reduce_scatter_sum(torch.zeros(1, 3), 0, group).shape == (1 if place.rank == 0 else 0, 3)


def rebinding(place: Place) -> None:
    """The group of a layer survives its backends; each generation is a new one."""
    from tensor_parallel import ColumnParallelLinear, Group
    from tensor_parallel.errors import GroupUnbound

    group = Group(place.rank, place.world_size)
    layer = ColumnParallelLinear(
        8, 3, world_size=place.world_size, rank=place.rank, input_is_parallel=False, group=group
    )
    x, results = torch.randn(2, 8), []
    for generation in range(3):
        with pytest.raises(GroupUnbound):
            layer(x)
        backend = place.form("gloo", f"generation{generation}")
        group.bind(backend)
        results.append(layer(x))
        group.unbind()
        backend.close()
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("world_size", WORLDS)
@pytest.mark.parametrize(
    "case",
    [
        values_are_functional,
        uneven_sizes_are_found_out,
        gradients,
        sharded_sum,
        sequence_parallel,
        second_derivative,
        empty_tensors,
    ],
)
def test_collectives(world_size: int, case: object) -> None:
    on_ranks(world_size, case)


@pytest.mark.parametrize("case", [in_place, broadcast_gradient, rebinding])
def test_on_two_ranks(case: object) -> None:
    on_ranks(2, case)


def test_what_is_executed_is_counted() -> None:
    for stats in on_ranks(2, counted):
        assert stats.pop("seconds") > 0
        assert stats == {
            "all_reduces": 1,
            "all_gathers": 1,
            "reduce_scatters": 1,
            "broadcasts": 1,
            "barriers": 1,
            "size_exchanges": 0,
            "bytes": 4 * 80,
        }
