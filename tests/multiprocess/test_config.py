"""Joining the process's group: launched, by hand, again and again."""

import os

import pytest
import torch
import torch.distributed as dist

from tensor_parallel import (
    RowParallelLinear,
    all_reduce_sum,
    default_group,
    destroy_tensor_parallel,
    get_tensor_parallel_config,
    init_tensor_parallel,
)
from tensor_parallel.backends.shm_library import load_library
from tensor_parallel.errors import ConfigError, GroupUnbound, NotInitialized
from tests.multiprocess.ranks import Place, RankFailed, Ranks, free_port, on_ranks

KINDS = ["gloo", *(["shm", "auto"] if load_library() is not None else [])]


def launched(place: Place, port: int, backend: str) -> str:
    with place.launched(port):
        config = init_tensor_parallel(backend)
        try:
            assert (config.rank, config.world_size, config.local_rank) == (place.rank, place.world_size, place.rank)
            assert get_tensor_parallel_config() == config
            assert dist.is_initialized()
            assert all_reduce_sum(torch.tensor(place.rank + 1.0)).item() == sum(range(1, place.world_size + 1))
            layer = RowParallelLinear(4, 5, world_size=config.world_size, rank=config.rank, gather_output=True)
            assert layer(torch.ones(2, 4)).shape == (2, 5)
            return config.backend
        finally:
            destroy_tensor_parallel()
            assert not dist.is_initialized()


def launched_again_and_again(place: Place, ports: list[int]) -> int:
    for number, port in enumerate(ports):
        launched(place, port, "gloo")
        if number == 1:
            early = len(os.listdir("/proc/self/fd"))
    with pytest.raises(NotInitialized):
        get_tensor_parallel_config()
    return len(os.listdir("/proc/self/fd")) - early


def user_made_group(place: Place) -> None:
    """A group made by hand is found, adopted, and left alone; a later one is found in its turn."""
    for turn in range(2):
        store = place.store(f"by-hand-{turn}")
        dist.init_process_group("gloo", store=store, rank=place.rank, world_size=place.world_size)
        group = default_group()
        assert (group.rank, group.world_size) == (place.rank, place.world_size)
        assert default_group() is group
        assert all_reduce_sum(torch.ones(3))[0] == place.world_size
        assert get_tensor_parallel_config().world_size == place.world_size
        config = init_tensor_parallel("gloo")
        assert config.rank == place.rank
        assert all_reduce_sum(torch.ones(3))[0] == place.world_size
        destroy_tensor_parallel()
        assert dist.is_initialized()
        dist.destroy_process_group()
        with pytest.raises(NotInitialized):
            get_tensor_parallel_config()


def user_made_group_of_another_kind(place: Place) -> None:
    dist.init_process_group("gloo", store=place.store("by-hand"), rank=place.rank, world_size=2)
    with pytest.raises(ConfigError, match="uses 'gloo'"):
        init_tensor_parallel("nccl")
    dist.destroy_process_group()


def forgot_to_initialise(place: Place, port: int) -> None:
    with place.launched(port), pytest.raises(GroupUnbound, match="init_tensor_parallel"):
        default_group()


def failed_initialisation_can_be_repeated(place: Place, port: int) -> None:
    with place.launched(port):
        os.environ["RANK"] = "seven"
        with pytest.raises(ConfigError, match="seven"):
            init_tensor_parallel("gloo")
    launched(place, port, "gloo")


@pytest.mark.parametrize("backend", KINDS)
@pytest.mark.parametrize("world_size", [2, 3])
def test_a_launched_process_joins_its_group(backend: str, world_size: int) -> None:
    names = on_ranks(world_size, launched, free_port(), backend)
    assert names == [{"auto": "shm"}.get(backend, backend)] * world_size


def test_joining_again_on_other_ports_in_the_same_process_leaks_no_descriptor() -> None:
    assert on_ranks(2, launched_again_and_again, [free_port() for _ in range(8)], timeout=50) == [0, 0]


def test_a_group_made_by_hand_is_the_default_group() -> None:
    on_ranks(2, user_made_group)


def test_a_group_made_by_hand_of_another_kind_is_refused() -> None:
    on_ranks(2, user_made_group_of_another_kind)


def test_forgetting_to_initialise_is_an_error_and_no_silent_world_of_one() -> None:
    on_ranks(2, forgot_to_initialise, free_port())


def test_a_failed_initialisation_can_be_repeated() -> None:
    on_ranks(2, failed_initialisation_can_be_repeated, free_port())


def test_a_peer_that_never_comes_ends_in_time() -> None:
    with (
        Ranks(2) as ranks,
        pytest.raises(RankFailed, match=r"(?s)rank 0.*CollectiveTimeout: .*at 127.0.0.1:.*1/2 clients"),
    ):
        ranks.run(_alone_in_a_group_of_two, free_port(), timeout=25)


def _alone_in_a_group_of_two(place: Place, port: int) -> None:
    from datetime import timedelta

    if place.rank == 0:
        with place.launched(port):
            init_tensor_parallel("gloo", timeout=timedelta(seconds=2))
