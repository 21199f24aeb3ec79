"""``.pt2`` archives made with ``torch.export.save``: no user code on the server, no pickle, weights read by slices."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tensor_parallel.checkpoint.constraints import Constraints
from tensor_parallel.checkpoint.expression import View
from tensor_parallel.checkpoint.lazy import LazyTensor
from tensor_parallel.checkpoint.options import SourceOptions, random_input
from tensor_parallel.checkpoint.pt2_archive import open_archive
from tensor_parallel.checkpoint.pt2_grammar import check_tensor_name
from tensor_parallel.checkpoint.pt2_guards import parse_guard
from tensor_parallel.checkpoint.pt2_program import rebuild, screen
from tensor_parallel.checkpoint.source import Source, given_inputs
from tensor_parallel.checkpoint.stored import StoredTensor
from tensor_parallel.checkpoint.transfer import read_whole
from tensor_parallel.errors import CheckpointError, InvalidInput

_MODEL = "models/model.json"
_MAX_EXAMPLE = 1 << 24


class ArchiveSource(Source):
    """An exported program. Its tensors keep their dtype: the graph computes in it."""

    kind = "pt2"

    def __init__(self, path: Path, options: SourceOptions) -> None:
        super().__init__(path, options)
        if options.dtype is not None:
            raise InvalidInput("option dtype: an exported program runs in the dtype it was exported in")
        if options.kwargs:
            raise InvalidInput("option arguments: an exported program takes none")
        self._archive = open_archive(path)
        self._weights = self._payloads("weights", "weight_")
        self._constants = self._payloads("constants", "tensor_")
        self._document = self._archive.read_json(_MODEL)
        self._program = screen(self._document)
        self._constraints = self._parsed_constraints()

    def _build(self) -> tuple[nn.Module, dict[str, Tensor]]:
        program = self._program
        signature = program.document["graph_module"]["signature"]
        held, self.unused = self._held(signature)
        empty = {id(value): _on_meta(value, name in self._parameters) for name, value in held.items()}
        constants = {name: read_whole(value.node) for name, value in self._constants.items()}
        rebuilt = rebuild(program, {name: empty[id(value)] for name, value in held.items()}, constants)
        model = rebuilt.module(check_guards=False)
        for switch in ("train", "eval"):  # torch blocks them here; the mode is in the graph and changes nothing
            model.__dict__.pop(switch, None)
        for name in constants:  # a copy of the module would make buffers of them, which nobody knows
            if isinstance(vars(model).get(name), Tensor):
                model.register_buffer(name, vars(model).pop(name), persistent=False)
        named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
        return model, {name: held[name] if name in held else value.detach() for name, value in named}

    def _describe(self) -> Mapping[str, object]:
        return {"program": self._document, "inputs": self.options.inputs}

    def stored(self) -> Iterator[StoredTensor]:
        for value in (*self._weights.values(), *self._constants.values()):
            yield from value.node.leaves()

    def example_inputs(self) -> dict[str, Tensor]:
        if self.options.inputs:
            return self._given()
        examples = {}
        for seed, given in enumerate(self._program.inputs):
            if torch.Size(given.hints).numel() > _MAX_EXAMPLE:
                raise InvalidInput(
                    f"input {given.name} was exported with shape {given.hints}: give a smaller one in option inputs"
                )
            examples[given.name] = random_input(given.hints, given.dtype, seed=seed)
        return examples

    def _given(self) -> dict[str, Tensor]:
        """Example inputs of the given specs, which must be those of the program."""
        given, wanted = given_inputs(self.options.inputs), {entry.name: entry for entry in self._program.inputs}
        if set(given) != set(wanted):
            raise InvalidInput(f"option inputs: the program takes {', '.join(wanted)}, not {', '.join(given)}")
        for name, value in given.items():
            if value.dtype != wanted[name].dtype:
                got, want = (str(dtype).removeprefix("torch.") for dtype in (value.dtype, wanted[name].dtype))
                raise InvalidInput(f"option inputs: {name} is {got}, the program takes {want}")
        self._constraints.check({name: value.shape for name, value in given.items()})
        return given

    def constraints(self) -> Constraints:
        return self._constraints

    def _parsed_constraints(self) -> Constraints:
        program = self._program
        sources = {f"L['{given.name}']": given.name for given in program.inputs}
        sources |= {f"L['flat_args'][{at}]": given.name for at, given in enumerate(program.inputs)}
        ranks = {given.name: len(given.shape) for given in program.inputs}
        guards = tuple(parse_guard(text, sources, ranks) for text in program.guards)
        return Constraints({given.name: given.shape for given in program.inputs}, program.ranges, guards)

    def _held(self, signature: Mapping[str, Any]) -> tuple[dict[str, LazyTensor], tuple[str, ...]]:
        """What the program uses of the stored weights, each shape compared with the one the graph was made for."""
        values = self._program.document["graph_module"]["graph"]["tensor_values"]
        held: dict[str, LazyTensor] = {}
        for spec in signature["input_specs"]:
            ((kind, entry),) = spec.items()
            if kind == "parameter" or (kind == "buffer" and entry["persistent"]):
                name = entry[f"{kind}_name"]
                if name not in self._weights:
                    raise CheckpointError(f"{self.path.name}: tensor {name} is missing from the archive")
                wanted = _static_shape(values[entry["arg"]["name"]])
                if tuple(self._weights[name].shape) != wanted:
                    got = tuple(self._weights[name].shape)
                    raise CheckpointError(
                        f"{self.path.name}: tensor {name} has shape {got}, the program needs {wanted}"
                    )
                held[name] = self._weights[name]
        for spec in signature["input_specs"]:
            ((kind, entry),) = spec.items()
            name = entry.get("tensor_constant_name") or (entry.get("buffer_name") if kind == "buffer" else None)
            if name is not None and name not in held and name not in self._constants:
                raise CheckpointError(f"{self.path.name}: constant {name} is missing from the archive")
        return held, tuple(sorted(set(self._weights) - set(held)))

    def _payloads(self, folder: str, prefix: str) -> dict[str, LazyTensor]:
        """The tensors of one payload config by name; equal entries are one object, so that ties stay visible."""
        config = self._archive.read_json(f"data/{folder}/model_{folder}_config.json").get("config")
        if not isinstance(config, dict):
            raise CheckpointError(f"{self.path.name}: the list of {folder} is not an object")
        distinct: dict[str, LazyTensor] = {}
        tensors: dict[str, LazyTensor] = {}
        self._parameters: set[str] = getattr(self, "_parameters", set())
        for name, entry in config.items():
            check_tensor_name(name, "tensor")
            if not isinstance(entry, dict) or entry.get("use_pickle") is not False:
                raise CheckpointError(f"{self.path.name}: tensor {name} is pickled; pickles are never read")
            key = repr((entry.get("path_name"), entry.get("tensor_meta")))
            if key not in distinct:
                distinct[key] = self._payload(name, entry, folder, prefix)
            tensors[name] = distinct[key]
            if entry.get("is_param"):
                self._parameters.add(name)
        return tensors

    def _payload(self, name: str, entry: Mapping[str, Any], folder: str, prefix: str) -> LazyTensor:
        from torch._export.serde.serialize import _SERIALIZE_TO_TORCH_DTYPE

        where = f"{self.path.name}: tensor {name}"
        path, meta = entry.get("path_name"), entry.get("tensor_meta")
        if not isinstance(path, str) or not path.startswith(prefix) or not path.removeprefix(prefix).isdigit():
            raise CheckpointError(f"{where} lies in {path!r}, where no tensor lies")
        member = self._archive.member(f"data/{folder}/{path}")
        try:
            dtype = _SERIALIZE_TO_TORCH_DTYPE[meta["dtype"]]  # type: ignore[index]
            sizes, strides = ([int(n["as_int"]) for n in meta[key]] for key in ("sizes", "strides"))  # type: ignore[index]
            offset = int(meta["storage_offset"]["as_int"])  # type: ignore[index]
        except (KeyError, TypeError, ValueError):
            raise CheckpointError(f"{where} has no dtype, sizes or strides") from None
        if len(sizes) != len(strides) or min([*sizes, *strides, offset], default=0) < 0:
            raise CheckpointError(f"{where} has impossible sizes {sizes} or strides {strides}")
        last = offset + sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))
        stored = StoredTensor(
            name, self._archive.file, member.offset, dtype, torch.Size([member.size // dtype.itemsize])
        )
        if 0 not in sizes and last >= stored.shape[0]:
            raise CheckpointError(
                f"{where} is truncated: shape {sizes} does not fit the {member.size} bytes stored for it"
            )
        flat = torch.empty(stored.shape, dtype=dtype, device="meta")
        return LazyTensor(View(stored, flat.as_strided(sizes, strides, offset if 0 not in sizes else 0)))


def _on_meta(value: Tensor, parameter: bool) -> Tensor:
    empty = torch.empty(value.shape, dtype=value.dtype, device="meta")
    return nn.Parameter(empty, requires_grad=False) if parameter else empty


def _static_shape(meta: Mapping[str, Any]) -> tuple[int, ...] | None:
    sizes = meta["sizes"]
    return tuple(size["as_int"] for size in sizes) if all("as_int" in size for size in sizes) else None
