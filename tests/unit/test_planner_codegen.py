"""A sum over ranks takes over memory only where nothing else can see it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tensor_parallel.group import Group
from tensor_parallel.planner.codegen import generate
from tensor_parallel.planner.program import Program, Ref, Step
from tensor_parallel.planner.runtime import AllReduce, add_part

aten = torch.ops.aten


class Doubling:
    """A backend whose peer always holds the same as this rank."""

    name, rank, world_size = "doubling", 0, 2

    def __init__(self) -> None:
        self.given: list[int] = []

    def all_reduce_sum_(self, tensor: Tensor) -> Tensor:
        self.given.append(tensor.data_ptr())
        return tensor.mul_(2)


def _program(*steps: tuple[Any, tuple[Any, ...]], outputs: list[int]) -> Program:
    """Values: 0 the input, 1 a weight, then each step's."""
    made = [
        Step(fn, tuple(Ref(a) if type(a) is int else a for a in args), {}, 2 + i, "")
        for i, (fn, args) in enumerate(steps)
    ]
    return Program(2, [0], {"weight": 1}, {}, made, [Ref(number) for number in outputs], {}, 2 + len(made))


LINEAR, SUM = aten.linear.default, AllReduce()
BIAS = torch.ones(1)
CASES = {
    "alone": (_program((LINEAR, (0, 1)), (SUM, (2,)), outputs=[3]), True),
    "with this rank's part of a bias": (
        _program((LINEAR, (0, 1)), (add_part, (2, BIAS, 1.0, range(1))), (SUM, (3,)), outputs=[4]),
        True,
    ),
    "with a bias, and used before it": (
        _program(
            (LINEAR, (0, 1)),
            (aten.view.default, (2, (12,))),
            (add_part, (2, BIAS, 1.0, range(1))),
            (SUM, (4,)),
            outputs=[5, 3],
        ),
        False,
    ),
    "is an output too": (_program((LINEAR, (0, 1)), (SUM, (2,)), outputs=[3, 2]), False),
    "is used later": (_program((LINEAR, (0, 1)), (SUM, (2,)), (aten.neg.default, (2,)), outputs=[3, 4]), False),
    "a view of it lives on": (
        _program((LINEAR, (0, 1)), (aten.view.default, (2, (12,))), (SUM, (2,)), outputs=[4, 3]),
        False,
    ),
    "is the input": (_program((SUM, (0,)), outputs=[2]), False),
    "is a view of the input": (_program((aten.view.default, (0, (8,))), (SUM, (2,)), outputs=[3, 0]), False),
}


@pytest.mark.parametrize("name", CASES)
def test_only_what_nothing_else_needs_is_overwritten(name):
    program, in_place = CASES[name]
    backend = Doubling()
    group = Group(0, 2, backend)
    x, weight = torch.randn(4, 2), torch.randn(3, 2)
    kept = x.clone()
    found, clones = {}, []
    for recording in (True, False):
        forward, _ = generate(program, 0, group, torch.device("cpu"), "test", record_entries=recording)
        with torch.inference_mode(), torch.profiler.profile() as profile:
            found[recording], _ = forward([x], [weight], [])
        clones.append(sum(event.count for event in profile.key_averages() if event.key == "aten::clone"))
    assert torch.equal(x, kept)
    for ours, plain in zip(found[False], found[True], strict=True):
        assert torch.equal(ours, plain)
    assert clones == [1, 0 if in_place else 1]


ACTIVATIONS = {
    "alone": (lambda act: _program((LINEAR, (0, 1)), (act, (2,)), outputs=[3]), True),
    "before another layer": (
        lambda act: _program((LINEAR, (0, 1)), (act, (2,)), (aten.neg.default, (3,)), outputs=[4]),
        True,
    ),
    "its argument is an output too": (lambda act: _program((LINEAR, (0, 1)), (act, (2,)), outputs=[3, 2]), False),
    "its argument is used later": (
        lambda act: _program((LINEAR, (0, 1)), (act, (2,)), (aten.neg.default, (2,)), outputs=[3, 4]),
        False,
    ),
    "a view of its argument lives on": (
        lambda act: _program((LINEAR, (0, 1)), (aten.view.default, (2, (12,))), (act, (2,)), outputs=[4, 3]),
        False,
    ),
    "of the input": (lambda act: _program((act, (0,)), outputs=[2]), False),
    "of a weight": (lambda act: _program((act, (1,)), outputs=[2]), False),
}


@pytest.mark.parametrize("act", [aten.relu.default, aten.gelu.default, aten.silu.default])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_overwrite_only_what_nothing_else_needs(name, act):
    made, in_place = ACTIVATIONS[name]
    program = made(act)
    group, cpu = Group(0, 1), torch.device("cpu")
    run, source = generate(program, 0, group, cpu, "t", record_entries=False)
    plain, _ = generate(program, 0, group, cpu, "p", record_entries=True)
    x, weight = torch.randn(4, 5), torch.randn(3, 5)
    kept = x.clone(), weight.clone()
    with torch.no_grad():
        got, want = run([x], [weight], [])[0], plain([x], [weight], [])[0]
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert torch.equal(x, kept[0])
    assert torch.equal(weight, kept[1])
    assert (f"{act._schema.name.removeprefix('aten::')}_" + "_" in source) == in_place, source
