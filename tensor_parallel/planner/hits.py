"""Loops over the indices that a mask has set, as mixtures of experts write them: traced once for every index.

``for i in hit.nonzero()`` cannot be traced, since how often it runs depends on values; for every ``i`` it can be. What
the body does for an index that is not set must then be nothing, and that is proven of the trace: whatever the body
selects is selected where ``hit[i]`` holds too, so it selects nothing for such an index; and of all it computes only
sums and writes at the positions it selected leave the body, which at no position do nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.traceback import annotate, preserve_node_meta
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from tensor_parallel.errors import PlanError
from tensor_parallel.planner.reserve import replaced_forward

_MARK = "loop body"
_INDEX = "loop index"
MOST = 1024  # bodies in one graph; more would take longer to plan than anybody waits

Place = tuple[str, int, int]
"""A loop: file, line, and how many indices there are."""

aten = torch.ops.aten
_NONZERO = (torch.nonzero, Tensor.nonzero)
_WHERE = (torch.where, Tensor.where)
_UNBIND = (torch.unbind, Tensor.unbind)
_FLATTEN = (torch.flatten, Tensor.flatten, torch.squeeze, Tensor.squeeze, torch.reshape, Tensor.reshape, Tensor.view)
_GET = (Tensor.__getitem__,)
_SCALAR = (Tensor.item, Tensor.__int__, Tensor.__index__)
_SELECTORS = (aten.nonzero.default, aten.nonzero_numpy.default)
_CHECK = aten._assert_scalar.default
# What writes at given positions only, with the arguments that give them.
_AT_POSITIONS = {
    aten.index_add_.default: (2,),
    aten.index_copy_.default: (2,),
    aten.index_fill_.int_Scalar: (2,),
    aten.index_put_.default: (1,),
    aten.scatter_.src: (2,),
    aten.scatter_add_.default: (2,),
}


class Unrolled(TorchFunctionMode):
    """While a model is traced: loops over set indices visit every index."""

    def __init__(self, refused: Mapping[Place, set[int]] | None = None) -> None:
        super().__init__()
        self.bodies = 0
        self.refused = {place: set(indices) for place, indices in (refused or {}).items()}
        self._at: tuple[Place, int] | None = None
        self._found: list[tuple[Tensor, Tensor]] = []  # a mask, and the indices at which it is set
        self._numbers: list[tuple[Tensor, int]] = []  # index tensors of the bodies, and what they hold
        self._hit: Tensor | None = None  # within a body: whether its index is set
        self._open = False
        self._selects = False

    @contextmanager
    def around(self, model: nn.Module) -> Iterator[None]:
        """While ``model`` runs, this is the first to see what it calls: before the modes of the tracer itself."""
        forward = model.forward

        @wraps(forward)
        def unrolled(*args: Any, **kwargs: Any) -> Any:
            with self:
                return forward(*args, **kwargs)

        with replaced_forward(model, unrolled), preserve_node_meta():
            yield

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _NONZERO:
            return self._nonzero(func, args, kwargs)
        if func in _WHERE and len(args) == 1 and not kwargs:
            return self._nonzero(func, args, {"as_tuple": True})
        if func in _UNBIND and (args[1:] or (kwargs.get("dim", 0),)) == (0,):
            mask = self._mask_of(args[0])
            if mask is not None:
                return _Loop(self, mask, args[0].ndim)
        if func in _FLATTEN and (mask := self._mask_of(args[0])) is not None:
            flat = func(*args, **kwargs)
            if flat.ndim == 1:
                self._found.append((mask, flat))
            return flat
        if func in _SCALAR and (number := self._number(args[0])) is not None:
            return number
        if func in _GET:
            return self._get(func, *args)
        return func(*args, **kwargs)

    def _nonzero(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        mask = args[0] if args else kwargs["input"]
        if self._hit is not None:
            mask, self._selects = mask.ne(0).logical_and(self._hit), True
        found: Any = torch.nonzero(mask, as_tuple=True) if kwargs.get("as_tuple") else torch.nonzero(mask)
        for indices in found if isinstance(found, tuple) else (found,):
            if self._hit is not None:
                torch._check(indices.shape[0] >= 1)  # a body is traced as one that finds something
            elif mask.ndim == 1 and isinstance(mask.shape[0], int):
                self._found.append((mask.ne(0), indices))  # as it is now: the loop may come after a write to it
        return found

    def _get(self, func: Callable[..., Any], tensor: Tensor, index: Any) -> Any:
        """Positions that are known are written as numbers."""
        number = self._number(tensor)
        if number is not None and tensor.ndim == 1 and index in (0, -1):
            return self.numbered(number, 0)
        known = self._number(index) if isinstance(index, Tensor) else None
        if known is None or not isinstance(tensor.shape[0], int):
            return func(tensor, index)
        if known >= tensor.shape[0]:
            raise IndexError(f"index {known} is out of bounds for dimension 0 with size {tensor.shape[0]}")
        return func(tensor, known if index.ndim == 0 else slice(known, known + 1))

    def _mask_of(self, indices: Tensor) -> Tensor | None:
        return next((mask for mask, found in self._found if found is indices), None)

    def _number(self, tensor: Any) -> int | None:
        return next((number for known, number in self._numbers if known is tensor), None)

    def numbered(self, number: int, ndim: int) -> Tensor:
        tensor = torch.tensor([number] if ndim else number)
        self._numbers.append((tensor, number))
        return tensor

    def without(self, error: Exception) -> Unrolled | None:
        """To trace again without the body that raised ``error``, if one did: an index that it cannot have."""
        if self._at is None or not isinstance(error, IndexError):
            return None
        again = Unrolled(self.refused)
        place, index = self._at
        again.refused.setdefault(place, set()).add(index)
        return again

    def enter(self, mask: Tensor, place: Place, index: int) -> None:
        self._at = place, index
        if self._hit is not None:
            raise PlanError("a loop over set indices within another")
        self.bodies += 1
        if self.bodies > MOST:
            raise PlanError(f"loops over set indices of more than {MOST} indices")
        self._hit = mask[index]
        self._open, self._selects = True, False

    def leave(self) -> bool:
        """Whether the body selected anything; one that skips its index does not."""
        self._hit = self._at = None
        self._numbers.clear()
        return self._selects

    def end(self) -> None:
        self._open = False

    def finish(self) -> None:
        """Raises :class:`PlanError` when a loop was left before its last index."""
        if self._open:
            raise PlanError("a loop over set indices that may end early")


class _Loop:
    """What a loop over the set indices of ``mask`` iterates: tensors of ``ndim - 1`` dimensions."""

    def __init__(self, mode: Unrolled, mask: Tensor, ndim: int) -> None:
        self.mode, self.mask, self.ndim = mode, mask, ndim

    def __iter__(self) -> Iterator[Tensor]:
        mode, count = self.mode, int(self.mask.shape[0])
        caller = sys._getframe(1)
        place = caller.f_code.co_filename, caller.f_lineno, count
        refused = mode.refused.get(place, set())
        mask = self.mask
        for index in sorted(refused):
            mask = _never(mask, index)
        selects = False
        for index in sorted(set(range(count)) - refused):
            mode.enter(mask, place, index)
            with annotate({_MARK: mode.bodies, _INDEX: index}):
                yield mode.numbered(index, self.ndim - 1)
            selects |= mode.leave()
        if not selects:
            raise PlanError("a loop over set indices that selects nothing by them")
        mode.end()


def _never(mask: Tensor, index: int) -> Tensor:
    """The boolean ``mask``, by a computation that raises ``IndexError``, as the body would, where ``index`` is set."""
    is_set = mask[index : index + 1].long()
    return mask.logical_or(torch.zeros(1, dtype=torch.bool, device=mask.device).index_select(0, is_set))


class Visited(TorchFunctionMode):
    """While a model's own code runs: loops over set indices visit only those that ``kept`` says, as if no other were
    set. To be compared with a trace whose bodies for the others select nothing: where something follows from how many
    were visited, or from which was the first, the two differ."""

    def __init__(self, kept: Callable[[int], bool]) -> None:
        super().__init__()
        self.kept = kept
        self._found: list[Tensor] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func in _NONZERO or (func in _WHERE and len(args) == 1 and not kwargs):
            mask = args[0] if args else kwargs["input"]
            if mask.ndim == 1:
                self._found += result if isinstance(result, (tuple, list)) else (result,)
        elif args and any(args[0] is indices for indices in self._found):
            if func in _FLATTEN and result.ndim == 1:
                self._found.append(result)
            if func in _UNBIND and (args[1:] or (kwargs.get("dim", 0),)) == (0,):
                return tuple(index for index in result if self.kept(int(index)))
        return result


def selecting(graph: fx.Graph) -> dict[fx.Node, int]:
    """What selects positions in the bodies of loops over set indices, and for which index."""
    marks = {node: (node.meta.get("custom") or {}).get(_INDEX) for node in graph.nodes if node.target in _SELECTORS}
    return {node: index for node, index in marks.items() if index is not None}


def prove(graph: fx.Graph) -> None:
    """That every body does nothing where it selects nothing. Raises :class:`PlanError`."""
    bodies = _Bodies(graph)
    for node, body in bodies.of.items():
        written = _written(node)
        if written is not None and bodies.of.get(_owner(written)) != body:
            bodies.prove_write(node, body)
        elif any(bodies.of.get(user) != body for user in node.users):
            raise PlanError(f"{node.name}, computed for one index of a loop over set indices, is used outside")


def drop_checks(graph: fx.Graph) -> None:
    """Bodies are traced as if they found something; that it is so is not to be checked."""
    for node in list(graph.find_nodes(op="call_function", target=_CHECK)):
        graph.erase_node(node)


class _Bodies:
    """Which operations belong to which pass through a loop: all between the first and the last that are marked, since
    the tracer adds some of its own."""

    def __init__(self, graph: fx.Graph) -> None:
        nodes = list(graph.nodes)
        spans: dict[int, tuple[int, int]] = {}
        for at, node in enumerate(nodes):
            mark = (node.meta.get("custom") or {}).get(_MARK)
            if mark is not None and node.op == "call_function":
                spans[mark] = spans.get(mark, (at, at))[0], at
        if not spans:
            raise PlanError("a trace that does not say which operations belong to loops over set indices")
        self.of = {node: mark for mark, (first, last) in spans.items() for node in nodes[first : last + 1]}
        self.selections: dict[int, set[Any]] = {}
        for node, body in self.of.items():
            if node.target in _SELECTORS:
                shapes = [leaf.shape for leaf in pytree.tree_leaves(node.meta["val"])]
                sizes = {s.node.expr for shape in shapes for s in shape if isinstance(s, torch.SymInt)}
                self.selections.setdefault(body, set()).update(sizes)

    def prove_write(self, node: fx.Node, body: int) -> None:
        """That a write to what is outside of ``body`` changes nothing where the body selects nothing."""
        if node.target not in _AT_POSITIONS:
            raise PlanError(f"{node.target} changes, in a loop over set indices, what is outside")
        at = [node.args[position] for position in _AT_POSITIONS[node.target]]
        positions = [leaf for leaf in pytree.tree_leaves(at) if isinstance(leaf, fx.Node)]
        sizes = [size for position in positions for size in position.meta["val"].shape]
        selected = self.selections.get(body, set())
        if not any(isinstance(size, torch.SymInt) and size.node.expr in selected for size in sizes):
            raise PlanError(f"{node.target}, in a loop over set indices, is not confined to what is selected")


def _written(node: fx.Node) -> fx.Node | None:
    """The tensor that a node writes to."""
    schema = getattr(node.target, "_schema", None)
    if schema is None or not schema.is_mutable:
        return None
    written = [value for value, arg in zip(node.args, schema.arguments, strict=False) if _is_written(arg)]
    if len(written) != 1 or not isinstance(written[0], fx.Node):
        raise PlanError(f"{node.target} in a loop over set indices")
    return written[0]


def _is_written(argument: Any) -> bool:
    return argument.alias_info is not None and argument.alias_info.is_write


def _owner(node: fx.Node) -> fx.Node:
    """Whose memory a view shows, or the result of a write."""
    while node.op == "call_function":
        schema = getattr(node.target, "_schema", None)
        if schema is not None and not _may_alias(node.target, schema):
            break
        source = next((leaf for leaf in pytree.tree_leaves(node.args) if isinstance(leaf, fx.Node)), None)
        if source is None:
            break
        node = source
    return node


def _may_alias(target: Any, schema: Any) -> bool:
    """Idle dropout returns its very input, which its schema does not say."""
    return "dropout" in str(target) or any(result.alias_info is not None for result in schema.returns)
