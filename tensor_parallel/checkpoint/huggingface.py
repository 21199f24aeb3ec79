"""Hugging Face directories: ``config.json`` and safetensors, as ``save_pretrained`` writes them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property
from inspect import signature
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from tensor_parallel.checkpoint.constraints import Constraints
from tensor_parallel.checkpoint.huggingface_files import read_config, read_tensors
from tensor_parallel.checkpoint.options import SourceOptions
from tensor_parallel.checkpoint.source import Source, given_inputs
from tensor_parallel.checkpoint.stored import StoredTensor
from tensor_parallel.errors import CheckpointError, InvalidInput


class HuggingFaceSource(Source):
    """A model of the installed ``transformers``, its weights read by slices. No custom code, no pickle, no network."""

    kind = "hf"

    def __init__(self, path: Path, options: SourceOptions, root: Path | None = None) -> None:
        """``root``: what the files' links may not lead out of; the directory itself when None."""
        super().__init__(path, options)
        if not path.is_dir():
            raise CheckpointError(f"{path.name} is not a directory with config.json and safetensors")
        try:
            from tensor_parallel.checkpoint import huggingface_model
        except ImportError:
            raise CheckpointError(
                "Hugging Face directories need the package transformers, which is not installed"
            ) from None
        self._library = huggingface_model
        self._described = huggingface_model.with_overrides(read_config(path, root), options.kwargs)
        self._stored = read_tensors(path, root)

    @cached_property
    def _config(self) -> Any:
        return self._library.make_config(self._described, self.options)

    @cached_property
    def _class(self) -> Any:
        return self._library.model_class(self._described, self._config, self.options)

    def _build(self) -> tuple[nn.Module, dict[str, Tensor]]:
        dtype = self._library.serving_dtype(self._config, self._stored, self.options.dtype)
        resolved = self._library.resolve(self._class, self._config, self._stored, dtype)
        self.unused = resolved.unused
        self._inferred, self._constraints = self._infer(resolved.model)
        return resolved.model, resolved.tensors

    def _describe(self) -> Mapping[str, object]:
        options = self.options
        asked = {"dtype": options.dtype, "attention": options.attention, "class": self._class.__name__}
        return {"config": self._described, **asked, "inputs": options.inputs, "names": options.input_names}

    def stored(self) -> Iterator[StoredTensor]:
        yield from self._stored.values()

    def example_inputs(self) -> dict[str, Tensor]:
        self.tensors()
        return dict(self._inferred)

    def constraints(self) -> Constraints:
        self.tensors()
        return self._constraints

    def default_inputs(self) -> Mapping[str, tuple[str, int]]:
        from tensor_parallel.checkpoint.huggingface_inputs import DEFAULTS

        names = self.example_inputs()
        return {name: (like, value) for name, (like, value) in DEFAULTS.items() if name in names and like in names}

    def _infer(self, model: nn.Module) -> tuple[dict[str, Tensor], Constraints]:
        from tensor_parallel.checkpoint.huggingface_inputs import infer_constraints, infer_inputs

        if self.options.inputs:
            # By name: what goes into a catch-all **kwargs is not looked at, and no forward would work.
            taken = [p.name for p in signature(model.forward).parameters.values() if p.kind is not p.VAR_KEYWORD]
            if unknown := [option.name for option in self.options.inputs if option.name not in taken]:
                raise InvalidInput(f"option inputs: {type(model).__name__} takes no {', '.join(unknown)}")
            return given_inputs(self.options.inputs), Constraints()
        inputs = infer_inputs(model)
        if unknown := [name for name in self.options.input_names if name not in inputs]:
            raise InvalidInput(f"option inputs: {type(model).__name__} has no inferred input {', '.join(unknown)}")
        kept = {name: inputs[name] for name in self.options.input_names or inputs}
        return kept, infer_constraints(model, kept)
