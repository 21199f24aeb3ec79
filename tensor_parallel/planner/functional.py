"""Writes in place become new values, where that can be seen from the graph alone.

``run_decompositions`` functionalises anything by tracing the whole graph again, which costs twice what the first trace
did. Most traces that mutate at all write into a tensor they have just made (``scores /= scores.sum()``,
``buffer[index] = x``), and then one walk suffices: every tensor belongs to the *family* of the one whose memory it
views; a write makes the family's next version, and a view that is read later is taken again from that. Whatever is not
plainly of this kind is left to the general method.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

aten = torch.ops.aten

# Composite operations are not bound by their schemas: these, which say nothing of aliases, make a new tensor indeed.
_NEW = (
    *("linear", "matmul", "conv1d", "conv2d", "conv3d", "scaled_dot_product_attention", "softmax", "log_softmax"),
    *("layer_norm", "rms_norm", "group_norm", "pad", "one_hot", "repeat_interleave", "outer"),
)


class _Unclear(Exception):
    """Not plainly of the kind that this pass rewrites."""


def functionalise(graph: fx.Graph) -> bool:
    """Rewrite ``graph`` so that it mutates nothing. False, and nothing changed, if that takes more than this pass."""
    families = _Families(graph)
    try:
        families.check()
    except _Unclear:
        return False
    if families.writes:
        _Rewrite(graph, families).run()
    return True


@dataclass
class _Families:
    """Which tensors share memory, and which write to it."""

    graph: fx.Graph
    parent: dict[fx.Node, fx.Node] = field(default_factory=dict)  # a view -> what it is a view of
    maybe: dict[fx.Node, list[fx.Node]] = field(default_factory=dict)  # may share memory with these, or be a copy
    writes: dict[fx.Node, fx.Node] = field(default_factory=dict)  # a write -> what it writes to
    position: dict[fx.Node, int] = field(default_factory=dict)

    def root(self, node: fx.Node) -> fx.Node:
        while node in self.parent:
            node = self.parent[node]
        return node

    def check(self) -> None:
        """Raises :class:`_Unclear`."""
        for position, node in enumerate(self.graph.nodes):
            self.position[node] = position
            if node.op == "call_function":
                self._classify(node)
        if not self.writes:
            return
        members: dict[fx.Node, list[fx.Node]] = defaultdict(list)
        for node in self.graph.nodes:
            members[self.root(node)].append(node)
        related: dict[fx.Node, set[fx.Node]] = defaultdict(set)
        for node, sources in self.maybe.items():
            for source in sources:
                related[self.root(node)].add(self.root(source))
                related[self.root(source)].add(self.root(node))
        for write, target in self.writes.items():
            self._check_write(write, target, members, related)

    def _classify(self, node: fx.Node) -> None:
        target: Any = node.target
        tensors = [source for source in node.all_input_nodes if _holds_tensors(source)]
        if isinstance(target, torch._ops.HigherOrderOperator):
            raise _Unclear
        if not isinstance(target, torch._ops.OpOverload):
            if getattr(target, "__module__", "") in ("torch._C", "torch.amp.autocast_mode"):
                raise _Unclear  # sets a mode
            if target is not operator.getitem:
                self.maybe[node] = tensors
            elif tensors[0] in self.parent:
                self.parent[node] = tensors[0]
            elif tensors[0] in self.maybe:
                self.maybe[node] = tensors
            return
        composite = torch._C._dispatch_has_kernel_for_dispatch_key(target.name(), "CompositeImplicitAutograd")
        schema = target._schema
        if schema.is_mutable:
            self.writes[node] = self._written(node)
            self.parent[node] = self.writes[node]
        elif any(result.alias_info is not None for result in schema.returns):
            if composite:
                self.maybe[node] = tensors[:1]
            else:
                self.parent[node] = tensors[0]
        elif composite and schema.name.split("::")[1] not in _NEW and _holds_tensors(node):
            self.maybe[node] = tensors

    def _written(self, node: fx.Node) -> fx.Node:
        """The tensor that a write writes to, which must be all it does."""
        target: Any = node.target
        functional = _functional(target)
        own, *others = target._schema.arguments
        if functional is None or own.alias_info is None or any(a.alias_info is not None for a in others):
            raise _Unclear
        if torch.Tag.nondeterministic_seeded in target.tags or "dropout" in target._schema.name:
            raise _Unclear
        if torch.Tag.inplace_view in target.tags or target._schema.name.split("::")[1] in _OF_ANOTHER_TYPE:
            raise _Unclear
        written = node.args[0] if node.args else None
        if not isinstance(written, fx.Node):
            raise _Unclear
        dtype = written.meta["val"].dtype
        for source in node.all_input_nodes[1:]:
            other = source.meta.get("val")
            if not isinstance(other, Tensor) or other.dtype in (dtype, torch.bool):
                continue
            if target is not aten.copy_.default and not _indexes(target, other):
                raise _Unclear  # in place the type stays what it is; a new value would be promoted
        return written

    def _check_write(
        self,
        write: fx.Node,
        target: fx.Node,
        members: dict[fx.Node, list[fx.Node]],
        related: dict[fx.Node, set[fx.Node]],
    ) -> None:
        root, at = self.root(target), self.position[write]
        if root.op != "call_function":
            raise _Unclear  # an input, a parameter or a buffer is updated
        node = target
        while node is not root:
            if node not in self.writes and _inverse(node) is None:
                raise _Unclear
            node = self.parent[node]
        seen, todo = {root}, [root]
        while todo:
            for other in related[todo.pop()] - seen:
                if other.op != "call_function":
                    raise _Unclear  # it may be what is updated
                seen.add(other)
                todo.append(other)
                if self.position[other] < at and any(
                    self.position[user] > at for member in members[other] for user in member.users
                ):
                    raise _Unclear


class _Rewrite:
    def __init__(self, graph: fx.Graph, families: _Families) -> None:
        self.graph, self.families = graph, families
        self.version: dict[fx.Node, int] = defaultdict(int)  # by root: how often it has been written to
        self.latest: dict[fx.Node, tuple[int, fx.Node]] = {}  # by member: its value as of a version

    def run(self) -> None:
        families = self.families
        written = {families.root(target) for target in families.writes.values()}
        for node in list(self.graph.nodes):
            with self.graph.inserting_before(node):
                if node in families.writes:
                    self._write(node)
                    continue
                self._refresh(node, written)
            if node.op == "call_function" and families.root(node) in written:
                self.latest[node] = (self.version[families.root(node)], node)
        for node in reversed(list(self.graph.nodes)):
            if not node.users and (node in families.writes or families.root(node) in written):
                self.graph.erase_node(node)

    def _refresh(self, node: fx.Node, written: set[fx.Node]) -> None:
        for source in node.all_input_nodes:
            if self.families.root(source) in written:
                now = self._now(source)
                if now is not source:
                    node.replace_input_with(source, now)

    def _now(self, member: fx.Node) -> fx.Node:
        """The present value of a member of a family."""
        families = self.families
        version = self.version[families.root(member)]
        known = self.latest.get(member)
        if known is not None and known[0] == version:
            return known[1]
        parent = self._now(families.parent[member])
        again = member not in families.writes
        value = self._copy(member, member.target, (parent, *member.args[1:])) if again else parent
        self.latest[member] = (version, value)
        return value

    def _copy(self, like: fx.Node, target: Any, args: tuple[Any, ...], kwargs: Any = None) -> fx.Node:
        node = self.graph.call_function(target, args, dict(like.kwargs) if kwargs is None else kwargs)
        node.meta = dict(like.meta)
        return node

    def _write(self, node: fx.Node) -> None:
        families = self.families
        target = families.writes[node]
        root = families.root(target)
        others = tuple(
            fx.node.map_arg(argument, lambda n: self._now(n) if n in self.latest else n) for argument in node.args[1:]
        )
        value = self._copy(target, _functional(node.target), (self._now(target), *others), dict(node.kwargs))
        after: list[tuple[fx.Node, fx.Node]] = [(node, value), (target, value)]
        member = target
        while member is not root:
            parent = families.parent[member]
            if member not in families.writes:
                inverse = _inverse(member)
                assert inverse is not None
                scatter, whole = inverse
                args = (self._now(parent), value) if whole else (value,)
                value = self._copy(parent, scatter, (*args, *_inverse_arguments(member)), {})
            after.append((parent, value))
            member = parent
        self.version[root] += 1
        for changed, new in after:
            self.latest[changed] = (self.version[root], new)


def _holds_tensors(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, (Tensor, list, tuple))


def _functional(target: Any) -> Any:
    """The operation that makes what this one writes."""
    namespace, name = target._schema.name.split("::")
    if namespace != "aten" or not name.endswith("_"):
        return None
    packet = getattr(aten, name[:-1], None)
    found = getattr(packet, target._overloadname, None)
    if found is None or [a.name for a in found._schema.arguments] != [a.name for a in target._schema.arguments]:
        return None
    return found


def _indexes(target: Any, other: Tensor) -> bool:
    """Whether a write takes this operand as an index."""
    name = target._schema.name
    return ("index" in name or "scatter" in name) and not other.dtype.is_floating_point


def _inverse(view: fx.Node) -> tuple[Any, bool] | None:
    """The operation that puts a view's new value back into what it views, and whether it takes the latter too."""
    if view.kwargs:
        return None
    return _INVERSES.get(view.target)


_OF_ANOTHER_TYPE = frozenset(
    [
        "eq_",
        "ne_",
        "not_equal_",
        "lt_",
        "less_",
        "le_",
        "less_equal_",
        "gt_",
        "greater_",
        "ge_",
        "greater_equal_",
        "logical_and_",
        "logical_or_",
        "logical_xor_",
        "logical_not_",
        "cumsum_",
        "cumprod_",
    ]
)
"""In place they keep the type of what they write; the operation that makes a value gives bools, or wider integers."""

_INVERSES: dict[Any, tuple[Any, bool]] = {
    aten.slice.Tensor: (aten.slice_scatter.default, True),
    aten.select.int: (aten.select_scatter.default, True),
    aten.transpose.int: (aten.transpose.int, False),
    aten.unsqueeze.default: (aten.squeeze.dim, False),
    aten.permute.default: (aten.permute.default, False),
    aten.detach.default: (aten.alias.default, False),
    aten.alias.default: (aten.alias.default, False),
}


def _inverse_arguments(view: fx.Node) -> tuple[Any, ...]:
    if view.target is aten.permute.default:
        order: Any = view.args[1]
        return (sorted(range(len(order)), key=lambda d: order[d] % len(order)),)
    return view.args[1:]
