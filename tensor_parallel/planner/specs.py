"""Names, shapes and bounds of what a traced model takes and gives."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from tensor_parallel.planner.placement import Sharded, positions
from tensor_parallel.planner.plan import InputSpec, OutputSpec
from tensor_parallel.planner.shard import Shard
from tensor_parallel.planner.traced import Traced
from tensor_parallel.planner.values import Value

aten = torch.ops.aten


def input_names(model: nn.Module, in_spec: pytree.TreeSpec) -> list[str]:
    """A name for every flat input: the argument's, with ``.key`` for what is nested in it."""
    args, kwargs = pytree.tree_unflatten([_Leaf(i) for i in range(in_spec.num_leaves)], in_spec)
    names: dict[int, str] = {}
    for name, value in [*zip(inspect.signature(model.forward).parameters, args, strict=False), *kwargs.items()]:
        _name(value, name, names)
    return [names[i] for i in range(in_spec.num_leaves)]


def output_names(out_spec: pytree.TreeSpec) -> list[str]:
    """The model's own keys, nested ones joined by dots; ``output`` for a bare tensor, ``output_0``, ... for a
    tuple's members."""
    structure = pytree.tree_unflatten([_Leaf(i) for i in range(out_spec.num_leaves)], out_spec)
    names: dict[int, str] = {}
    if isinstance(structure, (list, tuple)) and not hasattr(structure, "_fields"):
        for i, item in enumerate(structure):
            _name(item, f"output_{i}", names)
    elif isinstance(structure, _Leaf):
        names[structure.index] = "output"
    else:
        _name(structure, "", names)
    return [names[i] for i in range(out_spec.num_leaves)]


@dataclasses.dataclass(frozen=True)
class _Leaf:
    index: int


def _name(value: Any, prefix: str, names: dict[int, str]) -> None:
    def join(key: Any) -> str:
        return f"{prefix}.{key}" if prefix else str(key)

    if isinstance(value, _Leaf):
        names[value.index] = prefix
    elif isinstance(value, Mapping):
        for key, item in value.items():
            _name(item, join(key), names)
    elif isinstance(value, tuple) and hasattr(value, "_fields"):
        for key in value._fields:
            _name(getattr(value, key), join(key), names)
    elif isinstance(value, (list, tuple)):
        for i, item in enumerate(value):
            _name(item, join(i), names)
    elif dataclasses.is_dataclass(value):
        for data_field in dataclasses.fields(value):
            _name(getattr(value, data_field.name), join(data_field.name), names)
    else:
        for i, item in enumerate(pytree.tree_leaves(value)):
            _name(item, join(i), names)


def input_specs(names: list[str], traced: Traced) -> tuple[InputSpec, ...]:
    bounds = index_bounds(traced)
    return tuple(
        InputSpec(name, node.meta["val"].dtype, traced.shape(node.meta["val"]), bounds.get(node))
        for name, node in zip(names, traced.inputs, strict=True)
        if node is not None
    )


def output_specs(names: list[str], traced: Traced, values: list[Any], ranks: int) -> tuple[OutputSpec, ...]:
    specs = []
    for name, item, value in zip(names, traced.outputs, values, strict=True):
        if not isinstance(value, Value):
            continue
        shard = None
        if isinstance(value.place, Sharded):
            owner = value.place.owners[0]
            shard = Shard.from_indices(value.place.dim, [positions(owner, r).tolist() for r in range(ranks)])
        specs.append(OutputSpec(name, value.dtype, traced.shape(item.meta["val"]), shard))
    return tuple(specs)


_PASSING = ("to", "_to_copy", "view", "reshape", "clone", "contiguous", "unsqueeze", "squeeze", "expand", "slice",
      "alias", "detach",
            "transpose", "permute", "flatten", "_unsafe_view", "select")  # fmt: skip


def index_bounds(traced: Traced) -> dict[fx.Node, tuple[int, int]]:
    """For inputs looked up in a table, the ids it has rows for."""
    inputs = {node for node in traced.inputs if node is not None}
    bounds: dict[fx.Node, tuple[int, int]] = {}
    for node in traced.graph.nodes:
        lookup = _lookup(node)
        if lookup is None:
            continue
        table, ids = lookup
        rows = table.meta["val"].shape[0]
        source, shift = _source(ids)
        if source in inputs and isinstance(rows, int):
            low, high = -shift, rows - 1 - shift
            known = bounds.get(source, (low, high))
            bounds[source] = (max(low, known[0]), min(high, known[1]))
    return bounds


def _lookup(node: fx.Node) -> tuple[fx.Node, Any] | None:
    """The table and the ids of an operation that reads rows of a matrix."""
    if node.op != "call_function":
        return None
    if node.target is aten.embedding.default:
        return node.args[0], node.args[1]  # type: ignore[return-value]
    if node.target is aten.index_select.default and node.args[1] == 0:
        table, ids = node.args[0], node.args[2]
        return (table, ids) if table.meta["val"].ndim == 2 else None  # type: ignore[union-attr, return-value]
    return None


def _source(node: Any) -> tuple[Any, int]:
    """Where ids come from, and the constant added to them on the way."""
    shift = 0
    while isinstance(node, fx.Node) and node.op == "call_function":
        schema = getattr(node.target, "_schema", None)
        name = schema.name.split("::")[1] if schema is not None else ""
        if name in ("add", "sub") and isinstance(node.args[1], int):
            shift += node.args[1] if name == "add" else -node.args[1]
        elif name not in _PASSING:
            return None, 0
        node = node.args[0]
    return node, shift
