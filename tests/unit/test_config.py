"""Reading and validating the environment, and a process alone."""

import subprocess
import sys

import pytest
import torch

import tensor_parallel
from tensor_parallel import (
    all_gather_concat,
    all_reduce_sum,
    broadcast_tensor,
    default_group,
    destroy_tensor_parallel,
    get_tensor_parallel_config,
    init_tensor_parallel,
    reduce_scatter_sum,
    synchronize_across_ranks,
)
from tensor_parallel.config import read_environment
from tensor_parallel.errors import ConfigError, GroupUnbound, NotInitialized

LAUNCHED = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "0", "MASTER_ADDR": "host", "MASTER_PORT": "2900"}


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch):
    for name in LAUNCHED:
        monkeypatch.delenv(name, raising=False)
    yield
    destroy_tensor_parallel()


def test_the_environment_of_a_launcher_is_read() -> None:
    config = read_environment(LAUNCHED, "gloo")
    assert (config.world_size, config.rank, config.local_rank) == (4, 1, 0)
    assert (config.backend, config.device) == ("gloo", torch.device("cpu"))


def test_a_process_alone_is_a_world_of_one() -> None:
    config = read_environment({}, "gloo")
    assert (config.world_size, config.rank, config.local_rank) == (1, 0, 0)


def test_the_local_rank_defaults_to_the_rank() -> None:
    environment = {name: value for name, value in LAUNCHED.items() if name != "LOCAL_RANK"}
    assert read_environment(environment, "gloo").local_rank == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"RANK": "one"}, "RANK must be an integer, got 'one'"),
        ({"RANK": ""}, "RANK must be an integer, got ''"),
        ({"RANK": "4"}, "RANK=4 must be below WORLD_SIZE=4"),
        ({"RANK": "-1"}, "RANK must be at least 0, got -1"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE must be at least 1, got 0"),
        ({"WORLD_SIZE": "2.5"}, "WORLD_SIZE must be an integer"),
        ({"LOCAL_RANK": "x"}, "LOCAL_RANK must be an integer"),
        ({"MASTER_PORT": "70000"}, "MASTER_PORT must be between 1 and 65535, got 70000"),
        ({"MASTER_PORT": "http"}, "MASTER_PORT must be an integer"),
        ({"RANK": None}, "WORLD_SIZE is set but RANK is not"),
        ({"WORLD_SIZE": None}, "RANK is set but WORLD_SIZE is not"),
        ({"MASTER_ADDR": None}, "MASTER_ADDR must be set"),
        ({"MASTER_PORT": None}, "MASTER_PORT must be set"),
        ({"MASTER_ADDR": ""}, "MASTER_ADDR must be set"),
    ],
)
def test_a_bad_value_is_named(change: dict[str, str | None], message: str) -> None:
    environment = {name: value for name, value in (LAUNCHED | change).items() if value is not None}
    with pytest.raises(ConfigError, match=message):
        read_environment(environment, "gloo")


def test_an_unknown_backend_is_refused_with_the_choices() -> None:
    with pytest.raises(ConfigError, match=r"unknown backend 'mpi': choose one of nccl, gloo, shm, auto"):
        init_tensor_parallel("mpi")


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a CUDA device")
def test_nccl_without_a_gpu_says_what_to_use() -> None:
    with pytest.raises(ConfigError, match=r'needs a CUDA device .* backend="gloo"'):
        init_tensor_parallel()


@pytest.mark.parametrize("backend", ["gloo", "shm", "auto"])
def test_a_world_of_one_forms_no_group_and_communicates_nothing(backend: str) -> None:
    config = init_tensor_parallel(backend)
    assert config == get_tensor_parallel_config()
    assert (config.world_size, config.rank) == (1, 0)
    assert not torch.distributed.is_initialized()
    x = torch.arange(6.0).reshape(2, 3)
    assert torch.equal(all_reduce_sum(x), x)
    assert torch.equal(broadcast_tensor(x), x)
    assert torch.equal(all_gather_concat(x, 1), x)
    assert torch.equal(reduce_scatter_sum(x, 0), x)
    synchronize_across_ranks()
    assert default_group().stats.snapshot()["bytes"] == 0


def test_without_initialising_a_lone_process_is_a_world_of_one() -> None:
    assert torch.equal(all_reduce_sum(torch.ones(2)), torch.ones(2))
    with pytest.raises(NotInitialized, match="init_tensor_parallel"):
        get_tensor_parallel_config()


def test_a_launched_process_that_forgot_to_initialise_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(GroupUnbound, match=r"WORLD_SIZE=2.*init_tensor_parallel"):
        all_reduce_sum(torch.ones(2))


def test_initialising_twice_and_destroying_twice() -> None:
    first = init_tensor_parallel("gloo")
    assert init_tensor_parallel("gloo") is first
    with pytest.raises(ConfigError, match="already initialised with backend 'gloo'"):
        init_tensor_parallel("shm")
    destroy_tensor_parallel()
    destroy_tensor_parallel()
    assert init_tensor_parallel("shm").backend == "shm"


def test_the_public_names_exist() -> None:
    for name in tensor_parallel.__all__:
        if name != "DistributedModelWrapper":  # imported on first use; its own tests cover it
            assert getattr(tensor_parallel, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'Nonsense'"):
        tensor_parallel.Nonsense  # noqa: B018


def test_importing_the_package_does_not_import_torch() -> None:
    """So that a daemon can set NCCL's environment first."""
    code = "import sys, tensor_parallel.nccl_environment as n; print('torch' in sys.modules, len(n.NCCL_ENVIRONMENT))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=50)
    assert result.stdout.split()[0] == "False"


def test_using_layers_leaves_the_planner_alone() -> None:
    code = "import sys; from tensor_parallel import RowParallelLinear; "
    code += "print([m for m in sys.modules if m.startswith(('tensor_parallel.planner', 'tensor_parallel.wrapper'))])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=50)
    assert result.stdout.strip() == "[]"
