"""An archive's program, screened and reduced to what running it needs, then rebuilt by torch's own deserialiser.

What is left out: stack traces, module stacks and other metadata, the calling structure (nested arguments become
flat keyword arguments, nested results one flat dictionary; torch's tree specs can import modules), and guards,
which :mod:`tensor_parallel.checkpoint.pt2_guards` evaluates itself. What is let through is checked against
:mod:`tensor_parallel.checkpoint.pt2_grammar` wherever torch would evaluate it or write it into source code.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from tensor_parallel.checkpoint.pt2_grammar import (
    check_expression,
    check_identifier,
    check_operator,
    check_tensor_name,
)
from tensor_parallel.errors import CheckpointError

_IDENTIFIER_KEYS = frozenset({"as_name"})
_TENSOR_NAME_KEYS = frozenset({"parameter_name", "buffer_name", "tensor_constant_name", "custom_obj_name"})
_NAMED_TABLES = frozenset({"tensor_values", "sym_int_values", "sym_float_values", "sym_bool_values"})
_VERIFIERS = frozenset({"TRAINING", "ATEN", ""})
_MAX_COUNTER = 1_000_000  # torch counts up to the number in a symbol's name


@dataclass(frozen=True)
class UserInput:
    """A tensor the program takes: its name, and for each dimension a size or the symbol of a free one."""

    name: str
    dtype: torch.dtype
    shape: tuple[int | str, ...]
    hints: tuple[int, ...]
    """The sizes it was exported with."""


@dataclass(frozen=True)
class Program:
    """A screened program: its JSON for torch, what it takes and gives, the range of each symbol, and guards still
    to be parsed.
    """

    document: dict[str, Any]
    inputs: tuple[UserInput, ...]
    outputs: tuple[str, ...]
    ranges: Mapping[str, tuple[int, int | None]]
    guards: tuple[str, ...]


def screen(document: dict[str, Any]) -> Program:
    """Raises :class:`CheckpointError` for anything in ``models/model.json`` that torch should not be given."""
    try:
        return _screen(document)
    except (KeyError, TypeError, AttributeError, IndexError, ValueError, RecursionError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"models/model.json is not an exported program: {type(error).__name__} {error}") from None


def rebuild(
    program: Program, state: dict[str, torch.Tensor], constants: dict[str, torch.Tensor]
) -> torch.export.ExportedProgram:
    """The ``ExportedProgram``, with the given parameters, buffers and constants. Raises :class:`CheckpointError`."""
    from torch._export.serde import schema
    from torch._export.serde.serialize import ExportedProgramDeserializer, _dict_to_dataclass

    try:
        parsed = _dict_to_dataclass(schema.ExportedProgram, program.document)
        return ExportedProgramDeserializer().deserialize(parsed, state, constants, None)
    except Exception as error:  # the deserialiser raises anything for a document that does not hold together
        first = str(error).strip().splitlines()[-1:] or [type(error).__name__]
        raise CheckpointError(
            f"models/model.json cannot be understood by torch {torch.__version__}: {first[0]}"
        ) from error


def _screen(document: dict[str, Any]) -> Program:
    graph_module = document["graph_module"]
    graph, signature = graph_module["graph"], graph_module["signature"]
    root = next(entry["signature"] for entry in graph_module["module_call_graph"] if entry["fqn"] == "")
    specs = signature["input_specs"]
    tensors = [at for at, spec in enumerate(specs) if _kind(spec) == "user_input" and not _is_constant_input(spec)]
    users = [specs[at]["user_input"]["arg"]["as_tensor"]["name"] for at in tensors]
    names = _input_names(root, [spec for spec in specs if _kind(spec) in ("user_input", "constant_input")], users)
    # By name: torch traces a rebuilt program with keyword arguments in the order they are given, and ours come sorted.
    order = sorted(range(len(names)), key=lambda k: names[k])
    names, users = [names[k] for k in order], [users[k] for k in order]
    states = [at for at, spec in enumerate(specs) if _kind(spec) not in ("user_input", "constant_input")]
    kept = [*states, *(tensors[k] for k in order)]
    flat_graph = {**graph, "inputs": [graph["inputs"][at] for at in kept]}
    flat_signature = {**signature, "input_specs": [specs[at] for at in kept]}
    outputs = _output_names(json.loads(root["out_spec"]), graph_module.get("treespec_namedtuple_fields", {}))
    limits = _ranges(document["range_constraints"])
    clean = {
        "graph_module": {
            "graph": _cleaned(flat_graph),
            "signature": _cleaned(flat_signature),
            "module_call_graph": [_flat_call(names, outputs)],
        },
        "opset_version": {str(key): int(value) for key, value in document["opset_version"].items()},
        "range_constraints": limits,
        "schema_version": {key: int(document["schema_version"][key]) for key in ("major", "minor")},
        "verifiers": _verifiers(document.get("verifiers", [])),
        "torch_version": str(document.get("torch_version", "")),
        "guards_code": [],
    }
    inputs = tuple(_user_input(name, graph["tensor_values"][user]) for name, user in zip(names, users, strict=True))
    ranges = {symbol: (int(limit["min_val"] or 0), limit["max_val"]) for symbol, limit in limits.items()}
    guards = tuple(str(guard) for guard in document.get("guards_code", []))
    return Program(clean, inputs, tuple(outputs), ranges, guards)


def _cleaned(value: Any, key: str = "") -> Any:
    """A copy without metadata, every text that torch evaluates or generates code from checked."""
    if isinstance(value, list):
        return [_cleaned(item, key) for item in value]
    if not isinstance(value, dict):
        _check_leaf(value, key)
        return value
    if "target" in value and "inputs" in value:
        check_operator(value["target"])
        value = {**value, "metadata": {}}
    if key in ("as_custom_obj", "custom_obj"):
        raise CheckpointError("the program holds a custom object, which would have to be unpickled")
    if key == "custom_obj_values" and value:
        raise CheckpointError("the program holds custom objects, which would have to be unpickled")
    if key in _NAMED_TABLES:
        for name in value:
            check_identifier(name, "value")
    if key == "device" or key == "as_device":
        return _on_host(value)
    is_argument = "arg" in value and "kind" in value  # the name is an operator's own argument's, and may be empty
    return {k: _cleaned(v, f"{key}.argument" if is_argument and k == "name" else k) for k, v in value.items()}


def _check_leaf(value: Any, key: str) -> None:
    if key == "expr_str":
        check_expression(value)
    elif key == "as_operator":
        check_operator(value)
    elif key in _TENSOR_NAME_KEYS:
        check_tensor_name(value, "tensor")
    elif key in _IDENTIFIER_KEYS or (key == "name" and value is not None):
        check_identifier(value, "value")
    elif key.endswith(".argument") and value not in ("", "from"):  # operators of torch do have an argument named `from`
        check_identifier(value, "argument")


def _on_host(device: Any) -> dict[str, Any]:
    """The program is planned on the CPU and placed afterwards, whatever it was exported on."""
    if not isinstance(device, dict) or device.get("type") not in ("cpu", "cuda"):
        raise CheckpointError(f"the program was exported for device {device!r}; only cpu and cuda are served")
    return {"type": "cpu", "index": None}


def _ranges(ranges: Mapping[str, Any]) -> dict[str, Any]:
    clean = {}
    for symbol, limits in ranges.items():
        check_expression(symbol)  # a symbol, or an expression such as `14 - s0`
        if any(int(number) > _MAX_COUNTER for number in re.findall(r"\d+", symbol)):
            raise CheckpointError(f"symbol {symbol} is not the name of a size")
        values = {key: limits.get(key) for key in ("min_val", "max_val")}
        if not all(value is None or type(value) is int for value in values.values()):
            raise CheckpointError(f"the range of {symbol} is not made of integers")
        clean[symbol] = values
    return clean


def _verifiers(names: Any) -> list[str]:
    if not all(name in _VERIFIERS for name in names):
        raise CheckpointError(f"the program is of a dialect that cannot be served: {names}")
    return list(names)


def _kind(spec: Mapping[str, Any]) -> str:
    (kind,) = spec
    return str(kind)


def _is_constant_input(spec: Mapping[str, Any]) -> bool:
    """An argument that was a number, a flag or None at export, and is built into the graph as such."""
    if _kind(spec) == "constant_input":
        return True
    if _kind(spec) != "user_input":
        return False
    (form,) = spec["user_input"]["arg"]
    if form in ("as_sym_int", "as_sym_float", "as_sym_bool"):
        raise CheckpointError("the program takes a free number as an argument; only tensors can be sent to it")
    return bool(form != "as_tensor")


def _input_names(root: Mapping[str, Any], specs: list[Any], users: list[str]) -> list[str]:
    """The caller's names of the tensors: the names of forward's arguments where those are tensors, else the graph's
    own.
    """
    given = root.get("forward_arg_names") or []
    names = list(users)
    if len(given) == len(specs):
        names = [name for name, spec in zip(given, specs, strict=True) if not _is_constant_input(spec)]
    for name in names:
        check_identifier(name, "input")
    if len(set(names)) != len(names):
        raise CheckpointError("two inputs of the program have one name")
    return names


def _flat_call(names: list[str], outputs: list[str]) -> dict[str, Any]:
    leaf: dict[str, Any] = {"type": None, "context": None, "children_spec": []}

    def dictionary(keys: list[str]) -> dict[str, Any]:
        return {"type": "builtins.dict", "context": json.dumps(keys), "children_spec": [leaf] * len(keys)}

    empty = {"type": "builtins.tuple", "context": "null", "children_spec": []}
    arguments = {"type": "builtins.tuple", "context": "null", "children_spec": [empty, dictionary(names)]}
    signature = {
        "inputs": [],
        "outputs": [],
        "in_spec": json.dumps([1, arguments]),
        "out_spec": json.dumps([1, dictionary(outputs)]),
        "forward_arg_names": names,
    }
    return {"fqn": "", "signature": signature}


def _output_names(spec: Any, named_tuples: Mapping[str, Any]) -> list[str]:
    version, tree = spec
    if version != 1:
        raise CheckpointError(f"the program's results are described in version {version}, which is not known")
    names = list(_leaf_names(tree, "", named_tuples))
    if any(not name.isprintable() or len(name) > 1000 for name in names):
        raise CheckpointError("a result of the program has an unprintable name")
    if len(set(names)) != len(names):
        raise CheckpointError("two results of the program have one name")
    return names


def _leaf_names(tree: Mapping[str, Any], prefix: str, named_tuples: Mapping[str, Any]) -> Iterator[str]:
    """Keys joined by dots; ``output`` for a lone tensor; ``output_0``, ... for members of a bare tuple, ``key.0``
    within a key.
    """
    kind, children = tree["type"], tree["children_spec"]
    if kind is None:
        yield prefix or "output"
        return
    keys = _keys(tree, named_tuples)
    for index, child in enumerate(children):
        if keys is None:
            name = f"{prefix}.{index}" if prefix else f"output_{index}"
        else:
            name = f"{prefix}.{keys[index]}" if prefix else str(keys[index])
        yield from _leaf_names(child, name, named_tuples)


def _keys(tree: Mapping[str, Any], named_tuples: Mapping[str, Any]) -> list[Any] | None:
    kind, context, count = tree["type"], tree["context"], len(tree["children_spec"])
    value = json.loads(context) if isinstance(context, str) else context
    if kind == "collections.namedtuple" or kind in named_tuples:
        fields = named_tuples.get(value if isinstance(value, str) else kind, {}).get("field_names")
        return fields if isinstance(fields, list) and len(fields) == count else None
    if kind == "collections.defaultdict" and isinstance(value, dict):
        value = value.get("dict_context")
    if isinstance(value, list) and len(value) == count and all(isinstance(key, str | int) for key in value):
        return value  # dictionaries, and registered result classes, whose context is the list of their keys
    return None


def _user_input(name: str, meta: Mapping[str, Any]) -> UserInput:
    from torch._export.serde.serialize import _SERIALIZE_TO_TORCH_DTYPE

    shape: list[int | str] = []
    hints: list[int] = []
    for size in meta["sizes"]:
        if "as_int" in size:
            shape.append(int(size["as_int"]))
            hints.append(int(size["as_int"]))
        else:
            check_expression(size["as_expr"]["expr_str"])
            shape.append(_symbol_of(size["as_expr"]["expr_str"]))
            hints.append(int((size["as_expr"].get("hint") or {}).get("as_int", 2)))
    return UserInput(name, _SERIALIZE_TO_TORCH_DTYPE[meta["dtype"]], tuple(shape), tuple(hints))


def _symbol_of(expression: str) -> str:
    """The symbol's name where the size is a symbol alone, else the whole expression."""
    inner = expression.removeprefix("Symbol('").partition("'")
    return inner[0] if expression.startswith("Symbol('") and expression.count("(") == 1 else expression
