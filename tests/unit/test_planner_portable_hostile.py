"""What is read as a plan, damaged or made to harm: refused, whatever it is."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable
from typing import Any

import pytest
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from tensor_parallel.errors import NotPortable
from tensor_parallel.planner import make_plan, portable
from tensor_parallel.planner.portable import pack, unpack, unpack_for
from tests.unit.test_planner_portable import mlp


def test_only_what_was_packed_is_a_plan() -> None:
    model, example, _ = mlp()
    data = pack([make_plan(model, example, 2)])
    numbers = random.Random(0)
    for _ in range(200):
        at = numbers.randrange(len(data))
        changed = data[:at] + bytes([data[at] ^ (1 << numbers.randrange(8))]) + data[at + 1 :]
        with pytest.raises(NotPortable):
            unpack(changed)
    for length in (0, 8, 40, len(data) - 1):
        with pytest.raises(NotPortable):
            unpack(data[:length])


def edited(data: bytes, edit: Callable[[dict[str, Any]], None]) -> bytes:
    """A document that was changed by somebody who can seal it."""
    content = data[portable._SEAL :]
    size = int.from_bytes(content[:8], "little")
    document = json.loads(json.loads(content[8 : 8 + size])["__metadata__"][portable._KEY])
    edit(document)
    return portable._sealed(save_tensors(load_tensors(content), {portable._KEY: json.dumps(document)}))


@pytest.mark.parametrize(
    "function",
    [
        ["operator", "aten.from_file.default"],
        ["operator", "aten.from_file.out"],
        ["operator", "aten.add_.Tensor"],
        ["operator", "aten.set_.source_Tensor"],
        ["operator", "c10d.barrier.default"],
        ["operator", "debugprims.load_tensor.default"],
        ["operator", "load_library.default.x"],
        ["operator", "aten.no_such_operator.default"],
        ["operator", "aten.add"],
        ["library", "torch", "load"],
        ["library", "operator", "call"],
        ["library", "os", "system"],
        ["own", "os", "system"],
        ["own", "tensor_parallel.planner.runtime", "torch"],
        ["own", "tensor_parallel.planner.rules.registry", "Any"],
        ["collective", "Step", []],
        ["collective", "AllReduce", [1, 2, 3]],
        ["eval", "1"],
        [],
        None,
    ],
)
def test_a_program_calls_what_programs_may_call(function: Any) -> None:
    model, example, _ = mlp()
    plan = make_plan(model, example, 2)

    def edit(document: dict[str, Any]) -> None:
        document["plans"][0]["program"]["steps"][0][0] = {"function": function}

    with pytest.raises(NotPortable):
        unpack(edited(pack([plan]), edit))


INJECTED = "0\n    import os; os.environ['INJECTED'] = 'yes'"


def give_an_input_another_name(program: dict[str, Any], _: dict[str, Any]) -> None:
    program["inputs"][0] = INJECTED


def give_a_state_another_name(program: dict[str, Any], _: dict[str, Any]) -> None:
    program["states"] = dict.fromkeys(program["states"], INJECTED)


def name_an_argument(program: dict[str, Any], _: dict[str, Any]) -> None:
    program["steps"][0][2] = {INJECTED: 1}


def name_a_step(program: dict[str, Any], _: dict[str, Any]) -> None:
    program["steps"][0][3] = INJECTED


def import_a_module(_: dict[str, Any], signature: dict[str, Any]) -> None:
    enumeration = {"__enum__": True, "fqn": "antigravity:Any", "name": "x"}
    spec = {"type": "builtins.dict", "context": json.dumps([enumeration]), "children_spec": []}
    signature["in_spec"] = json.dumps([1, spec])


def wire_other_weights(program: dict[str, Any], _: dict[str, Any]) -> None:
    names = list(program["states"])
    program["states"] = dict(zip(names, reversed(list(program["states"].values())), strict=True))


def compute_for_ever(_: dict[str, Any], signature: dict[str, Any]) -> None:
    signature["guards"] = [["Eq", ["Pow", 10, ["Pow", 10, 9]], 1]]


def compute_large_numbers(_: dict[str, Any], signature: dict[str, Any]) -> None:
    power: Any = 9
    for _ in range(40):
        power = ["Pow", power, 16]
    signature["guards"] = [["Eq", power, 1]]


@pytest.mark.parametrize(
    "change",
    [
        give_an_input_another_name,
        give_a_state_another_name,
        name_an_argument,
        name_a_step,
        import_a_module,
        wire_other_weights,
        compute_for_ever,
        compute_large_numbers,
    ],
)
def test_a_plan_is_no_code(change: Callable[[dict[str, Any], dict[str, Any]], None]) -> None:
    model, example, _ = mlp()
    plan = make_plan(model, example, 2)

    def edit(document: dict[str, Any]) -> None:
        change(document["plans"][0]["program"], document["plans"][0]["signature"])

    with pytest.raises(NotPortable):
        unpack_for(edited(pack([plan]), edit), model, 2, plan.digest())
    assert "antigravity" not in sys.modules


def test_malformed_documents_are_refused() -> None:
    """Whatever is in the place of any value, the answer is that this is no plan, or a plan with another digest."""
    model, example, _ = mlp()
    plan = make_plan(model, example, 2)
    data = pack([plan])
    numbers = random.Random(1)
    junk = (None, -1, 1e400, "x", [], {}, {"ref": "x"}, {"tensor": "no"}, {"torch": "load"}, ["Pow", 9, 9], [[[]]])
    refused = 0
    for _ in range(300):

        def edit(document: dict[str, Any]) -> None:
            item: Any = document
            while True:
                keys = list(item) if isinstance(item, dict) else range(len(item))
                key = numbers.choice(keys)
                if not isinstance(item[key], (dict, list)) or not item[key] or numbers.random() < 0.1:
                    item[key] = numbers.choice(junk)
                    return
                item = item[key]

        try:
            unpack_for(edited(data, edit), model, 2, plan.digest())
        except NotPortable:
            refused += 1
    assert refused > 150
