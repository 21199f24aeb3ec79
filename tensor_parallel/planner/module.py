"""A rank's part of a model as an ``nn.Module``: local parameters under the model's own names, and the planned forward.

One module runs several programs over the same tensors: evaluation and training differ (an exported graph bakes dropout
in), and so
do calls with other arguments, or other sizes of dimensions the model does not leave free. Each is planned when first
needed, with the division of the stored tensors fixed by the first. Calls for which no graph can be planned, or whose
gradients a graph would not have, run the model's own code over the same tensors.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from tensor_parallel.errors import InvalidInput, NoGraph
from tensor_parallel.group import Group
from tensor_parallel.planner.branches import AHEAD, Way, try_ways
from tensor_parallel.planner.codegen import generate
from tensor_parallel.planner.plan import FREE, Plan
from tensor_parallel.planner.program import Program
from tensor_parallel.planner.rehearsal import Alone, Rehearsal
from tensor_parallel.planner.segments import Called, Segments
from tensor_parallel.planner.signature import Signature
from tensor_parallel.planner.stopping import pause

if TYPE_CHECKING:
    from tensor_parallel.planner.fallback import OwnCode

log = logging.getLogger(__name__)

_Slot = tuple[dict[str, Any], str]
_REMEMBERED = 4096  # combinations of sizes whose check is remembered


@dataclass
class Compiled:
    """One proven program and how to call it; made by planning, here or by a peer."""

    signature: Signature
    program: Program
    names: list[str]  # of the flat inputs


class Runner:
    """A compiled program bound to one rank's tensors."""

    def __init__(
        self, plan: Plan, compiled: Compiled, module: ShardedModule, group: Group, device: torch.device
    ) -> None:
        self.plan, self.compiled = plan, compiled
        program = compiled.program
        self._tag, self._group, self._device = plan.digest()[:8], group, device
        self._grad, self.source = generate(program, group.rank, group, device, self._tag, record_entries=True)
        self._plain = self._without_gradients(group, None)
        self._slots = [module.slot(name) for name in program.states]
        self._constants = [compiled.signature.constants[name].to(device) for name in program.constants]
        self.updates = [module.slot(name) for name in program.updates]
        shapes = compiled.signature.shapes()
        self._shapes = [
            None if shape is None else [(d, size) for d, size in enumerate(shape) if size != FREE] for shape in shapes
        ]
        self._admitted: dict[tuple[torch.Size, ...], bool] = {}
        self._ranks = [None if shape is None else len(shape) for shape in shapes]

    def fits(self, leaves: Sequence[Any]) -> bool:
        """Whether these inputs have the sizes the program was proven for."""
        for leaf, fixed, ndim in zip(leaves, self._shapes, self._ranks, strict=True):
            if fixed is not None:
                shape = leaf.shape
                if len(shape) != ndim:
                    return False
                for d, size in fixed:
                    if shape[d] != size:
                        return False
        if not self.compiled.signature.guards:
            return self._decides(leaves)
        sizes = tuple(leaf.shape for leaf, fixed in zip(leaves, self._shapes, strict=True) if fixed is not None)
        if sizes not in self._admitted:
            if len(self._admitted) > _REMEMBERED:
                self._admitted.clear()
            self._admitted[sizes] = self.compiled.signature.admits(leaves)
        return self._admitted[sizes] and self._decides(leaves)

    def _decides(self, leaves: Sequence[Any]) -> bool:
        """Whether the inputs' values take the branches that the program was traced along."""
        branches = self.compiled.signature.branches
        return branches is None or branches.hold(leaves)

    def _without_gradients(self, group: Group, called: Called | None) -> Callable[..., Any]:
        program = self.compiled.program
        made, _ = generate(program, group.rank, group, self._device, self._tag, record_entries=False, called=called)
        return made

    def compile(self, segments: Segments, *, check: bool) -> None:
        """Compile what lies between matrices and collectives, for calls that record no gradient; see ``rehearsal``.
        Raises :class:`~tensor_parallel.errors.CannotCompile`."""
        rehearsal = Rehearsal(segments, check=check)
        group = Group(self._group.rank, self._group.world_size, Alone(self._group))
        forward = self._without_gradients(group, rehearsal.called)
        states = [table[key] for table, key in self._slots]
        rehearsal.run(lambda leaves: forward(leaves, states, self._constants), self.compiled.signature, self._device)
        self._plain = self._without_gradients(self._group, segments.called)

    def __call__(self, leaves: Sequence[Any]) -> Any:
        states = [table[key] for table, key in self._slots]
        forward = self._grad if torch.is_grad_enabled() else self._plain
        outputs, updates = forward(leaves, states, self._constants)
        for (table, key), value in zip(self.updates, updates, strict=True):
            table[key] = _kept(value, leaves).detach()  # the old one may be needed by the backward
        return outputs


def _kept(value: Tensor, leaves: Sequence[Any]) -> Tensor:
    """``value`` to be held as a state: not in the memory of an input, which is its caller's to use again."""
    memory = value.untyped_storage().data_ptr()
    shared = any(isinstance(leaf, Tensor) and leaf.untyped_storage().data_ptr() == memory for leaf in leaves)
    return value.clone() if shared else value


class ShardedModule(nn.Module):
    """Holds one rank's tensors by name and runs the programs planned for them."""

    def __init__(self, group: Group, device: torch.device) -> None:
        super().__init__()
        self._group, self._device = group, device
        self._runners: dict[Any, list[Runner]] = {}
        self._by_name: dict[Any, list[Runner]] = {}  # the same lists, found without building a tree of the arguments
        self._planner: Callable[..., tuple[Plan, Compiled]] | None = None
        self._unplanned: dict[Any, str] = {}  # calls for which there is no graph, and why
        self._make_own_code: Callable[[], OwnCode] | None = None
        self._own_code: tuple[OwnCode, ...] = ()  # in a tuple: not a submodule

    # ------------------------------------------------------------------ tensors by name
    def hold(self, name: str, tensor: Tensor, *, is_parameter: bool, requires_grad: bool, persistent: bool) -> None:
        parent, leaf = self._container(name)
        if is_parameter:
            parent._parameters[leaf] = nn.Parameter(tensor, requires_grad=requires_grad)
        else:
            parent._buffers[leaf] = tensor
            if not persistent:
                parent._non_persistent_buffers_set.add(leaf)

    def tie(self, alias: str, name: str) -> None:
        """Give a held tensor a second name."""
        table, key = self.slot(name)
        parent, leaf = self._container(alias)
        source, _ = self._container(name)
        if table is source._parameters:
            parent._parameters[leaf] = table[key]
        else:
            parent._buffers[leaf] = table[key]
            if key in source._non_persistent_buffers_set:
                parent._non_persistent_buffers_set.add(leaf)

    def slot(self, name: str) -> _Slot:
        """Where a tensor is kept: looked up at every call, since ``to()`` and ``load_state_dict`` may replace it."""
        parent, leaf = self._container(name)
        if leaf in parent._parameters:
            return parent._parameters, leaf
        return parent._buffers, leaf

    def _container(self, name: str) -> tuple[nn.Module, str]:
        *path, leaf = name.split(".")
        current: nn.Module = self
        for part in path:
            child = current._modules.get(part)
            if child is None:
                child = nn.Module()
                current._modules[part] = child
            current = child
        return current, leaf

    # ------------------------------------------------------------------ programs
    def add_program(self, plan: Plan, compiled: Compiled) -> Runner:
        runner = Runner(plan, compiled, self, self._group, self._device)
        key = self._key(compiled.signature.in_spec, compiled.signature.example, plan.training)
        self._runners.setdefault(key, []).append(runner)
        return runner

    def unwritten_buffers(self) -> list[Tensor]:
        """Those that no program changes. May be called from any thread."""
        written = {id(table[key]) for runner in self._all() for table, key in runner.updates}
        return [buffer for buffer in self.buffers() if id(buffer) not in written]

    def plans(self) -> list[Plan]:
        """Of every program there is; that of the first one made comes first. May be called from any thread."""
        return [runner.plan for runner in self._all()]

    def _all(self) -> list[Runner]:
        return [runner for runners in list(self._runners.values()) for runner in runners]

    @staticmethod
    def _key(spec: pytree.TreeSpec, leaves: Sequence[Any], training: bool) -> Any:
        described = tuple((leaf.dtype, leaf.ndim) if isinstance(leaf, Tensor) else repr(leaf) for leaf in leaves)
        return training, spec, described

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the model's own."""
        try:
            runner, leaves = self.runner_for(args, kwargs)
        except NoGraph as reason:
            if self._make_own_code is None:
                raise
            return self._run_own_code(args, kwargs, str(reason))
        if runner.plan.own_derivatives and torch.is_grad_enabled() and self._make_own_code is not None:
            return self._run_own_code(args, kwargs, "; ".join(runner.plan.own_derivatives))
        outputs = runner(leaves)
        return pytree.tree_unflatten(outputs, runner.compiled.signature.out_spec)

    def _run_own_code(self, args: tuple[Any, ...], kwargs: dict[str, Any], reason: str) -> Any:
        if not self._own_code:
            assert self._make_own_code is not None
            log.warning("some calls run the model's own code, its parameters gathered: %s", reason)
            self._own_code = (self._make_own_code(),)
        return self._own_code[0](args, kwargs, self.training)

    def runner_by_name(self, inputs: Mapping[str, Tensor]) -> tuple[Runner, Sequence[Any]]:
        """The program for ``forward(**inputs)``, and its flat inputs. For callers that count microseconds."""
        names = sorted(inputs)
        leaves: list[Any] = [inputs[name] for name in names]
        described = tuple([(name, inputs[name].dtype, inputs[name].ndim) for name in names])
        runners = self._by_name.get((self.training, described))
        if runners is None:
            _, spec = pytree.tree_flatten(((), dict(zip(names, leaves, strict=True))))
            runners = self._runners.setdefault(self._key(spec, leaves, self.training), [])
            self._by_name[self.training, described] = runners
        runner = next((runner for runner in runners if runner.fits(leaves)), None)
        return (runner, leaves) if runner is not None else self.runner_for((), dict(inputs))

    def sizes_decide(self) -> bool:
        """Whether which program runs depends on nothing but the inputs' types and sizes."""
        return all(runner.compiled.signature.branches is None for runner in self._all())

    def runner_for(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Runner, list[Any]]:
        """The program for this call, planned now if there is none yet."""
        kwargs = {name: kwargs[name] for name in sorted(kwargs)}
        leaves, spec = pytree.tree_flatten((args, kwargs))
        key = self._key(spec, leaves, self.training)
        for runner in self._runners.get(key, ()):
            if runner.fits(leaves):
                return runner, leaves
        if key in self._unplanned:
            raise NoGraph(self._unplanned[key])
        if self._planner is None:
            raise InvalidInput(f"no plan for inputs {', '.join(sorted(kwargs)) or len(args)} of these types and sizes")
        try:
            plan, compiled = self._planner(args, kwargs, self.training)
        except NoGraph as error:
            self._unplanned[key] = str(error)
            raise
        runner = Runner(plan, compiled, self, self._group, self._device)
        self._runners.setdefault(key, []).append(runner)
        return runner, leaves

    def plan_branches(self) -> int:
        """Plan now what inputs that decide otherwise would need later, where there are few ways; how many programs that
        made. Raises :class:`PlanError`."""
        before = self._all()
        for runner in before:
            branches = runner.compiled.signature.branches
            if branches is not None and self._planner is not None and len(branches.decisions) <= AHEAD:
                try_ways(partial(self._plan_way, runner), 2**AHEAD - 1)
        return len(self._all()) - len(before)

    def compile_programs(self, *, check: bool) -> int:
        """Compile the programs there are; how many functions that made. ``check``: compare what they compute with what
        they compute uncompiled. Programs planned later run as they are. Raises
        :class:`~tensor_parallel.errors.CannotCompile`."""
        segments = Segments(self._device)
        for runner in self._all():
            runner.compile(segments, check=check)
        return len(segments)

    def _plan_way(self, runner: Runner, way: Way) -> int:
        """Plan one way through the model of ``runner``, whose own is planned; how many branches there are on it."""
        signature = runner.compiled.signature
        if way:
            pause()
            assert self._planner is not None
            args, kwargs = pytree.tree_unflatten(signature.example, signature.in_spec)
            plan, compiled = self._planner(args, kwargs, self.training, way)
            self.add_program(plan, compiled)
            signature = compiled.signature
        assert signature.branches is not None
        return len(signature.branches.decisions)
