"""All ranks in one process: a program run in lockstep, for verification and for tests. No peer is needed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tensor_parallel.planner.program import PerRank, Program, Step, map_refs
from tensor_parallel.planner.runtime import is_random
from tensor_parallel.planner.stopping import pause

Values = dict[int, list[Any]]
"""Per reference, every rank's value."""


def start(
    program: Program,
    inputs: Sequence[Any],
    states: Callable[[str, int], Tensor],
    constants: Mapping[str, Tensor],
) -> Values:
    """Values before the first step; ``states(name, rank)`` gives a rank's part of a stored tensor."""
    ranks = range(program.ranks)
    values: Values = {number: [value] * program.ranks for number, value in zip(program.inputs, inputs, strict=True)}
    for name, number in program.constants.items():
        values[number] = [constants[name]] * program.ranks
    for name, number in program.states.items():
        values[number] = [states(name, rank) for rank in ranks]
    return values


def execute(step: Step, values: Values, ranks: int) -> None:
    """One step on every rank."""
    if hasattr(step.fn, "simulate"):
        values[step.out] = step.fn.simulate(values[step.args[0].id])
        return
    results = []
    generator = torch.get_rng_state() if is_random(step) else None
    for rank in range(ranks):
        args, kwargs = local_arguments(step, values, rank)
        if generator is not None:
            torch.set_rng_state(generator)  # every rank's is in the same state
        results.append(step.fn(*args, **kwargs))
    values[step.out] = results


def local_arguments(step: Step, values: Values, rank: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    def on_rank(constant: PerRank) -> Any:
        return constant.values[rank]

    args, kwargs = map_refs((step.args, step.kwargs), lambda ref: values[ref.id][rank], on_rank)
    return args, kwargs


def run(
    program: Program, inputs: Sequence[Any], states: Callable[[str, int], Tensor], constants: Mapping[str, Tensor]
) -> list[list[Any]]:
    """Every rank's flat outputs."""
    values = start(program, inputs, states, constants)
    with torch.no_grad():
        for step in program.steps:
            pause()
            execute(step, values, program.ranks)

    def of_rank(rank: int) -> list[Any]:
        found: list[Any] = map_refs(program.outputs, lambda ref: values[ref.id][rank], lambda c: c.values[rank])
        return found

    return [of_rank(rank) for rank in range(program.ranks)]
