"""Hostile ``.pt2`` archives: each would run code under ``torch.export.load``; here each is refused and nothing runs."""

from __future__ import annotations

import io
import json
import pickle
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tensor_parallel.checkpoint import open_source
from tensor_parallel.checkpoint.pt2_grammar import check_expression, check_identifier, check_operator, check_tensor_name
from tensor_parallel.checkpoint.pt2_guards import parse_guard
from tensor_parallel.errors import CheckpointError
from tests.checkpoints import mlp_archive

MODEL = "models/model.json"
WEIGHTS = "data/weights/model_weights_config.json"
CONSTANTS = "data/constants/model_constants_config.json"
SAMPLES = "data/sample_inputs/model.pt"

Members = dict[str, bytes]


class Touch:
    """Unpickled, it creates a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return (open, (str(self.marker), "w"))


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return mlp_archive(tmp_path_factory.mktemp("honest") / "model.pt2")


def members_of(path: Path) -> Members:
    with zipfile.ZipFile(path) as archive:
        return {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}


def write(path: Path, members: Members, **infos: Any) -> Path:
    with zipfile.ZipFile(path, "w", infos.pop("compression", zipfile.ZIP_STORED)) as archive:
        for name, data in members.items():
            archive.writestr(f"model/{name}", data)
    return path


def first_node(target: str) -> Callable[[Any], None]:
    return lambda document: graph_of(document)["nodes"][0].update(target=target)


def call_of(document: Any) -> Any:
    return document["graph_module"]["module_call_graph"][0]["signature"]


def weight(**changes: Any) -> Callable[[Members], None]:
    return edited(WEIGHTS, lambda config: config["config"]["up.weight"].update(changes))


def weight_meta(**changes: Any) -> Callable[[Members], None]:
    return edited(WEIGHTS, lambda config: config["config"]["up.weight"]["tensor_meta"].update(changes))


def edited(member: str, edit: Callable[[Any], None]) -> Callable[[Members], None]:
    def apply(members: Members) -> None:
        value = json.loads(members[member])
        edit(value)
        members[member] = json.dumps(value).encode()

    return apply


def graph_of(document: Any) -> Any:
    return document["graph_module"]["graph"]


def saved(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def expression(marker: Path) -> Callable[[Members], None]:
    def edit(document: Any) -> None:
        graph_of(document)["tensor_values"]["x"]["sizes"][0]["as_expr"]["expr_str"] = f"open({str(marker)!r}, 'w')"

    return edited(MODEL, edit)


def pickled_weight(marker: Path) -> Callable[[Members], None]:
    def apply(members: Members) -> None:
        weight(use_pickle=True)(members)
        members["data/weights/weight_0"] = saved(Touch(marker))

    return apply


def pickled_constant(marker: Path) -> Callable[[Members], None]:
    def apply(members: Members) -> None:
        edited(CONSTANTS, lambda config: config["config"]["shift"].update(use_pickle=True))(members)
        members["data/constants/tensor_0"] = saved(Touch(marker))

    return apply


def sample_inputs(marker: Path) -> Callable[[Members], None]:
    def apply(members: Members) -> None:
        members[SAMPLES] = saved(((Touch(marker),), {}))

    return apply


WAYS = {f.__name__: f for f in (expression, pickled_weight, pickled_constant, sample_inputs)}


@pytest.fixture(scope="module")
def exploits(honest: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """For each way: the archive, and the file it would create."""
    folder, made = tmp_path_factory.mktemp("exploits"), {}
    for name, way in WAYS.items():
        members, marker = members_of(honest), folder / f"{name}.ran"
        way(marker)(members)
        made[name] = (write(folder / f"{name}.pt2", members), marker)
    return made


@pytest.fixture(scope="module")
def victims(honest: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The markers of a second set of the same archives, after plain torch has loaded them in another process."""
    folder, markers = tmp_path_factory.mktemp("victims"), {}
    for name, way in WAYS.items():
        members, markers[name] = members_of(honest), folder / f"{name}.ran"
        way(markers[name])(members)
        write(folder / f"{name}.pt2", members)
    script = (
        "import pathlib, sys, torch\n"
        "for path in sorted(pathlib.Path(sys.argv[1]).glob('*.pt2')):\n"
        "    try: torch.export.load(path)\n"
        "    except Exception: pass\n"
    )
    subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script, str(folder)], check=True, timeout=50, capture_output=True
    )
    return markers


@pytest.mark.parametrize("name", WAYS)
def test_torch_itself_would_run_the_code(name: str, victims: dict[str, Path]) -> None:
    assert victims[name].exists()


@pytest.mark.parametrize("name", WAYS)
def test_a_hostile_archive_is_refused_and_runs_nothing(name: str, exploits: dict[str, tuple[Path, Path]]) -> None:
    archive, marker = exploits[name]
    with pytest.raises(CheckpointError):
        open_source(archive, archive.parent)
    assert not marker.exists()


def test_a_pickle_that_names_its_callable_in_another_way_is_refused(honest: Path, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    members, buffer = members_of(honest), io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as inner:
        inner.writestr("archive/data.pkl", pickle.dumps(Touch(marker), protocol=4))  # STACK_GLOBAL
    members[SAMPLES] = buffer.getvalue()
    with pytest.raises(CheckpointError, match="STACK_GLOBAL"):
        open_source(write(tmp_path / "m.pt2", members), tmp_path)
    assert not marker.exists()


def rename_node(document: Any) -> None:
    text = json.dumps(graph_of(document)).replace('"relu"', '"relu = print(1) #"')
    document["graph_module"]["graph"] = json.loads(text)


def rename_parameter(document: Any) -> None:
    spec = document["graph_module"]["signature"]["input_specs"][0]["parameter"]
    spec["parameter_name"] = 'up.weight"), print("run'


PROGRAMS: dict[str, tuple[str, Callable[[Any], None]]] = {
    "guard": ("guard", lambda d: d.update(guards_code=["__import__('os').system('true') == 0"])),
    "operator of torch": ("operator", first_node("torch.hub.load")),
    "operator of os": ("operator", first_node("torch.serialization.os.system")),
    "operator that opens files": ("operator", first_node("torch.ops.aten.from_file.default")),
    "operator of TorchScript": ("operator", first_node("torch.ops.aten.save.default")),
    "attrgetter": ("operator", first_node("_operator.attrgetter")),
    "extension operator": ("operator", first_node("#x:y")),
    "code in a node's name": ("plain name", rename_node),
    "code in a parameter's name": ("plain dotted name", rename_parameter),
    "code in an argument's name": (
        "plain name",
        lambda d: call_of(d).update(forward_arg_names=["x, y=print(1)", "mask"]),
    ),
    "custom object": ("custom object", lambda d: graph_of(d).update(custom_obj_values={"o": {}})),
    "huge counter": ("size", lambda d: d.update(range_constraints={"u999999999": {"min_val": 0, "max_val": None}})),
    "another device": (
        "device",
        lambda d: graph_of(d)["tensor_values"]["x"].update(device={"type": "meta", "index": None}),
    ),
    "unknown dialect": ("dialect", lambda d: d.update(verifiers=["EDGE"])),
    "no graph": ("not an exported program", lambda d: d["graph_module"].pop("graph")),
    "another schema": ("cannot be understood", lambda d: d.update(schema_version={"major": 99, "minor": 0})),
}


@pytest.mark.parametrize("what", PROGRAMS)
def test_a_hostile_program_is_refused(what: str, honest: Path, tmp_path: Path) -> None:
    reason, edit = PROGRAMS[what]
    members = members_of(honest)
    edited(MODEL, edit)(members)
    with pytest.raises(CheckpointError, match=reason):
        open_source(write(tmp_path / "m.pt2", members), tmp_path).build_meta()


def test_a_tree_spec_that_would_import_a_module_is_never_given_to_torch(honest: Path, tmp_path: Path) -> None:
    context = {"default_factory_module": "antigravity", "default_factory_name": "x", "dict_context": ["hidden"]}
    leaf = {"type": None, "context": None, "children_spec": []}
    spec = json.dumps([1, {"type": "collections.defaultdict", "context": context, "children_spec": [leaf] * 4}])
    members = members_of(honest)
    edited(MODEL, lambda d: call_of(d).update(out_spec=spec))(members)
    source = open_source(write(tmp_path / "m.pt2", members), tmp_path)
    source.build_meta()  # its four results are simply not named by that context
    assert "antigravity" not in sys.modules


ZIPS: dict[str, tuple[str, Callable[[Members], None]]] = {
    "path traversal": ("lies outside|unsafe", lambda m: m.update({"../../etc/passwd": b"x"})),
    "unknown member": ("no exported program has", lambda m: m.update({"data/run.py": b"x"})),
    "legacy pickled weights": ("pickled", lambda m: m.update({"data/weights/model.pt": b"x"})),
    "custom object": ("pickled", lambda m: m.update({"data/constants/custom_obj_0": b"x"})),
    "machine code": ("machine code", lambda m: m.update({"data/aotinductor/model/lib.so": b"x"})),
    "second program": ("one program", lambda m: m.update({"models/other.json": b"{}"})),
    "another version": ("archive_version", lambda m: m.update({"archive_version": b"7"})),
    "big endian": ("byteorder", lambda m: m.update({"byteorder": b"big"})),
    "no program": ("missing", lambda m: m.pop(MODEL)),
    "program that is no JSON": ("not valid JSON", lambda m: m.update({MODEL: b"{"})),
    "program nested too deep": ("not valid JSON", lambda m: m.update({MODEL: b"[" * 100_000})),
    "payload missing": ("missing", lambda m: m.pop("data/weights/weight_0")),
    "payload truncated": ("truncated", lambda m: m.update({"data/weights/weight_0": b"123"})),
    "payload elsewhere": (
        "where no tensor lies",
        weight(path_name="../../models/model.json"),
    ),
    "wrong shape": (
        "needs",
        weight_meta(sizes=[{"as_int": 16}, {"as_int": 40}]),
    ),
    "missing tensor": ("up.weight is missing", edited(WEIGHTS, lambda c: c["config"].pop("up.weight"))),
    "missing constant": ("shift is missing", edited(CONSTANTS, lambda c: c["config"].pop("shift"))),
    "negative stride": (
        "impossible",
        weight_meta(strides=[{"as_int": -16}, {"as_int": 1}]),
    ),
}


@pytest.mark.parametrize("what", ZIPS)
def test_a_damaged_or_hostile_zip_is_refused(what: str, honest: Path, tmp_path: Path) -> None:
    reason, edit = ZIPS[what]
    members = members_of(honest)
    edit(members)
    with pytest.raises(CheckpointError, match=reason):
        open_source(write(tmp_path / "m.pt2", members), tmp_path).build_meta()


def test_a_zip_bomb_is_refused_unread(honest: Path, tmp_path: Path) -> None:
    members = members_of(honest) | {"data/weights/weight_9": bytes(1 << 24)}
    with pytest.raises(CheckpointError, match="compressed"):
        open_source(write(tmp_path / "m.pt2", members, compression=zipfile.ZIP_DEFLATED), tmp_path)


def test_two_members_of_one_name_are_refused(honest: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "m.pt2", members_of(honest))
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(path, "a") as archive:
        archive.writestr(f"model/{MODEL}", b"{}")
    with pytest.raises(CheckpointError, match="twice"):
        open_source(path, tmp_path)


def test_a_damaged_program_is_noticed_by_its_checksum(honest: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "m.pt2", members_of(honest))
    data = path.read_bytes()
    at = data.index(b'"schema_version"')
    path.write_bytes(data[:at] + b'"Schema_version"' + data[at + 16 :])
    with pytest.raises(CheckpointError, match="checksum"):
        open_source(path, tmp_path)


@pytest.mark.parametrize("cut", [0.0, 0.3, 0.9, 0.999])
def test_a_truncated_archive_is_refused(cut: float, honest: Path, tmp_path: Path) -> None:
    data = honest.read_bytes()
    (tmp_path / "m.pt2").write_bytes(data[: int(len(data) * cut)])
    with pytest.raises(CheckpointError, match=re.escape("m.pt2")):
        open_source(tmp_path / "m.pt2", tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        "s0",
        "s0 + 1",
        "8*s12",
        "Mul(Integer(8), Symbol('s27', positive=True, integer=True))",
        "FloorDiv(s0, 2)",
        "s0**2",
        "Max(1, s0 - 3)",
        "Eq(Mod(s0, 8), 0)",
        "Float('1.5', precision=53)",
        "u3",
        "-s0",
        "Pow(Symbol('s1', integer=True), Integer(2))",
    ],
)
def test_size_expressions_pass(text: str) -> None:
    check_expression(text)


@pytest.mark.parametrize(
    "text",
    [
        "open('x')",
        "().__class__",
        "s0.__class__",
        "Symbol('s0').func",
        "Symbol('__import__')",
        "lambda: 0",
        "[s0]",
        "{s0: 1}",
        "(s0 := 1)",
        "s0 if s0 else 1",
        "f'{s0}'",
        "exec('1')",
        "Function('f')(s0)",
        "9**9**9",
        "9**999999",
        "Pow(9, Pow(9, 9))",
        "1" * 5000,
        "s0 " * 5000,
        "",
        "S('open')",
        "sympify('1')",
        "Symbol('s0', cls=open)",
        "*s0",
        "Max(*s0)",
        "s0[0]",
        "print",
        7,
        "(" * 3000 + "s0" + ")" * 3000,
    ],
)
def test_anything_else_is_no_size_expression(text: Any) -> None:
    with pytest.raises(CheckpointError):
        check_expression(text)


@pytest.mark.parametrize(
    "target",
    [
        "torch.ops.aten.linear.default",
        "torch.ops.aten.mul.Tensor",
        "_operator.getitem",
        "_operator.add",
        "torch.sym_max",
        "math.trunc",
        "torch.ops.higher_order.wrap_with_set_grad_enabled",
    ],
)
def test_operators_of_programs_pass(target: str) -> None:
    check_operator(target)


@pytest.mark.parametrize(
    "target",
    [
        "torch.load",
        "torch.ops.load_library",
        "torch.ops.aten.linear",
        "math.__loader__",
        "_operator.call",
        "_operator.methodcaller",
        "torch.sym_max.__globals__",
        "torch.ops.higher_order.call_torchbind",
        "torch.ops.aten.nothing.default",
        None,
        "torch.ops.aten.__class__.default",
        "torch.utils.cpp_extension.load_inline",
    ],
)
def test_nothing_else_is_an_operator(target: Any) -> None:
    with pytest.raises(CheckpointError):
        check_operator(target)


@pytest.mark.parametrize("name", ["x y", "", "1x", "a-b", "x;y", "é", None, "lambda", "a.b"])
def test_names_that_become_source_are_plain(name: Any) -> None:
    with pytest.raises(CheckpointError):
        check_identifier(name, "name")


@pytest.mark.parametrize("name", ['a"b', "a..b", "", ".a", "a b", "a.b.", None])
def test_tensor_names_are_plain(name: Any) -> None:
    with pytest.raises(CheckpointError):
        check_tensor_name(name, "tensor")


def test_guards_are_evaluated_on_sizes_alone() -> None:
    names, ranks = {"L['x']": "x", "L['mask']": "mask"}, {"x": 3, "mask": 2}
    sizes = {"x": (4, 6, 8), "mask": (4, 6)}
    holds = {
        "L['x'].size()[0] == L['mask'].size()[0]": True,
        "L['x'].size()[1] % 4 == 0": False,
        "2 <= L['x'].size()[1] and L['x'].size()[1] <= 512": True,
        "L['x'].shape[1] // 0 == 1": False,
        "not (L['x'].size()[0] != max(1, -(-4)))": True,
        "FloorDiv(L['x'].size()[1], 2) * 2 == 6 or 1 > 2": True,
    }
    assert {text: parse_guard(text, names, ranks).holds(sizes) for text in holds} == holds


@pytest.mark.parametrize(
    "text", ["L['x'].numel() == 3", "L['y'].size()[0] == 1", "L['x'].size()[9] == 1", "print(1)", "L['x'].size()[0]["]
)
def test_other_guards_refuse_the_archive(text: str) -> None:
    with pytest.raises(CheckpointError, match="guard"):
        parse_guard(text, {"L['x']": "x"}, {"x": 3})
