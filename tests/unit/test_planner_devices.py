"""Planned programs over the tensors of a GPU: fake ones, which have a device and refuse to be mixed with another's.

Models are traced without a GPU, so whatever they make on the way must follow to the device that they later run on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from tensor_parallel.checkpoint import open_source
from tensor_parallel.group import Group
from tensor_parallel.planner import instantiate, make_plan
from tensor_parallel.planner.reserve import skeleton
from tensor_parallel.planner.shard import Shard
from tests import checkpoints

GPU = torch.device("cuda", 3)


class Shapes:
    """A backend that gives results of the right shape, and takes tensors of the GPU alone."""

    name = "shapes"

    def __init__(self, rank: int, world_size: int) -> None:
        self.rank, self.world_size = rank, world_size

    def all_reduce_sum_(self, tensor: Tensor) -> Tensor:
        assert tensor.device == GPU
        return tensor

    def all_gather(self, tensor: Tensor, sizes: Sequence[int], dim: int) -> Tensor:
        return self._sized(tensor, sum(sizes), dim)

    def reduce_scatter_sum(self, tensor: Tensor, sizes: Sequence[int], dim: int) -> Tensor:
        return self._sized(tensor, sizes[self.rank], dim)

    def _sized(self, tensor: Tensor, size: int, dim: int) -> Tensor:
        assert tensor.device == GPU
        assert tensor.is_contiguous()
        return tensor.new_empty([size if axis == dim else was for axis, was in enumerate(tensor.shape)])


def run(model: nn.Module, example: dict[str, Tensor], values: dict[str, Tensor], world_size: int) -> str:
    plan = make_plan(model, example, world_size, gather_outputs=False, verify=False)
    constants = plan.artifact.signature.constants
    real = dict(constants)
    for rank in range(world_size):
        backend = Shapes(rank, world_size) if world_size > 1 else None
        group = Group(rank, world_size, backend)  # type: ignore[arg-type]

        def read(name: str, shard: Shard, rank: int = rank) -> Tensor:
            return torch.empty(shard.local_shape(values[name].shape, rank), dtype=values[name].dtype, device=GPU)

        with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.inference_mode():
            constants.update({name: mode.from_tensor(value) for name, value in real.items()})
            module = instantiate(plan, model, rank=rank, group=group, read=read, device=GPU).eval()
            inputs = {name: torch.empty(value.shape, dtype=value.dtype, device=GPU) for name, value in example.items()}
            outputs = [leaf for leaf in pytree.tree_leaves(module(**inputs)) if isinstance(leaf, Tensor)]
        assert outputs
        assert {value.device for value in (*outputs, *module.parameters(), *module.buffers())} == {GPU}
    return plan.mode


@pytest.mark.parametrize("save", [checkpoints.bert, checkpoints.t5, checkpoints.mixtral])
def test_models_compute_on_the_gpu_alone(save: Callable[[Path], Path], tmp_path: Path) -> None:
    source = open_source(save(tmp_path))
    assert run(source.build_meta(), source.example_inputs(), source.tensors(), 3) == "graph"


SCALE = torch.linspace(0, 1, 12)  # neither a parameter nor a buffer


class Maker(nn.Module):
    """Makes tensors in every way there is."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(12, 30), nn.Linear(30, 12)
        self.table = nn.Embedding(40, 12)
        self.register_buffer("order", torch.randperm(12), persistent=False)

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        length = x.shape[1]
        positions = torch.arange(length, device=x.device)
        causal = torch.full((length, length), float("-inf"), device=x.device).triu(1)
        weights = (causal + torch.zeros(length, length, dtype=x.dtype, device="cpu").to(x.device)).softmax(-1)
        x = x.index_select(-1, self.order) * SCALE.to(x) + torch.tensor([0.5, 2.0], device=x.device).sum()
        x = x + self.table(ids) + positions.unsqueeze(-1) % torch.tensor(7) + torch.ones_like(x)
        x = torch.where(positions.unsqueeze(-1) > 1, x, torch.tensor(0.0))
        return weights @ self.down(torch.relu(self.up(x))) + x.new_tensor([1.0] * 12)


@pytest.mark.parametrize("world_size", [1, 2])
def test_what_a_model_makes_is_made_on_the_gpu(world_size: int) -> None:
    torch.manual_seed(0)
    model = Maker()
    example = {"x": torch.randn(2, 5, 12), "ids": torch.randint(40, (2, 5))}
    values = dict([*model.named_parameters(), *model.named_buffers()])
    assert run(model, example, values, world_size) == "graph"


def test_a_model_on_the_gpu_is_traced_on_the_cpu() -> None:
    """Its parameters stand for CPU tensors while it is: a buffer of the GPU among them would refuse to be traced."""
    with FakeTensorMode():
        model = nn.BatchNorm1d(4, device=GPU)
        model.cached = torch.ones(4, device=GPU)
        twin = skeleton(model)
    assert {buffer.device for buffer in twin.buffers()} == {torch.device("cpu")}
    assert twin.cached.device == torch.device("cpu")
    assert {parameter.device.type for parameter in twin.parameters()} == {"meta"}
    assert {buffer.device for buffer in model.buffers()} == {GPU}


def test_buffers_of_a_model_on_the_cpu_are_not_copied() -> None:
    model = nn.BatchNorm1d(4)
    assert skeleton(model).running_mean is model.running_mean
