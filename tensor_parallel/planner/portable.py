"""Plans for another process that is to run the same model: a rank that takes a lost one's place need not trace again.

A plan is written with its programs and their signatures as a safetensors file, behind its digest: constants as tensors,
all else as JSON in the metadata. Operations are operators of torch that write to nothing but what they make, and
functions of a short list, by name; to read it runs none of them. It is for a process of the same build: a program's
steps mean what this version of the package and of torch make of them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from keyword import iskeyword
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import tensor_parallel
from tensor_parallel.errors import NotPortable
from tensor_parallel.planner import callables, expressions
from tensor_parallel.planner.branches import Branches
from tensor_parallel.planner.make import program_digest
from tensor_parallel.planner.module import Compiled
from tensor_parallel.planner.plan import Plan
from tensor_parallel.planner.program import PerRank, Program, Ref, Step
from tensor_parallel.planner.signature import Signature
from tensor_parallel.planner.tensors import Tensors

_KEY = "plans"
_IMPORTS = "__enum__"
_SEAL = 32  # bytes of a SHA-256, before the file


def pack(plans: Sequence[Plan]) -> bytes:
    """``plans`` with what is needed to run them. Raises :class:`NotPortable`."""
    writer = _Writer()
    try:
        document = {"made_by": _made_by(), "plans": [writer.plan(plan) for plan in plans]}
        data = _sealed(save_tensors(writer.tensors, {_KEY: json.dumps(document, separators=(",", ":"))}))
    except NotPortable:
        raise
    except Exception as error:
        raise NotPortable(f"the plan cannot be written down: {type(error).__name__}: {error}") from error
    for plan, again in zip(plans, unpack(data), strict=True):
        if plan.digest() != again.digest() or _assumed(plan) != _assumed(again):
            raise NotPortable("a plan is not the same when it is read again")
    return data


def _assumed(plan: Plan) -> Any:
    """What a program takes for granted, of which the plan's digest says nothing."""
    made: Compiled | None = plan.artifact
    if made is None:
        return None
    signature, branches = made.signature, made.signature.branches
    texts = [
        str(part) for part in (signature.sizes, signature.guards, branches and (branches.steps, branches.decisions))
    ]
    return signature.in_spec, signature.out_spec, texts


def unpack(data: bytes) -> list[Plan]:
    """What :func:`pack` was given. Raises :class:`NotPortable` for what it has not made, or not by the same build."""
    seal, content = data[:_SEAL], data[_SEAL:]
    if seal != hashlib.sha256(content).digest():
        raise NotPortable("this is no plan, or not all of it")
    with _malformed():
        tensors = load_tensors(content)
        size = int.from_bytes(content[:8], "little")
        document = json.loads(json.loads(content[8 : 8 + size])["__metadata__"][_KEY])
        if document["made_by"] != _made_by():
            raise NotPortable(f"the plan was made by {document['made_by']}, this is {_made_by()}")
        plans = [_Reader(tensors).plan(item) for item in document["plans"]]
        for plan in plans:
            made: Compiled | None = plan.artifact
            if made is not None and program_digest(made.program, made.signature.constants) != plan.program:
                raise NotPortable("a program is not the one that its plan names")
    return plans


def unpack_for(data: bytes, model: nn.Module, world_size: int, digest: str) -> list[Plan]:
    """The plans for ``model``, of which the first must have this ``digest``: what peers run who have verified it.
    Raises :class:`NotPortable`."""
    plans = unpack(data)
    with _malformed():
        if not plans or plans[0].digest() != digest:
            raise NotPortable("it is not the plan that the other ranks go with")
    tensors = Tensors(model)
    for plan in plans:
        if plan.world_size != world_size:
            raise NotPortable(f"it is for {plan.world_size} ranks, not {world_size}")
        if plan.shards.keys() != tensors.stored.keys() or dict(plan.tied) != tensors.tied:
            raise NotPortable("it is of a model with other weights")
        if plan.total_bytes != tensors.total_bytes:
            raise NotPortable("it is of a model with weights of other sizes")
        program = plan.artifact.program if plan.artifact is not None else Program(plan.world_size)
        if {*program.states, *program.updates} - {*tensors.stored, *tensors.tied}:
            raise NotPortable("its program has weights that the model lacks")
    return [plan if plan.verified == "no" else replace(plan, verified="by its peers") for plan in plans]


@contextmanager
def _malformed() -> Iterator[None]:
    try:
        yield
    except NotPortable:
        raise
    except Exception as error:  # readers of text and makers of expressions raise anything
        raise NotPortable(f"this is no plan: {type(error).__name__}: {error}") from error


def _sealed(content: bytes) -> bytes:
    return hashlib.sha256(content).digest() + content


@cache
def _made_by() -> str:
    """Names the code that decides what a plan means."""
    found = hashlib.sha256()
    root = Path(tensor_parallel.__file__).parent
    for path in sorted(root.rglob("*.py")):
        found.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes())
    return f"tensor_parallel {found.hexdigest()[:16]} on torch {torch.__version__}"


class _Writer:
    """Plain values as they are, everything else as an object with one key, which says what it is."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}

    def plan(self, plan: Plan) -> dict[str, Any]:
        compiled: Compiled | None = plan.artifact
        if (plan.mode == "graph") is not (compiled is not None):
            raise NotPortable("the plan was read from text")
        data: dict[str, Any] = {"plan": json.loads(plan.to_json())}
        if compiled is not None:
            data["program"] = self._program(compiled.program)
            data["signature"] = self._signature(compiled.signature)
            data["names"] = compiled.names
        return data

    def _program(self, program: Program) -> dict[str, Any]:
        return {
            "ranks": program.ranks,
            "inputs": program.inputs,
            "states": program.states,
            "constants": program.constants,
            "steps": [self._step(step) for step in program.steps],
            "outputs": self.value(program.outputs),
            "updates": self.value(program.updates),
            "size": program.size,
        }

    def _step(self, step: Step) -> list[Any]:
        kwargs = {name: self.value(value) for name, value in step.kwargs.items()}
        return [self.value(step.fn), [self.value(value) for value in step.args], kwargs, step.out, step.source]

    def _signature(self, signature: Signature) -> dict[str, Any]:
        branches = signature.branches
        return {
            "in_spec": _tree_text(signature.in_spec),
            "out_spec": _tree_text(signature.out_spec),
            "example": self.value(signature.example),
            "sizes": [sizes and [expressions.dump(size) for size in sizes] for sizes in signature.sizes],
            "constants": {name: self._constant(tensor) for name, tensor in signature.constants.items()},
            "assignments": [
                [[expressions.dump(symbol), value] for symbol, value in assigned.items()]
                for assigned in signature.assignments
            ],
            "guards": [expressions.dump(guard) for guard in signature.guards],
            "branches": None if branches is None else self._branches(branches),
        }

    def _branches(self, branches: Branches) -> dict[str, Any]:
        return {
            "inputs": branches.inputs,
            "constants": [[number, self._constant(tensor)] for number, tensor in branches.constants.items()],
            "steps": [self._step(step) for step in branches.steps],
            "conditions": branches.conditions,
            "decisions": branches.decisions,
        }

    def _constant(self, tensor: Tensor) -> Any:
        """Strides are not written down, and a program may have been made for those it has."""
        if not tensor.is_contiguous():
            raise NotPortable("a constant of the model is not contiguous")
        return self.value(tensor)

    def value(self, value: Any) -> Any:
        if value is None or type(value) in (bool, int, float, str):
            return value
        if isinstance(value, Ref):
            return {"ref": value.id}
        if isinstance(value, PerRank):
            return {"ranks": [self.value(item) for item in value.values]}
        if isinstance(value, list):  # the trace's own immutable lists included
            return [self.value(item) for item in value]
        if type(value) in (tuple, torch.Size):
            return {"tuple": [self.value(item) for item in value]}
        if isinstance(value, dict):
            return {"dict": [[self.value(key), self.value(item)] for key, item in value.items()]}
        if isinstance(value, range):
            return {"range": [value.start, value.stop, value.step]}
        if isinstance(value, complex):
            return {"complex": [value.real, value.imag]}
        if isinstance(value, (torch.dtype, torch.layout, torch.memory_format)):
            return {"torch": str(value).removeprefix("torch.")}
        if isinstance(value, torch.device):
            return {"device": str(value)}
        if isinstance(value, Tensor):
            key = str(len(self.tensors))
            self.tensors[key] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
            return {"tensor": key}
        return {"function": callables.dump(value, self.value)}


class _Reader:
    """Raises whatever comes of data that :class:`_Writer` has not written."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors

    def plan(self, data: Mapping[str, Any]) -> Plan:
        plan = Plan.from_json(json.dumps(data["plan"]))
        if plan.mode != "graph":
            return plan
        signature = self._signature(data["signature"])
        return replace(plan, artifact=Compiled(signature, self._program(data["program"]), list(data["names"])))

    def _program(self, data: Mapping[str, Any]) -> Program:
        return Program(
            ranks=int(data["ranks"]),
            inputs=[int(number) for number in data["inputs"]],
            states={str(name): int(number) for name, number in data["states"].items()},
            constants={str(name): int(number) for name, number in data["constants"].items()},
            steps=[self._step(item) for item in data["steps"]],
            outputs=self.value(data["outputs"]),
            updates=self.value(data["updates"]),
            size=int(data["size"]),
        )

    def _step(self, data: Sequence[Any]) -> Step:
        fn, args, kwargs, out, source = data
        named = {str(name): self.value(value) for name, value in kwargs.items()}
        if not all(name.isidentifier() and not iskeyword(name) for name in named):
            raise ValueError(f"{list(named)} are not all names of arguments")
        return Step(self.value(fn), tuple(self.value(value) for value in args), named, int(out), str(source))

    def _signature(self, data: Mapping[str, Any]) -> Signature:
        return Signature(
            in_spec=_tree(data["in_spec"]),
            out_spec=_tree(data["out_spec"]),
            example=self.value(data["example"]),
            sizes=[None if sizes is None else tuple(map(expressions.load, sizes)) for sizes in data["sizes"]],
            constants={str(name): self.value(tensor) for name, tensor in data["constants"].items()},
            assignments=tuple(
                {expressions.load(symbol): int(value) for symbol, value in assigned} for assigned in data["assignments"]
            ),
            guards=tuple(map(expressions.load, data["guards"])),
            branches=None if data["branches"] is None else self._branches(data["branches"]),
        )

    def _branches(self, data: Mapping[str, Any]) -> Branches:
        return Branches(
            inputs=[None if number is None else int(number) for number in data["inputs"]],
            constants={int(number): self.value(tensor) for number, tensor in data["constants"]},
            steps=[self._step(item) for item in data["steps"]],
            conditions=[int(number) for number in data["conditions"]],
            decisions=[bool(decision) for decision in data["decisions"]],
        )

    def value(self, data: Any) -> Any:
        if isinstance(data, list):
            return [self.value(item) for item in data]
        if not isinstance(data, dict):
            return data
        [(kind, content)] = data.items()
        match kind:
            case "ref":
                return Ref(int(content))
            case "ranks":
                return PerRank(tuple(self.value(item) for item in content))
            case "tuple":
                return tuple(self.value(item) for item in content)
            case "dict":
                return {self.value(key): self.value(item) for key, item in content}
            case "range":
                return range(*content)
            case "complex":
                return complex(*content)
            case "torch":
                found = getattr(torch, content)
                if not isinstance(found, (torch.dtype, torch.layout, torch.memory_format)):
                    raise ValueError(f"torch.{content} is no type or layout")
                return found
            case "device":
                return torch.device(content)
            case "tensor":
                return self._tensors[content]
            case "function":
                return callables.load(content, self.value)
        raise ValueError(f"no value is of kind {kind!r}")


def _tree_text(spec: pytree.TreeSpec) -> str:
    text = pytree.treespec_dumps(spec)
    if _tree(text) != spec:
        raise NotPortable("the model takes or gives what cannot be written down")
    return text


def _tree(text: str) -> pytree.TreeSpec:
    if _IMPORTS in text:
        raise NotPortable("the model takes or gives enumerations")  # torch would import whatever module they name
    return pytree.treespec_loads(text)
