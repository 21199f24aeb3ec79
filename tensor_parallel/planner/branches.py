"""Branches on values of the inputs alone, such as "is anything masked": traced as the example decides them.

A trace made so holds for inputs that decide alike, which is seen from the inputs before it runs; for others the model
is traced again, which must be possible: every branch is tried the other way first, alone and then with others. Branches
on what weights computed stay untraceable.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.weak import WeakIdKeyDictionary

from tensor_parallel.errors import PlanError
from tensor_parallel.planner.program import PerRank, Ref, Step, map_refs
from tensor_parallel.planner.reserve import replaced_forward

MOST = 4  # branches of one trace: each is traced the other way too
Way = tuple[int, ...]  # through a model: which of its branches, by number, go otherwise than the example decides
AHEAD = 2  # branches of which every combination is traced, and planned when the model is loaded
_DECISIONS = (Tensor.__bool__, Tensor.item)


def try_ways(branches_on: Callable[[Way], int], most: int) -> None:
    """Call ``branches_on(way)``, which says how many branches a way meets, for that of the example and at most ``most``
    others: those that leave it at one branch first, and what is met only on them later. None is tried twice."""
    waiting: deque[Way] = deque([()])
    for _ in range(1 + most):
        if not waiting:
            return
        way = waiting.popleft()
        waiting.extend((*way, branch) for branch in range(way[-1] + 1 if way else 0, branches_on(way)))


class Decided(TorchFunctionMode):
    """While a model is traced: what follows from the inputs alone is computed from the example's too."""

    def __init__(self, flipped: Collection[int] = ()) -> None:
        super().__init__()
        self.flipped = frozenset(flipped)  # branches to take the other way
        self._known: Any = WeakIdKeyDictionary()  # of the trace's tensors: those of the example
        self.conditions: list[Tensor] = []
        self.decisions: list[bool] = []

    @contextmanager
    def around(self, model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[None]:
        """While ``model`` runs on stand-ins for ``args`` and ``kwargs``; its conditions are then further outputs."""
        forward = model.forward

        @wraps(forward)
        def decided(*stand_in_args: Any, **stand_in_kwargs: Any) -> Any:
            self.conditions, self.decisions = [], []
            pairs = [*zip(stand_in_args, args, strict=True)]
            pairs += [(value, kwargs[name]) for name, value in stand_in_kwargs.items()]
            for stand_ins, values in pairs:
                leaves = zip(pytree.tree_leaves(stand_ins), pytree.tree_leaves(values), strict=True)
                for stand_in, value in leaves:
                    if isinstance(stand_in, Tensor):
                        with _disable_current_modes():
                            self._known[stand_in] = value.clone()
            with self:
                result = forward(*stand_in_args, **stand_in_kwargs)
            return result, tuple(self.conditions)

        try:
            with replaced_forward(model, decided):
                yield
        finally:
            self._known.clear()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _DECISIONS and (value := self._known.get(args[0])) is not None and value.dtype == torch.bool:
            self.conditions.append(args[0])
            with _disable_current_modes(), torch._C.DisableTorchFunction():
                self.decisions.append(bool(value) is not (len(self.decisions) in self.flipped))
            return self.decisions[-1]
        if func is torch.div and (quotient := _quotient(args, kwargs)) is not None:
            return quotient
        result = func(*args, **kwargs)
        if isinstance(result, Tensor) or func is Tensor.__setitem__:
            self._follow(func, args, kwargs, result)
        return result

    def _follow(self, func: Callable[..., Any], args: Any, kwargs: Any, result: Any) -> None:
        """Do with the example's values what is done with their stand-ins, in place where that is done in place."""
        leaves = pytree.tree_leaves((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        sizes = [leaf.node.hint for leaf in leaves if isinstance(leaf, torch.SymInt)]
        if tensors and all(tensor in self._known for tensor in tensors) and None not in sizes:
            known_args, known_kwargs = pytree.tree_map(self._value, (args, kwargs))
            with _disable_current_modes(), torch._C.DisableTorchFunction(), torch.no_grad():
                value = func(*known_args, **known_kwargs)
            if isinstance(result, Tensor):
                self._known[result] = value
        elif tensors and tensors[0] in self._known and (result is tensors[0] or not isinstance(result, Tensor)):
            self._forget(self._known[tensors[0]])

    def _value(self, leaf: Any) -> Any:
        if isinstance(leaf, torch.SymInt):
            return leaf.node.hint
        return self._known[leaf] if isinstance(leaf, Tensor) else leaf

    def _forget(self, value: Tensor) -> None:
        """What was written to is no longer known, in none of its views."""
        memory = value.untyped_storage().data_ptr()
        for tensor, other in list(self._known.items()):
            if other.untyped_storage().data_ptr() == memory:
                del self._known[tensor]


def _quotient(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """``torch.div`` of sizes, which would hide that its result is one."""
    if len(args) != 2 or any(not isinstance(value, (int, torch.SymInt)) for value in args):
        return None
    if kwargs.get("rounding_mode") not in ("trunc", "floor"):
        return None
    size, divisor = args
    return size // divisor if statically_known_true(size >= 0) and statically_known_true(divisor > 0) else None


@dataclass
class Branches:
    """The conditions that a trace took for granted, as a computation on its inputs.

    Values have numbers: those of the flat ``inputs`` (None: no tensor), of ``constants``, and what ``steps`` make.
    """

    inputs: list[int | None]
    constants: dict[int, Tensor]
    steps: list[Step]
    conditions: list[int]
    decisions: list[bool]

    @classmethod
    def of(
        cls,
        conditions: Sequence[fx.Node],
        decisions: Sequence[bool],
        inputs: Sequence[fx.Node | None],
        constants: Mapping[fx.Node, Tensor],
    ) -> Branches:
        """Those of a trace. Raises :class:`PlanError` when they depend on more than values of the inputs."""
        given = {node for node in inputs if node is not None} | constants.keys()
        needed = set(conditions)
        nodes: list[fx.Node] = list(conditions[0].graph.nodes) if conditions else []
        numbers = {node: number for number, node in enumerate(nodes)}
        steps: list[Step] = []

        def ref(node: fx.Node) -> Any:
            return Ref(numbers[node])

        for node in reversed(nodes):
            if node not in needed or node in given:
                continue
            if node.op != "call_function" or torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
                raise PlanError("a branch on more than values of the inputs")
            args, kwargs = fx.map_arg((node.args, node.kwargs), ref)  # type: ignore[misc]
            steps.append(Step(node.target, args, kwargs, numbers[node], node.name))  # type: ignore[arg-type]
            needed.update(node.all_input_nodes)
        return cls(
            inputs=[None if node is None else numbers[node] for node in inputs],
            constants={numbers[node]: tensor for node, tensor in constants.items()},
            steps=steps[::-1],
            conditions=[numbers[node] for node in conditions],
            decisions=list(decisions),
        )

    def hold(self, leaves: Sequence[Any]) -> bool:
        """Whether these inputs decide as the trace does."""
        return self.decide(leaves, self.decisions) == self.decisions

    def decide(self, leaves: Sequence[Any], expected: Sequence[bool]) -> list[bool]:
        """How these inputs decide, on the way that the trace went; computed on the CPU, as the trace was. Ends with the
        first decision that is not as ``expected``: what is computed after it may make no sense for such inputs."""
        values: dict[int, Any] = dict(self.constants)
        for number, leaf in zip(self.inputs, leaves, strict=True):
            if number is not None:
                values[number] = leaf.detach().cpu() if isinstance(leaf, Tensor) else leaf
        decided: list[bool] = []
        steps = iter(self.steps)
        with torch.no_grad():
            for condition, wanted in zip(self.conditions, expected, strict=True):
                while condition not in values:
                    step = next(steps)
                    args, kwargs = map_refs((step.args, step.kwargs), lambda ref: values[ref.id], _no_ranks)
                    values[step.out] = step.fn(*args, **kwargs)
                decided.append(bool(values[condition]))
                if decided[-1] is not wanted:
                    break
        return decided


def _no_ranks(constant: PerRank) -> Any:
    raise AssertionError("conditions are the same on all ranks")
