"""The handle that outlives its backends."""

import copy
import pickle
from typing import cast

import pytest
import torch

from tensor_parallel import Group
from tensor_parallel.collectives import (
    all_gather_concat,
    all_reduce_sum,
    broadcast_tensor,
    reduce_scatter_sum,
    scatter,
    take_slice,
)
from tensor_parallel.errors import ConfigError, GroupUnbound, ShapeError
from tensor_parallel.group import Backend


class Unreachable:
    """A backend whose collectives must not be reached."""

    name = "unreachable"

    def __init__(self, rank: int, world_size: int) -> None:
        self.rank, self.world_size = rank, world_size


def unreachable(rank: int, world_size: int) -> Backend:
    return cast(Backend, Unreachable(rank, world_size))


@pytest.mark.parametrize(("rank", "world_size"), [(0, 0), (2, 2), (-1, 2)])
def test_an_impossible_place_is_refused(rank: int, world_size: int) -> None:
    with pytest.raises(ConfigError):
        Group(rank, world_size)


def test_binding_and_unbinding() -> None:
    group = Group(0, 2)
    assert not group.bound
    with pytest.raises(GroupUnbound, match="rank 0 of 2"):
        group.all_reduce_sum_(torch.ones(1))
    backend = unreachable(0, 2)
    group.bind(backend)
    assert group.bound
    assert group.backend is backend
    group.unbind()
    with pytest.raises(GroupUnbound):
        group.barrier()


@pytest.mark.parametrize(("rank", "world_size"), [(1, 2), (0, 3)])
def test_the_backend_of_another_place_is_refused(rank: int, world_size: int) -> None:
    with pytest.raises(ConfigError, match=f"rank {rank} of {world_size} to the group of rank 0 of 2"):
        Group(0, 2, unreachable(rank, world_size))


def test_a_group_of_one_is_always_bound_and_counts_nothing() -> None:
    group = Group(0, 1)
    tensor = torch.ones(3)
    assert group.bound
    assert group.all_reduce_sum_(tensor) is tensor
    assert group.exchange_sizes(7, torch.device("cpu")) == (7,)
    group.barrier()
    assert not any(group.stats.snapshot().values())


def test_copies_share_the_group_and_pickles_drop_its_backend() -> None:
    group = Group(1, 2, unreachable(1, 2))
    assert copy.deepcopy(group) is group
    restored = pickle.loads(pickle.dumps(group))  # noqa: S301
    assert (restored.rank, restored.world_size, restored.bound) == (1, 2, False)
    assert "unbound" in repr(restored)


def test_shapes_are_checked_before_anything_is_sent() -> None:
    group = Group(0, 2, unreachable(0, 2))
    x = torch.zeros(4, 6)
    with pytest.raises(ShapeError, match=r"shape \(4, 6\) has no dim 2"):
        all_gather_concat(x, 2, group)
    with pytest.raises(ShapeError, match="3 ranks in a group of 2"):
        all_gather_concat(x, 0, group, sizes=[1, 2, 3])
    with pytest.raises(ShapeError, match=r"rank 0 gathers .* but is said to hold 3"):
        all_gather_concat(x, 0, group, sizes=[3, 4])
    with pytest.raises(ShapeError, match="do not add up"):
        scatter(x, 1, group, sizes=[3, 4])
    with pytest.raises(ShapeError, match="outside dim 0"):
        take_slice(x, 0, (2, 5), group)
    with pytest.raises(ShapeError, match="1 ranks in a group of 2"):
        take_slice(x, 0, [(0, 2)], group)
    with pytest.raises(ConfigError, match=r"source rank must be in \[0, 2\), got 2"):
        broadcast_tensor(x, 2, group)


def test_a_scalar_has_no_dim_to_gather_along() -> None:
    with pytest.raises(ShapeError, match="no dim 0"):
        all_gather_concat(torch.tensor(1.0), 0, Group(0, 2, unreachable(0, 2)))


def test_a_lone_rank_gets_its_tensor_back() -> None:
    tensor = torch.ones(2, requires_grad=True)
    assert all_reduce_sum(tensor, Group(0, 1)) is tensor


@pytest.mark.parametrize("collective", [all_gather_concat, reduce_scatter_sum])
def test_a_group_of_one_refuses_a_dim_that_is_not_there(collective) -> None:
    with pytest.raises(ShapeError, match="has no dim 5"):
        collective(torch.zeros(2, 3), 5, Group(0, 1))
