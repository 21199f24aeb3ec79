"""Plans handed to another process: they run as those that were made there, or are refused."""

from __future__ import annotations

import gc
import json
import math
import random
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn
from torch.testing import assert_close

from tensor_parallel import Group, planned
from tensor_parallel.checkpoint import Source, open_source
from tensor_parallel.errors import NotPortable
from tensor_parallel.planner import instantiate, make_plan, portable
from tensor_parallel.planner.plan import Plan
from tensor_parallel.planner.portable import pack, unpack, unpack_for
from tensor_parallel.serving import ServedModel, load_model
from tests import checkpoints
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


def test_only_what_was_packed_is_a_plan() -> None:
    model, example, _ = mlp()
    data = pack([make_plan(model, example, 2)])
    numbers = random.Random(0)
    for _ in range(200):
        at = numbers.randrange(len(data))
        changed = data[:at] + bytes([data[at] ^ (1 << numbers.randrange(8))]) + data[at + 1 :]
        with pytest.raises(NotPortable):
            unpack(changed)
    for length in (0, 8, 40, len(data) - 1):
        with pytest.raises(NotPortable):
            unpack(data[:length])


def edited(data: bytes, edit: Callable[[dict[str, Any]], None]) -> bytes:
    """A document that was changed by somebody who can seal it."""
    content = data[portable._SEAL :]
    size = int.from_bytes(content[:8], "little")
    document = json.loads(json.loads(content[8 : 8 + size])["__metadata__"][portable._KEY])
    edit(document)
    return portable._sealed(save_tensors(load_tensors(content), {portable._KEY: json.dumps(document)}))


@pytest.mark.parametrize(
    "function",
    [
        ["operator", "aten.from_file.default"],
        ["operator", "aten.from_file.out"],
        ["operator", "aten.add_.Tensor"],
        ["operator", "aten.set_.source_Tensor"],
        ["operator", "c10d.barrier.default"],
        ["operator", "debugprims.load_tensor.default"],
        ["operator", "load_library.default.x"],
        ["operator", "aten.no_such_operator.default"],
        ["operator", "aten.add"],
        ["library", "torch", "load"],
        ["library", "operator", "call"],
        ["library", "os", "system"],
        ["own", "os", "system"],
        ["own", "tensor_parallel.planner.runtime", "torch"],
        ["own", "tensor_parallel.planner.rules.registry", "Any"],
        ["collective", "Step", []],
        ["collective", "AllReduce", [1, 2, 3]],
        ["eval", "1"],
        [],
        None,
    ],
)
def test_a_program_calls_what_programs_may_call(function: Any) -> None:
    model, example, _ = mlp()
    plan = make_plan(model, example, 2)

    def edit(document: dict[str, Any]) -> None:
        document["plans"][0]["program"]["steps"][0][0] = {"function": function}

    with pytest.raises(NotPortable):
        unpack(edited(pack([plan]), edit))


INJECTED = "0\n    import os; os.environ['INJECTED'] = 'yes'"


def give_an_input_another_name(program: dict[str, Any], _: dict[str, Any]) -> None:
    program["inputs"][0] = INJECTED


def give_a_state_another_name(program: dict[str, Any], _: dict[str, Any]) -> None:
    program["states"] = dict.fromkeys(program["states"], INJECTED)


def name_an_argument(program: dict[str, Any], _: dict[str, Any]) -> None:
    program["steps"][0][2] = {INJECTED: 1}


def name_a_step(program: dict[str, Any], _: dict[str, Any]) -> None:
    program["steps"][0][3] = INJECTED


def import_a_module(_: dict[str, Any], signature: dict[str, Any]) -> None:
    enumeration = {"__enum__": True, "fqn": "antigravity:Any", "name": "x"}
    spec = {"type": "builtins.dict", "context": json.dumps([enumeration]), "children_spec": []}
    signature["in_spec"] = json.dumps([1, spec])


def wire_other_weights(program: dict[str, Any], _: dict[str, Any]) -> None:
    names = list(program["states"])
    program["states"] = dict(zip(names, reversed(list(program["states"].values())), strict=True))


def compute_for_ever(_: dict[str, Any], signature: dict[str, Any]) -> None:
    signature["guards"] = [["Eq", ["Pow", 10, ["Pow", 10, 9]], 1]]


def compute_large_numbers(_: dict[str, Any], signature: dict[str, Any]) -> None:
    power: Any = 9
    for _ in range(40):
        power = ["Pow", power, 16]
    signature["guards"] = [["Eq", power, 1]]


@pytest.mark.parametrize(
    "change",
    [
        give_an_input_another_name,
        give_a_state_another_name,
        name_an_argument,
        name_a_step,
        import_a_module,
        wire_other_weights,
        compute_for_ever,
        compute_large_numbers,
    ],
)
def test_a_plan_is_no_code(change: Callable[[dict[str, Any], dict[str, Any]], None]) -> None:
    model, example, _ = mlp()
    plan = make_plan(model, example, 2)

    def edit(document: dict[str, Any]) -> None:
        change(document["plans"][0]["program"], document["plans"][0]["signature"])

    with pytest.raises(NotPortable):
        unpack_for(edited(pack([plan]), edit), model, 2, plan.digest())
    assert "antigravity" not in sys.modules


def test_malformed_documents_are_refused() -> None:
    """Whatever is in the place of any value, the answer is that this is no plan, or a plan with another digest."""
    model, example, _ = mlp()
    plan = make_plan(model, example, 2)
    data = pack([plan])
    numbers = random.Random(1)
    junk = (None, -1, 1e400, "x", [], {}, {"ref": "x"}, {"tensor": "no"}, {"torch": "load"}, ["Pow", 9, 9], [[[]]])
    refused = 0
    for _ in range(300):

        def edit(document: dict[str, Any]) -> None:
            item: Any = document
            while True:
                keys = list(item) if isinstance(item, dict) else range(len(item))
                key = numbers.choice(keys)
                if not isinstance(item[key], (dict, list)) or not item[key] or numbers.random() < 0.1:
                    item[key] = numbers.choice(junk)
                    return
                item = item[key]

        try:
            unpack_for(edited(data, edit), model, 2, plan.digest())
        except NotPortable:
            refused += 1
    assert refused > 150


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


# ------------------------------------------------------------------ served models


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.mlp_archive(tmp_path_factory.mktemp("archive") / "model.pt2")


def load(source: Source, rank: int, **options: object) -> ServedModel:
    group = Group(rank, 2)
    return load_model(source, world_size=2, rank=rank, device=torch.device("cpu"), group=group, options=options)


def test_a_replacement_does_not_trace(archive: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = [load(open_source(archive), rank) for rank in range(2)]
    data = ours[0].export_plan()
    with monkeypatch.context() as patched:
        patched.setattr("tensor_parallel.planner.make.trace", None)
        theirs = [load(open_source(archive), rank, plan=data, known_plan=ours[0].plan_digest) for rank in range(2)]
    assert [model.planned_by for model in (*ours, *theirs)] == [
        "this rank",
        "an earlier load",
        "a peer",
        "a peer",
    ]
    for mine, other in zip(ours, theirs, strict=True):
        assert (mine.plan_digest, mine.shard_digest) == (other.plan_digest, other.shard_digest)
        assert other.plan.verified == "by its peers"
        assert mine.inputs == other.inputs

    def answers(models: list[ServedModel]) -> Any:
        def body(group: Group) -> Any:
            module: Any = models[group.rank]._module
            module._group.bind(group.backend)
            return models[group.rank].run(checkpoints.mlp_inputs())

        return run_ranks(2, body)

    for have, want in zip(answers(theirs), answers(ours), strict=True):
        assert_close(have, want, rtol=0, atol=0)


def test_what_is_no_plan_costs_time_only(archive: Path, caplog: pytest.LogCaptureFixture) -> None:
    digest = load(open_source(archive), 0).plan_digest
    gc.collect()
    other = load(open_source(archive), 1, plan=b"junk", known_plan=digest)
    assert other.planned_by == "this rank"
    assert other.plan_digest == digest
    assert "the plan of a peer cannot be used: this is no plan" in caplog.text


@pytest.mark.parametrize(
    "error", [RuntimeError("bad device"), NotImplementedError("not registered"), NotPortable("no")]
)
def test_whatever_is_wrong_with_a_plan_a_rank_plans_itself(
    error: Exception, archive: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise error

    digest = load(open_source(archive), 0).plan_digest
    planned._keepers.clear()
    monkeypatch.setattr("tensor_parallel.planner.portable.unpack_for", fail)
    assert load(open_source(archive), 0, plan=b"junk", known_plan=digest).planned_by == "this rank"


def looking() -> tuple[nn.Module, Inputs]:
    """A factory of a model with a branch."""
    model, example, _ = mlp()
    return model, example


def test_programs_for_other_ways_are_there_after_a_load() -> None:
    name = f"{__name__}:looking"
    first = load(open_source(name, factories=[name]), 0)
    again = load(open_source(name, factories=[name]), 0, plan=first.export_plan(), known_plan=first.plan_digest)
    assert again.planned_by == "a peer"
    assert len(first.plans) == 2
    module: Any = again._module
    module._planner = None  # nothing is planned later
    x = mlp()[1]["x"]
    for values, plan in zip((x, x + 200), again.plans, strict=True):
        assert module.runner_by_name({"x": values})[0].plan.digest() == plan.digest()
