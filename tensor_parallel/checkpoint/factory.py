"""Models built by a function that the operator of the daemon allows: ``package.module:factory``."""

from __future__ import annotations

import importlib
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tensor_parallel.checkpoint.lazy import LazyTensor
from tensor_parallel.checkpoint.options import SourceOptions
from tensor_parallel.checkpoint.paths import confine
from tensor_parallel.checkpoint.safetensors_header import read_header
from tensor_parallel.checkpoint.source import Source, given_inputs
from tensor_parallel.checkpoint.stored import StoredFile, StoredTensor
from tensor_parallel.errors import AccessDenied, CheckpointError, InvalidInput

NAME = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


class FactorySource(Source):
    """What ``factory(**kwargs)`` returns: a module, or a pair of a module and a mapping of example inputs.

    With the option ``weights`` (a safetensors file inside the model root) parameters are never materialised and
    each rank reads its slices. Without it the factory's own values are used; it is called with the same random seed
    on every rank.
    """

    kind = "factory"

    def __init__(self, name: str, options: SourceOptions, model_root: str | Path | None) -> None:
        super().__init__(Path(name), options)
        self._name = name
        self._factory = _allowed(name, options.factories)
        self._stored: dict[str, StoredTensor] = {}
        if options.weights is not None:
            path = confine(options.weights, model_root)
            self._stored = read_header(StoredFile(path, path.parent))
        self._examples: Mapping[str, Tensor] | None = None

    def _build(self) -> tuple[nn.Module, dict[str, Tensor]]:
        model, self._examples = self._called()
        if self.options.dtype is not None:
            model = model.to(self.options.dtype)
        named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
        if self.options.weights is None:
            if empty := [name for name, value in named if value.is_meta]:
                left = ", ".join(empty[:8])
                raise CheckpointError(f"factory {self._name} gives no value to {left}, nor does option weights")
            distinct = {id(value): value.detach() for _, value in named}
            return model, {name: distinct[id(value)] for name, value in named}
        return model, self._placed(model, named)

    def _describe(self) -> Mapping[str, object]:
        options = self.options
        return {"factory": self._name, "kwargs": options.kwargs, "dtype": options.dtype, "inputs": options.inputs}

    def architecture(self) -> None:
        """A factory may build anything, and look at anything to decide what."""

    def stored(self) -> Iterator[StoredTensor]:
        yield from self._stored.values()

    def example_inputs(self) -> dict[str, Tensor]:
        if self.options.inputs:
            return given_inputs(self.options.inputs)
        self.tensors()
        if self._examples is None:
            raise InvalidInput(f"the inputs of factory {self._name} are not known: give them in option inputs")
        return dict(self._examples)

    def _called(self) -> tuple[nn.Module, Mapping[str, Tensor] | None]:
        try:
            with torch.random.fork_rng(devices=[]), torch.no_grad():
                torch.manual_seed(0)
                if self.options.weights is None:
                    made = self._factory(**self.options.kwargs)
                else:
                    with _parameters_on_meta():
                        made = self._factory(**self.options.kwargs)
        except Exception as error:  # it is the user's code
            raise CheckpointError(f"factory {self._name} failed: {type(error).__name__}: {error}") from error
        model, examples = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
        if not isinstance(model, nn.Module):
            raise CheckpointError(f"factory {self._name} returned {type(model).__name__}, not a module")
        if not (
            examples is None
            or (isinstance(examples, Mapping) and all(isinstance(v, Tensor) for v in examples.values()))
        ):
            raise CheckpointError(f"factory {self._name} returned example inputs that are not a mapping of tensors")
        return model, examples

    def _placed(self, model: nn.Module, named: Sequence[tuple[str, Tensor]]) -> dict[str, Tensor]:
        """The stored value of each tensor of the state dict; of tied ones, whichever is stored."""
        wanted = model.state_dict(keep_vars=True).keys()
        found: dict[int, Tensor] = {}
        for name, value in named:
            stored = self._stored.get(name) if name in wanted else None
            if stored is None:
                continue
            if stored.shape != value.shape:
                raise CheckpointError(
                    f"wrong shape: {name} is {tuple(stored.shape)}, the model needs {tuple(value.shape)}"
                )
            found.setdefault(id(value), LazyTensor.stored(stored).to(value.dtype))
        missing = [name for name, value in named if name in wanted and id(value) not in found]
        if missing or any(value.is_meta and id(value) not in found for _, value in named):
            raise CheckpointError(f"missing from the checkpoint: {', '.join(sorted(missing)[:8])}")
        self.unused = tuple(sorted(set(self._stored) - set(wanted)))
        return {name: found.get(id(value), value.detach()) for name, value in named}


def is_factory_name(text: str) -> bool:
    """Whether ``text`` has the form ``package.module:factory``."""
    return NAME.fullmatch(text) is not None


def _allowed(name: str, allowed: Sequence[str]) -> Any:
    """The function, imported only once it is known to be allowed."""
    if not is_factory_name(name):
        raise CheckpointError(f"{name!r} is not of the form package.module:factory")
    if not any(name == entry or (entry.endswith("*") and name.startswith(entry[:-1])) for entry in allowed):
        raise AccessDenied(f"factory {name} is not on the list of factories this daemon may run")
    module, _, attribute = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except Exception as error:  # importing runs the user's code
        raise CheckpointError(f"factory {name} cannot be imported: {type(error).__name__}: {error}") from error
    if not callable(found):
        raise CheckpointError(f"factory {name} is not callable")
    return found


_building = threading.Lock()


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """In this thread, every parameter moves to the meta device the moment a module gets it; buffers stay real."""
    original, thread = nn.Module.register_parameter, threading.get_ident()
    moved: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}  # keeps the original alive, so that its id stays its own

    def register(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and threading.get_ident() == thread and not parameter.is_meta:
            if id(parameter) not in moved:
                empty = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
                moved[id(parameter)] = (parameter, nn.Parameter(empty, requires_grad=parameter.requires_grad))
                parameter.data = torch.empty(0, dtype=parameter.dtype)  # frees it; a tie shares the Parameter, not this
            parameter = moved[id(parameter)][1]
        original(module, name, parameter)

    with _building:
        nn.Module.register_parameter = register  # type: ignore[method-assign, assignment]
        try:
            yield
        finally:
            nn.Module.register_parameter = original  # type: ignore[method-assign]
