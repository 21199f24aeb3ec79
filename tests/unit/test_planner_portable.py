"""Plans handed to another process: they run as those that were made there, or are refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.testing import assert_close

from tensor_parallel import Group
from tensor_parallel.errors import NotPortable
from tensor_parallel.planner import instantiate, make_plan, portable
from tensor_parallel.planner.plan import Plan
from tensor_parallel.planner.portable import pack, unpack, unpack_for
from tests.simulated import run_ranks

Inputs = dict[str, Tensor]
WIDTH = 16


class Mlp(nn.Module):
    """With a constant, a free size that must be even, a buffer that changes, and a branch on the inputs."""

    steps: Tensor

    def __init__(self, hidden: int = 48) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(WIDTH, hidden), nn.Linear(hidden, WIDTH)
        self.register_buffer("steps", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.steps += 1
        if x.gt(100).any():
            x = x.clamp_max(100)
        pairs = x.view(x.shape[0], x.shape[1] // 2, 2, WIDTH) * torch.tensor([[1.0], [-math.inf]]).clamp_min(-2)
        return self.down(torch.relu(self.up(pairs))) * self.steps


class Untraceable(Mlp):
    def forward(self, x: Tensor) -> Tensor:
        y = self.down(torch.relu(self.up(x)))
        return y if float(y.sum()) > 0 else -y


def mlp() -> tuple[nn.Module, Inputs, list[Inputs]]:
    torch.manual_seed(1)
    x = torch.randn(2, 6, WIDTH)
    return Mlp(), {"x": x}, [{"x": torch.randn(3, 4, WIDTH)}, {"x": x}]


def text(model: nn.Module) -> tuple[nn.Module, Inputs, list[Inputs]]:
    torch.manual_seed(1)

    def inputs(batch: int, length: int) -> Inputs:
        mask = torch.ones(batch, length, dtype=torch.long)
        mask[0, :2] = 0
        return {"input_ids": torch.randint(3, 90, (batch, length)), "attention_mask": mask}

    return model.eval(), inputs(2, 8), [inputs(2, 8), inputs(3, 11), inputs(1, 5)]


def gpt2() -> tuple[nn.Module, Inputs, list[Inputs]]:
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=100, n_positions=32, use_cache=False)
    return text(transformers.GPT2LMHeadModel(config))


def mixtral() -> tuple[nn.Module, Inputs, list[Inputs]]:
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=1,
        num_local_experts=4,
        vocab_size=100,
        use_cache=False,
    )
    return text(transformers.MixtralForCausalLM(config))


def images() -> tuple[nn.Module, Inputs, list[Inputs]]:
    torch.manual_seed(0)
    config = transformers.ConvNextConfig(depths=[1, 1], hidden_sizes=[16, 32], num_stages=2, patch_size=4)
    model = transformers.ConvNextForImageClassification(config).eval()
    return model, {"pixel_values": torch.randn(2, 3, 32, 32)}, [{"pixel_values": torch.randn(3, 3, 48, 32)}]


def outputs_of(model: nn.Module, plan: Plan, others: list[Plan], inputs: list[Inputs]) -> list[Any]:
    """By rank, of modules that plan nothing themselves."""
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    before = {name: value.detach().clone() for name, value in state.items()}

    def body(group: Group) -> Any:
        module = instantiate(
            plan, model, rank=group.rank, group=group, read=lambda name, shard: shard.take(before[name], group.rank)
        ).eval()
        for other in others:
            module.add_program(other, other.artifact)  # type: ignore[operator]
        module._planner = None  # type: ignore[assignment]
        with torch.inference_mode():
            return [module(**given) for given in inputs]

    return run_ranks(2, body)


@pytest.mark.parametrize("case", [mlp, gpt2, mixtral, images])
def test_a_plan_read_again_is_the_same_and_computes_the_same(
    case: Callable[[], tuple[nn.Module, Inputs, list[Inputs]]],
) -> None:
    model, example, inputs = case()
    plan = make_plan(model, example, 2, gather_outputs=False)
    assert plan.mode == "graph", plan.notes
    [again] = unpack_for(pack([plan]), model, 2, plan.digest())
    assert again == replace(plan, verified="by its peers")
    ours, theirs = outputs_of(model, plan, [], inputs), outputs_of(model, again, [], inputs)
    for have, want in zip(theirs, ours, strict=True):
        assert_close(have, want, rtol=0, atol=0)
    mine, other = plan.artifact.signature, again.artifact.signature
    assert (mine.in_spec, mine.out_spec, mine.sizes) == (other.in_spec, other.out_spec, other.sizes)
    assert list(map(str, mine.guards)) == list(map(str, other.guards))
    for assigned, read in zip(mine.assignments, other.assignments, strict=True):
        assert mine.satisfied(assigned)
        assert other.satisfied(read)


def test_what_a_program_takes_for_granted_is_still_looked_at() -> None:
    model, example, _ = mlp()
    plan = make_plan(model, example, 2)
    [again] = unpack(pack([plan]))
    signature = again.artifact.signature
    assert signature.branches.hold([example["x"]])
    assert not signature.branches.hold([example["x"] + 200])
    _, ids, _ = gpt2()
    [again] = unpack(pack([make_plan(gpt2()[0], ids, 2)]))
    assert again.artifact.signature.admits([ids["attention_mask"], ids["input_ids"]])
    assert not again.artifact.signature.admits([ids["attention_mask"][:, 1:], ids["input_ids"]])


def test_programs_for_other_ways_come_along() -> None:
    model, example, _ = mlp()
    plan = make_plan(model, example, 2)
    module = instantiate(
        plan,
        model,
        rank=0,
        group=Group(0, 2),
        read=lambda name, shard: (
            shard.take(model.get_parameter(name), 0) if not name.endswith("steps") else model.get_buffer(name)
        ),
    ).eval()
    assert module.plan_branches() == 1  # type: ignore[operator]
    [first, *others] = unpack(pack(module.plans()))  # type: ignore[operator]
    assert len(others) == 1
    large = {"x": example["x"] + 200}
    for [got] in outputs_of(model, first, others, [large]):
        with torch.inference_mode():
            assert_close(got, Mlp()(**large), rtol=1e-4, atol=1e-4)


def test_programs_for_training_can_be_handed_on() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, 48), nn.Dropout(0.5), nn.ReLU(), nn.Linear(48, WIDTH))
    plan = make_plan(model, (torch.randn(4, 6, WIDTH),), 2, training=True)
    assert "with_rank_seed" in [getattr(step.fn, "__name__", "") for step in plan.artifact.program.steps]
    [again] = unpack(pack([plan]))
    assert again == plan


def test_a_model_that_was_not_traced_has_a_plan_too() -> None:
    model, (_, example, _) = Untraceable(), mlp()
    plan = make_plan(model, example, 2)
    assert plan.mode == "modules"
    [again] = unpack_for(pack([plan]), model, 2, plan.digest())
    assert again.digest() == plan.digest()


def test_it_must_be_the_plan_of_this_model_and_group() -> None:
    model, example, _ = mlp()
    plan = make_plan(model, example, 2)
    data = pack([plan])
    with pytest.raises(NotPortable, match="not the plan that the other ranks"):
        unpack_for(data, model, 2, make_plan(Mlp(64), example, 2).digest())
    with pytest.raises(NotPortable, match="weights of other sizes"):
        unpack_for(data, Mlp(64), 2, plan.digest())
    with pytest.raises(NotPortable, match="other weights"):
        unpack_for(data, nn.Linear(4, 4), 2, plan.digest())
    with pytest.raises(NotPortable, match="for 2 ranks, not 3"):
        unpack_for(data, model, 3, plan.digest())


def test_a_plan_of_another_build_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model, example, _ = mlp()
    data = pack([make_plan(model, example, 2)])
    monkeypatch.setattr(portable, "_made_by", lambda: "another build")
    with pytest.raises(NotPortable, match="another build"):
        unpack(data)


def test_what_has_no_name_is_not_handed_on() -> None:
    model, example, _ = mlp()
    plan = make_plan(model, example, 2)
    step = plan.artifact.program.steps[0]
    plan.artifact.program.steps[0] = replace(step, fn=lambda *args: args)
    with pytest.raises(NotPortable, match="no name"):
        pack([plan])
    with pytest.raises(NotPortable, match="read from text"):
        pack([Plan.from_json(plan.to_json())])


class Strided(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up = nn.Linear(WIDTH, 48)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(x) * torch.arange(96.0).reshape(2, 48).t()[:, 1]


def test_the_layout_of_a_constant_is_not_lost() -> None:
    plan = make_plan(Strided(), {"x": torch.randn(2, 6, WIDTH)}, 2)
    constants = plan.artifact.signature.constants
    constants["k"] = torch.arange(6.0).reshape(2, 3).t()
    with pytest.raises(NotPortable, match="not contiguous"):
        pack([plan])


def test_what_nobody_verified_stays_so() -> None:
    model, example, _ = mlp()
    plan = make_plan(model, example, 2, verify=False)
    assert [again.verified for again in unpack_for(pack([plan]), model, 2, plan.digest())] == ["no"]
