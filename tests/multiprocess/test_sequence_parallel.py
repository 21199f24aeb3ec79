"""Activations divided along the sequence between sharded regions, over real ranks against the unsharded module."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from tensor_parallel.errors import PlanError
from tensor_parallel.planner import runtime
from tensor_parallel.planner.make import make_plan
from tensor_parallel.wrapper import DistributedModelWrapper
from tests.multiprocess.ranks import Place, on_ranks
from tests.multiprocess.test_wrapper_training import VOCAB, build, loss_of
from tests.multiprocess.training_models import TRANSFORMERS

pytestmark = pytest.mark.timeout(240)


def wrap(place: Place, model: nn.Module, example: dict[str, Tensor], divided: bool = True) -> DistributedModelWrapper:
    return DistributedModelWrapper(
        model, place.world_size, place.rank, example, group=place.group("gloo"), sequence_parallel=divided
    )


def saved_bytes(module: nn.Module, call: Callable[[], Any]) -> int:
    """Bytes of the activations that a forward keeps for its backward."""
    held = {p.untyped_storage().data_ptr() for p in module.parameters()}
    seen: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in held:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        result = call()  # alive while counting: no memory is used twice
    del result
    return sum(seen.values())


def trains_in_rows(place: Place) -> None:
    model, inputs = build(dropout=1e-12)  # drops nothing, and yet is dropout
    wrapper = wrap(place, model.train(), inputs)
    summary, stats = wrapper.plan.summary(), place.group("gloo").stats
    assert (summary["all_reduces"], summary["reduce_scatters"]) == (0, 5)
    for batch, length in ((3, 7), (2, 8), (2, 3)):  # rows that do not divide, and fewer of them than ranks
        ids = torch.randint(0, VOCAB, (batch, length), generator=torch.Generator().manual_seed(length))
        model.zero_grad()
        wrapper.zero_grad()
        before = stats.snapshot()
        logits = wrapper(ids=ids)
        after = stats.snapshot()
        for kind in ("all_reduces", "all_gathers", "reduce_scatters"):
            assert after[kind] - before[kind] == summary[kind], kind
        assert_close(logits, model(ids))
        loss_of(logits, ids).backward()
        loss_of(model(ids), ids).backward()
        whole = dict(model.named_parameters())
        for name, parameter in wrapper.named_parameters():
            want = wrapper.plan.shards[name].take(whole[name].grad, place.rank)
            assert_close(parameter.grad, want, rtol=1e-7, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}")
    if place.world_size == 2:
        wrapper.eval()
        with torch.no_grad():
            assert_close(wrapper(ids=inputs["ids"]), model.eval()(inputs["ids"]))


@pytest.mark.parametrize("world", [2, 4])
def test_rows_give_the_gradients_of_the_unsharded_model(world: int) -> None:
    on_ranks(world, trains_in_rows, timeout=200)


def saves_memory(place: Place) -> tuple[int, int]:
    model, inputs = build(dropout=0.1)
    sizes = []
    for divided in (False, True):
        wrapper = wrap(place, model.train(), inputs, divided)
        ids = torch.randint(0, VOCAB, (4, 32))
        sizes.append(saved_bytes(wrapper, lambda wrapper=wrapper, ids=ids: wrapper(ids=ids)))

    def gradients(call: Callable[[Tensor], Tensor]) -> list[Tensor]:
        wrapper.zero_grad()
        torch.manual_seed(5)
        loss_of(call(inputs["ids"]), inputs["ids"]).backward()
        return [p.grad.clone() for p in wrapper.parameters()]

    plain = gradients(lambda ids: wrapper(ids=ids))
    again = gradients(lambda ids: checkpoint(lambda i: wrapper(ids=i), ids, use_reentrant=False))
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))
    return sizes[0], sizes[1]


def test_fewer_bytes_are_kept_for_the_backward() -> None:
    for whole, rows in on_ranks(2, saves_memory, timeout=200):
        assert rows < 0.9 * whole  # 0.84: what enters a sharded region is kept whole


class Dropped(nn.Module):
    """A sum over ranks, then dropout of what were ones."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 64, bias=False), nn.Linear(64, 8, bias=False)
        self.norm = nn.LayerNorm(8)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        summed = self.down(self.up(self.norm(x)))
        return self.drop(summed * 0.0 + 1.0)


def drops_rows(place: Place) -> Tensor:
    x = torch.randn(2, 64, 8)
    wrapper = wrap(place, Dropped().train(), {"x": x})
    # Halves of one mask of the whole would differ as well: each rank must have drawn for its rows alone.
    drawn = [s.args[0] for s in wrapper.plan.artifact.program.steps if s.fn is runtime.with_rank_seed]
    assert drawn == [runtime.dropout]
    torch.manual_seed(1)
    return wrapper(x=x).detach()


def test_each_rank_draws_the_masks_of_its_own_rows() -> None:
    first, second = on_ranks(2, drops_rows, timeout=200)
    assert torch.equal(first, second)
    assert 0.4 < float((first == 0).float().mean()) < 0.6
    top, bottom = first.chunk(2, 1)
    assert not torch.equal(top, bottom), "both ranks drew the same mask for their own rows"


def test_dropout_after_a_flattened_product_is_divided_too() -> None:
    """As GPT-2 is trained: its products are of rows of the whole batch, and dropout follows each."""
    case = TRANSFORMERS["gpt2"]
    model = case.model(torch.float32)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.1
    plan = make_plan(model, case.batch(torch.float32), 2, training=True, sequence_parallel=True)
    counts = plan.summary()
    assert (counts["all_reduces"], counts["reduce_scatters"], plan.verified) == (0, 5, "whole model")


def test_a_model_without_rows_of_their_own_is_refused() -> None:
    model = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 8), nn.Flatten(0), nn.Softmax(0))
    with pytest.raises(PlanError, match="sequence parallelism"):
        make_plan(model, {"input": torch.randn(3, 8)}, 2, sequence_parallel=True)
    with pytest.raises(PlanError, match="does not export"):
        make_plan(Undecided(), {"x": torch.randn(3, 8)}, 2, sequence_parallel=True)


class Undecided(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) if float(x.sum()) > 0 else x
