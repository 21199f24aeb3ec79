"""The plan against the unsharded model, before it is trusted: all ranks in one process, random weights, the example's
inputs.

No peer takes part, so a plan is checked where it is made. On a mismatch every operation is compared, to name the first
that differs.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from tensor_parallel.errors import PlanError
from tensor_parallel.planner import hits, own_code, simulate
from tensor_parallel.planner.chance import certain, without_dropout
from tensor_parallel.planner.placement import Partial, Replicated, Sharded, counts, positions
from tensor_parallel.planner.program import Program, map_refs
from tensor_parallel.planner.prover import Prover
from tensor_parallel.planner.shard import Shard
from tensor_parallel.planner.stopping import pause
from tensor_parallel.planner.tensors import Tensors, differentiable
from tensor_parallel.planner.traced import Traced
from tensor_parallel.planner.values import Value

log = logging.getLogger(__name__)

TOLERANCE = 1e-4  # of the largest element, in float32; lower precision is given its own rounding
WIDE_TOLERANCE = 1e-6  # in float64, where sums taken in another order cannot explain more
HUGE = 1e4  # no sum over random weights; what stands for "never" in masked scores
LIMIT = 24_000_000  # stored elements up to which every tensor has values of its own
ALIKE_LIMIT = 50_000_000  # elements up to which tensors of one role in different layers share theirs
TOTAL_LIMIT = 1_500_000_000  # stored elements up to which a forward is affordable


class Mismatch(PlanError):
    """A plan computed something else than the model."""


def verify(
    prover: Prover,
    traced: Traced,
    tensors: Tensors,
    shards: Mapping[str, Shard],
    buffers: Mapping[str, Tensor],
    twin: nn.Module | None = None,
) -> str:
    """Whether, and how, the plan was verified. Raises :class:`Mismatch`, naming the first operation that differs,
    unless every rank computes what the trace does, and the trace what ``twin``'s own code does.

    Nothing is dropped by dropout on either side. Tensors of one role in different layers share their values where that
    makes a larger model affordable. A mismatch in float32 is judged again in float64, to a tighter tolerance: a wrong
    index or a lost term differs there as well, sums taken in another order do not.
    """
    program = certain(prover.program)
    if program is None:
        return "no: random"
    alike = sum(s.nbytes // s.dtype.itemsize for s in tensors.stored.values()) > LIMIT
    if not _affordable(tensors):
        return "no: too large"
    full = _weights(tensors, buffers, alike)
    problem, where = _compare(program, prover, traced, tensors, shards, full)
    if problem is not None and _agrees_in_float64(program, prover, traced, tensors, shards, full):
        log.info("%s in float32, equal in float64: rounding that this model's random weights amplify", problem)
    elif problem is not None:
        raise Mismatch(f"the plan computes {problem}; first difference: {where()}")
    found = "whole model, layers alike" if alike else "whole model"
    loops = bool(hits.selecting(traced.graph))
    if twin is None or (twin.training and not loops):  # in training the model's own code drops out
        return found
    try:
        _check_trace(twin, traced, tensors, full)
        if loops:
            _check_loops(twin, traced, tensors, full)
    except own_code.NotComparable as reason:
        log.info("the trace is not compared with the model's own code: %s", reason)
        return f"{found}, as traced"
    return found


def _check_trace(
    twin: nn.Module,
    traced: Traced,
    tensors: Tensors,
    full: Mapping[str, Tensor],
    visited: Callable[[int], bool] | None = None,
) -> None:
    """Raises :class:`Mismatch` or :class:`~tensor_parallel.planner.own_code.NotComparable`."""

    def problem(weights: Mapping[str, Tensor], wide: bool) -> str:
        widened = _widened if wide else _same
        constants = {name: widened(tensor) for name, (_, tensor) in traced.constants.items()}
        inputs = [widened(leaf) for leaf in traced.example]
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            own = own_code.outputs(twin, traced, tensors, weights, _clones(inputs), visited)
            trace = _reference(traced, tensors, weights, constants, inputs, visited)
        return own_code.differs(traced, own, trace, distance, (lambda _: WIDE_TOLERANCE) if wide else tolerance)

    found = problem(full, False)
    if not found:
        return
    try:
        agree = not problem(_wide(full), True)
    except (own_code.NotComparable, RuntimeError):
        agree = False
    if not agree:
        raise Mismatch(f"the trace computes {found}, compared with the model's own code")


def _check_loops(twin: nn.Module, traced: Traced, tensors: Tensors, full: Mapping[str, Tensor]) -> None:
    """The same as if other indices were set than the example sets: none, and only odd ones. What follows from how many
    were visited before is else only found where the example does not set all. Raises :class:`Mismatch`."""
    for visited in (lambda _: False, lambda index: index % 2 == 1):
        try:
            _check_trace(twin, traced, tensors, full, visited)
        except own_code.NotComparable as reason:
            log.info("not compared with the model's own code where fewer indices are set: %s", reason)
        except (RuntimeError, IndexError) as error:
            raise Mismatch(f"the trace raises, where fewer indices are set than the example sets: {error}") from error


def _wide(full: Mapping[str, Tensor]) -> dict[str, Tensor]:
    made = {id(t): _widened(t) for t in full.values()}
    return {name: made[id(t)] for name, t in full.items()}


def _widened(value: Any) -> Any:
    if not isinstance(value, Tensor) or not differentiable(value.dtype):
        return value
    return value.to(torch.complex128 if value.is_complex() else torch.float64)


def _same(value: Any) -> Any:
    return value


def memory_needed(total_bytes: int) -> int:
    """Bytes that verifying a model of ``total_bytes`` takes at most: its values, and the ranks' parts of them."""
    return 2 * min(total_bytes, ALIKE_LIMIT * torch.float32.itemsize)


def _affordable(tensors: Tensors) -> bool:
    counts = {name: math.prod(stored.shape) for name, stored in tensors.stored.items()}
    distinct = {_role(name, tensors): count for name, count in counts.items()}
    total = sum(counts.values())
    return total <= LIMIT or (total <= TOTAL_LIMIT and sum(distinct.values()) <= ALIKE_LIMIT)


def _role(name: str, tensors: Tensors) -> Any:
    """What a parameter has in common with its like in other layers; a buffer has its own values."""
    stored = tensors.stored[name]
    return (re.sub(r"\d+", "*", name), stored.shape, stored.dtype) if stored.is_parameter else name


def _weights(tensors: Tensors, buffers: Mapping[str, Tensor], alike: bool) -> dict[str, Tensor]:
    made: dict[Any, Tensor] = {}
    full: dict[str, Tensor] = {}
    for name in tensors.stored:
        pause()
        key = _role(name, tensors) if alike else name
        if key not in made:
            made[key] = _fill(name, tensors, buffers)
        full[name] = made[key]
    return full


def _agrees_in_float64(
    program: Program,
    prover: Prover,
    traced: Traced,
    tensors: Tensors,
    shards: Mapping[str, Shard],
    full: Mapping[str, Tensor],
) -> bool:
    """Whether both agree closely in double precision; False for graphs with precisions written into them."""
    try:
        problem, _ = _compare(program, prover, traced, tensors, shards, _wide(full), wide=True)
    except RuntimeError:
        return False
    return problem is None


def _compare(
    program: Program,
    prover: Prover,
    traced: Traced,
    tensors: Tensors,
    shards: Mapping[str, Shard],
    full: Mapping[str, Tensor],
    wide: bool = False,
) -> tuple[str | None, Callable[[], str]]:
    """What differs in the outputs, if anything, and a way to find out where it began."""
    cache: dict[tuple[int, Shard, int], Tensor] = {}

    def part(name: str, rank: int) -> Tensor:
        key = (id(full[name]), shards[name], rank)
        if key not in cache:
            cache[key] = shards[name].take(full[name], rank)
        return cache[key]

    widened = _widened if wide else _same
    constants = {name: widened(tensor) for name, (_, tensor) in traced.constants.items()}
    inputs = [widened(leaf) for leaf in traced.example]
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        want = _reference(traced, tensors, full, constants, inputs)
        torch.manual_seed(0)
        got = simulate.run(program, _clones(inputs), part, constants)
        problem = _differs(traced, prover, want, got, wide)

    def where() -> str:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            return _first_difference(program, prover, traced, tensors, full, constants, part, inputs)

    return problem, where


def _fill(name: str, tensors: Tensors, buffers: Mapping[str, Tensor]) -> Tensor:
    """Seeded values of ordinary size for a parameter, the real ones for a buffer."""
    stored = tensors.stored[name]
    if not stored.is_parameter:
        return buffers[name]
    generator = torch.Generator().manual_seed(sum(name.encode()) * 7919 + len(name))
    if not differentiable(stored.dtype):
        return torch.zeros(stored.shape, dtype=stored.dtype)
    noise = torch.randn(stored.shape, generator=generator, dtype=torch.complex64 if stored.dtype.is_complex else None)
    if len(stored.shape) < 2:
        return (0.5 + 0.1 * noise).to(stored.dtype)
    return (noise / math.sqrt(max(1, stored.shape[-1]))).to(stored.dtype)


def _clones(leaves: Sequence[Any]) -> list[Any]:
    return [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]


def _placeholders(
    traced: Traced,
    tensors: Tensors,
    full: Mapping[str, Tensor],
    constants: Mapping[str, Tensor],
    inputs: Sequence[Any],
) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for node, leaf in zip(traced.inputs, _clones(inputs), strict=True):
        if node is not None:
            values[node.name] = leaf
    for name, (node, _) in traced.states.items():
        values[node.name] = full[tensors.canonical(name)]
    for name, (node, _) in traced.constants.items():
        values[node.name] = constants[name]
    return values


class _Recorder(fx.Interpreter):
    """Runs the traced graph, keeping what it is asked to keep."""

    def __init__(self, module: fx.GraphModule, values: Mapping[str, Any], keep: Callable[[fx.Node], bool]) -> None:
        super().__init__(module, garbage_collect_values=True)
        self.values, self.keep = values, keep
        self.kept: dict[fx.Node, Any] = {}
        self.empty: set[fx.Node] = set()  # what is to select nothing

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        return super().call_function(*without_dropout(target, args, kwargs))

    def run_node(self, n: fx.Node) -> Any:
        pause()
        result = self.values.get(n.name) if n.op == "placeholder" else super().run_node(n)
        if n in self.empty:
            result = pytree.tree_map(lambda positions: positions[:0], result)
        if self.keep(n):
            self.kept[n] = result
        return result


def _reference(
    traced: Traced,
    tensors: Tensors,
    full: Mapping[str, Tensor],
    constants: Mapping[str, Tensor],
    inputs: Sequence[Any],
    visited: Callable[[int], bool] | None = None,
) -> dict[fx.Node, Any]:
    torch.manual_seed(0)
    outputs = {node for node in traced.outputs if isinstance(node, fx.Node)}
    recorder = _Recorder(traced.module, _placeholders(traced, tensors, full, constants, inputs), outputs.__contains__)
    if visited is not None:
        recorder.empty = {node for node, index in hits.selecting(traced.graph).items() if not visited(index)}
    recorder.run(*[None] * len(list(traced.graph.find_nodes(op="placeholder"))))
    return recorder.kept


def _differs(
    traced: Traced, prover: Prover, want: Mapping[fx.Node, Any], got: list[list[Any]], wide: bool
) -> str | None:
    for index, (node, value) in enumerate(zip(traced.outputs, prover.output_values, strict=True)):
        if not isinstance(node, fx.Node) or not isinstance(want[node], Tensor):
            continue
        locals_ = [outputs[index] for outputs in got]
        for rank, whole in enumerate(_assemble(value, locals_)):
            error = distance(whole, want[node])
            if not error <= (WIDE_TOLERANCE if wide else tolerance(want[node].dtype)):
                return f"output {index} with a relative error of {error:.1e} on rank {rank}"
    return None


def tolerance(dtype: torch.dtype) -> float:
    """What rounding may explain; a computation that is wrong is off by about 1."""
    if dtype.is_floating_point and dtype.itemsize < 4:
        return min(0.25, max(TOLERANCE, 200 * torch.finfo(dtype).eps))
    return TOLERANCE


def distance(got: Any, want: Tensor) -> float:
    """Largest difference relative to the largest element; infinite when shapes or non-finite entries differ.

    Huge elements that are equal, as masks write them, say nothing of how large the others are.
    """
    if not isinstance(got, Tensor) or got.shape != want.shape or got.dtype != want.dtype:
        return math.inf
    if want.numel() == 0:
        return 0.0
    if not differentiable(want.dtype):
        return 0.0 if bool((got == want).all()) else math.inf
    a, b = _widened(got), _widened(want)
    finite = torch.isfinite(b)
    if not bool((torch.isfinite(a) == finite).all()):
        return math.inf
    said = finite & ~((b.abs() >= HUGE) & (a == b))
    if not bool(said.any()):
        return 0.0
    a, b = a[said], b[said]
    return float((a - b).abs().max() / b.abs().max().clamp_min(1e-12))


def _assemble(value: Any, locals_: list[Any]) -> list[Any]:
    """The whole value as each rank (or all together) has it."""
    place = value.place if isinstance(value, Value) else Replicated()
    if isinstance(place, Replicated):
        return locals_
    if isinstance(place, Partial):
        return [sum(locals_[1:], locals_[0])]
    assert isinstance(place, Sharded)
    sizes = tuple(item.shape[place.dim] for item in locals_)
    owner = next((o for o in place.owners if counts(o, len(locals_)) == sizes), None)
    if owner is None:
        return [None]
    shape = list(locals_[0].shape)
    shape[place.dim] = len(owner)
    whole = locals_[0].new_empty(shape)
    for rank, item in enumerate(locals_):
        whole.index_copy_(place.dim, torch.from_numpy(positions(owner, rank)), item)
    return [whole]


def _first_difference(
    program: Program,
    prover: Prover,
    traced: Traced,
    tensors: Tensors,
    full: Mapping[str, Tensor],
    constants: Mapping[str, Tensor],
    part: Any,
    inputs: Sequence[Any],
) -> str:
    """Walk both computations and name the first operation whose result differs."""
    torch.manual_seed(0)
    recorder = _Recorder(
        traced.module, _placeholders(traced, tensors, full, constants, inputs), lambda node: node.op == "call_function"
    )
    recorder.run(*[None] * len(list(traced.graph.find_nodes(op="placeholder"))))
    torch.manual_seed(0)
    values = simulate.start(program, _clones(inputs), part, constants)
    for step in program.steps:
        simulate.execute(step, values, prover.ranks)
    for node, want in recorder.kept.items():
        value = prover.env.get(node)
        if (
            not isinstance(value, Value)
            or value.ref is None
            or value.ref.id not in values
            or not isinstance(want, Tensor)
        ):
            continue
        for whole in _assemble(value, values[value.ref.id]):
            error = distance(whole, want)
            if not error <= 10 * tolerance(want.dtype):
                return f"{node.name} = {node.target} ({type(value.place).__name__}, relative error {error:.1e})"
    return "none of the operations compared"


__all__ = ["LIMIT", "Mismatch", "distance", "map_refs", "memory_needed", "verify"]
