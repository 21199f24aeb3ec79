"""From a model to a plan, and from a plan to one rank's module."""

from __future__ import annotations

import hashlib
import logging
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from tensor_parallel.checkpoint.digest import content_digest
from tensor_parallel.errors import LoadCancelled, NoGraph, PlanError
from tensor_parallel.group import Group
from tensor_parallel.planner import runtime, specs, verify
from tensor_parallel.planner import search as searching
from tensor_parallel.planner.cost import Network
from tensor_parallel.planner.export import TRACING, trace
from tensor_parallel.planner.module import Compiled, ShardedModule
from tensor_parallel.planner.placement import ALL, positions
from tensor_parallel.planner.plan import Collective, Plan, Reason
from tensor_parallel.planner.program import PerRank, Program, map_refs
from tensor_parallel.planner.prover import Prover
from tensor_parallel.planner.reserve import attributes_kept, reserved, skeleton
from tensor_parallel.planner.shard import Shard
from tensor_parallel.planner.solver import Division
from tensor_parallel.planner.stopping import pause
from tensor_parallel.planner.tensors import Tensors
from tensor_parallel.planner.traced import Traced

if TYPE_CHECKING:
    from tensor_parallel.planner.fallback import ModulesModel, OwnCode

log = logging.getLogger(__name__)

Examples = Mapping[str, Any] | Sequence[Any]
Read = Callable[[str, Shard], Tensor]


def arguments(example_inputs: Examples) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Example inputs as positional and keyword arguments; keywords in a fixed order."""
    if isinstance(example_inputs, Mapping):
        return (), {name: example_inputs[name] for name in sorted(example_inputs)}
    if isinstance(example_inputs, Tensor):
        return (example_inputs,), {}
    return tuple(example_inputs), {}


def make_plan(
    model: nn.Module,
    example_inputs: Examples,
    world_size: int,
    *,
    training: bool = False,
    gather_outputs: bool = True,
    sequence_parallel: bool = False,
    verify: bool = True,
    known: str = "",
    network: Network | None = None,
) -> Plan:
    """Plan ``model`` (whose parameters may be meta tensors, with real buffers) for ``world_size`` ranks.

    Every rank makes the same plan alone. A model that does not export, or whose plan fails verification, gets the
    fallback plan
    (``mode == "modules"``), with the reason in ``notes``. ``known`` is the digest of a plan that has been verified: one
    equal to it is not verified again.
    """
    twin = as_skeleton(model)
    twin.train(training)
    return plan_skeleton(
        twin,
        *arguments(example_inputs),
        world_size,
        gather_outputs=gather_outputs,
        sequence_parallel=sequence_parallel,
        check=verify,
        known=known,
        network=network,
    )


def as_skeleton(model: nn.Module) -> nn.Module:
    """A copy without weights to trace and to keep; see :func:`reserve.skeleton`."""
    return skeleton(model)


def plan_skeleton(
    twin: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    world_size: int,
    *,
    gather_outputs: bool = True,
    sequence_parallel: bool = False,
    check: bool = True,
    known: str = "",
    network: Network | None = None,
    fixed: Mapping[str, Shard] | None = None,
    flipped: Collection[int] = (),
) -> Plan:
    """Plan a skeleton in its present mode. ``fixed`` shards are those already held: only the computation is
    planned then. ``flipped``: see :func:`~tensor_parallel.planner.export.trace`."""
    tensors = Tensors(twin)
    args, kwargs = _on_cpu(args), _on_cpu(kwargs)
    try:
        with TRACING, warnings.catch_warnings(), attributes_kept(twin), reserved(twin):
            warnings.simplefilter("ignore")
            traced = trace(twin, args, kwargs, flipped=flipped)
            traced.release()
        return plan_traced(
            twin,
            traced,
            tensors,
            world_size,
            gather_outputs=gather_outputs,
            sequence_parallel=sequence_parallel,
            check=check,
            known=known,
            network=network or Network(),
            fixed=fixed,
        )
    except LoadCancelled:
        raise
    except PlanError as error:
        if sequence_parallel:
            raise  # asked for, and not to be had
        log.warning("%s: %s; falling back to layers sharded one by one", type(twin).__name__, error)
        reason = str(error)
    except Exception as error:
        pause()
        # A fault of the planner must not keep a model from being served: the fallback needs nothing of what failed.
        log.exception("%s: the planner failed; falling back to layers sharded one by one", type(twin).__name__)
        reason = f"the planner failed: {type(error).__name__}: {error}"
        if sequence_parallel:
            raise PlanError(reason) from error
    from tensor_parallel.planner.fallback import plan_modules

    return plan_modules(twin, tensors, args, kwargs, world_size, reason=reason, fixed=fixed)


def _on_cpu(tree: Any) -> Any:
    return pytree.tree_map_only(Tensor, lambda t: t.detach().cpu(), tree)


def plan_traced(
    twin: nn.Module,
    traced: Traced,
    tensors: Tensors,
    world_size: int,
    *,
    gather_outputs: bool,
    sequence_parallel: bool,
    check: bool,
    known: str,
    network: Network,
    fixed: Mapping[str, Shard] | None,
) -> Plan:
    """The best proven plan for a trace. Raises :class:`PlanError`.

    A model with branches gives whole outputs, so that they are alike whichever way it went.
    """
    gather_outputs = gather_outputs or traced.branches is not None
    if fixed is None:
        best = searching.search(traced, tensors, world_size, network, gather_outputs=gather_outputs)
    else:
        best = searching.fixed(traced, tensors, world_size, network, _divisions(fixed, tensors), gather_outputs)
    prover, communications = best.prover, best.communications
    if sequence_parallel:
        modes = {**best.modes, **best.forced}
        prover = searching.prove(traced, tensors, world_size, best.divisions, modes, gather_outputs, True)
        communications = prover.communications()
    shards = _shards(tensors, best.divisions, world_size)
    names = specs.input_names(twin, traced.in_spec)
    input_specs = specs.input_specs(names, traced)
    output_specs = specs.output_specs(specs.output_names(traced.out_spec), traced, prover.output_values, world_size)
    plan = Plan(
        world_size=world_size,
        mode="graph",
        shards=shards,
        tied=dict(tensors.tied),
        inputs=input_specs,
        outputs=output_specs,
        collectives=tuple(Collective(c.kind, c.nbytes, c.where) for c in communications),
        reasons=tuple(Reason(g.where, g.op, g.why, tuple(sorted(g.origin))) for g in prover.reasons),
        bytes_per_rank=best.held,
        total_bytes=tensors.total_bytes,
        program=program_digest(prover.program, {name: tensor for name, (_, tensor) in traced.constants.items()}),
        decisions={**best.modes, **best.forced},
        training=twin.training,
        own_derivatives=traced.own_derivatives,
        artifact=Compiled(traced.signature(), prover.program, names),
    )
    if not check:
        return plan
    if known and plan.digest() == known:
        return replace(plan, verified="by its peers")
    return replace(plan, verified=_verify(twin, prover, traced, tensors, shards))


def _verify(twin: nn.Module, prover: Prover, traced: Traced, tensors: Tensors, shards: Mapping[str, Shard]) -> str:
    buffers = {tensors.canonical(name): buffer for name, buffer in twin.named_buffers(remove_duplicate=False)}
    with TRACING:  # the model's own code runs, which asks whether it is being traced
        return verify.verify(prover, traced, tensors, shards, buffers, twin)


def _shards(tensors: Tensors, divisions: Mapping[str, Division], ranks: int) -> dict[str, Shard]:
    shards: dict[str, Shard] = {}
    for name in tensors.stored:
        division = divisions.get(name)
        if division is None:
            shards[name] = Shard.replicated()
        else:
            dim, owner = division
            owners = np.asarray(owner, dtype=np.int64)
            shards[name] = Shard.from_indices(dim, [positions(owners, rank).tolist() for rank in range(ranks)])
    return shards


def _divisions(shards: Mapping[str, Shard], tensors: Tensors) -> dict[str, Division]:
    result: dict[str, Division] = {}
    for name, shard in shards.items():
        if shard.dim is not None:
            owner = torch.zeros(tensors.shape(name)[shard.dim], dtype=torch.long)
            held = torch.zeros_like(owner)
            for rank in range(len(shard.runs)):
                owner[shard.index(rank)] = rank
                held[shard.index(rank)] += 1
            owner[held > 1] = ALL
            result[name] = (shard.dim, tuple(owner.tolist()))
    return result


def program_digest(program: Program, constants: Mapping[str, Tensor]) -> str:
    """Hash of what is executed: operations, arguments, per-rank constants and ``constants``; and of the order of what
    ranks do together or draw. The order of all else is none of its business: a model's code may go through a set, whose
    order differs from process to process.
    """
    known = {number: f"input {position}" for position, number in enumerate(program.inputs)}
    known |= {number: f"state {name}" for name, number in program.states.items()}
    for name, number in program.constants.items():
        tensor = constants[name]
        known[number] = f"constant {tensor.dtype} {tuple(tensor.shape)} {content_digest(tensor)}"

    def text(value: Any) -> str:
        return str(map_refs(value, lambda ref: known[ref.id], _constant_text))

    ordered = []
    for step in program.steps:
        name = getattr(step.fn, "__qualname__", None) or str(step.fn)
        hashed = hashlib.sha256(f"{name}{text((step.args, step.kwargs))}".encode()).hexdigest()
        known[step.out] = hashed
        if isinstance(step.fn, runtime.Collective) or runtime.is_random(step):
            ordered.append(hashed)
    every = sorted(known[step.out] for step in program.steps)
    results = text((program.outputs, sorted(program.updates.items())))
    return hashlib.sha256("\n".join([*every, "in order", *ordered, results]).encode()).hexdigest()


def _constant_text(constant: PerRank) -> str:
    return f"<{constant.values}>"


def instantiate(
    plan: Plan, model: nn.Module, *, rank: int, group: Group, read: Read, device: torch.device | str | None = None
) -> ShardedModule | ModulesModel:
    """This rank's module. ``read(name, shard)`` gives the local part of each stored tensor, once each.

    ``model`` gives structure only (its parameters may be meta). Raises :class:`PlanError` when the plan was made
    elsewhere and
    tracing the model here gives another program.
    """
    twin = as_skeleton(model)
    twin.train(plan.training)
    return instantiate_skeleton(plan, twin, rank=rank, group=group, read=read, device=torch.device(device or "cpu"))


def instantiate_skeleton(
    plan: Plan, twin: nn.Module, *, rank: int, group: Group, read: Read, device: torch.device
) -> ShardedModule | ModulesModel:
    """:func:`instantiate` for a skeleton that is handed over."""
    if plan.mode == "modules":
        from tensor_parallel.planner.fallback import build_modules

        return build_modules(plan, twin, rank=rank, group=group, read=read, device=device)
    if plan.artifact is None:
        raise PlanError(
            "this plan was read from text: make it again where it is to run (equal digests mean equal plans)"
        )
    module = ShardedModule(group, device)
    hold_all(module, plan, Tensors(twin), twin, rank, read, device)
    module.add_program(plan, plan.artifact)
    module.train(plan.training)
    release_buffers(twin, plan)

    divides_rows = any(item.kind == "reduce_scatter" for item in plan.collectives)

    whole_outputs = all(output.shard is None or output.shard.dim is None for output in plan.outputs)

    def planner(
        args: tuple[Any, ...], kwargs: dict[str, Any], training: bool, flipped: Collection[int] = ()
    ) -> tuple[Plan, Compiled]:
        twin.train(training)
        other = plan_skeleton(
            twin,
            args,
            kwargs,
            plan.world_size,
            gather_outputs=whole_outputs,
            fixed=plan.shards,
            sequence_parallel=training and divides_rows,
            flipped=flipped,
        )
        if other.mode != "graph":
            raise NoGraph("; ".join(other.notes))
        if not whole_outputs and [o.shard for o in other.outputs] != [o.shard for o in plan.outputs]:
            raise PlanError("these inputs need another program, whose outputs would not be divided as those before")
        return other, other.artifact

    def own_code() -> OwnCode:
        from tensor_parallel.planner.fallback import OwnCode

        return OwnCode(plan, as_skeleton(twin), module, group, device)

    module._planner, module._make_own_code = planner, own_code
    return module


def hold_all(
    module: ShardedModule, plan: Plan, tensors: Tensors, twin: nn.Module, rank: int, read: Read, device: torch.device
) -> None:
    """Read every stored tensor's local part into the module."""
    wants_grad = {name: p.requires_grad for name, p in twin.named_parameters(remove_duplicate=False)}
    for name, stored in tensors.stored.items():
        shard = plan.shards[name]
        local = read(name, shard).to(device)
        expected = shard.local_shape(stored.shape, rank)
        if tuple(local.shape) != tuple(expected):
            raise PlanError(f"{name}: read a part of shape {tuple(local.shape)}, the plan needs {tuple(expected)}")
        module.hold(
            name,
            local,
            is_parameter=stored.is_parameter,
            requires_grad=wants_grad.get(name, False),
            persistent=stored.persistent,
        )
    for alias, name in tensors.tied.items():
        module.tie(alias, name)


def release_buffers(twin: nn.Module, plan: Plan) -> None:
    """Let go of whole buffers of which this rank holds a part."""
    from tensor_parallel.planner.reserve import reserved_like

    for prefix, child in twin.named_modules():
        for leaf, buffer in child._buffers.items():
            name = f"{prefix}.{leaf}" if prefix else leaf
            shard = plan.shards.get(plan.tied.get(name, name))
            if buffer is not None and shard is not None and shard.dim is not None:
                child._buffers[leaf] = reserved_like(buffer)
