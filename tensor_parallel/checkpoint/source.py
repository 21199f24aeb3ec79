"""What every kind of checkpoint offers to a load: the model without its weights, and any slice of any weight."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from tensor_parallel.checkpoint.constraints import Constraints
from tensor_parallel.checkpoint.digest import source_digest
from tensor_parallel.checkpoint.expression import Box, Node, whole
from tensor_parallel.checkpoint.lazy import LazyTensor
from tensor_parallel.checkpoint.options import InputOption, SourceOptions
from tensor_parallel.checkpoint.stored import StoredTensor
from tensor_parallel.checkpoint.transfer import read_box, read_whole
from tensor_parallel.errors import CheckpointError
from tensor_parallel.planner.shard import Shard

log = logging.getLogger(__name__)


class Source(ABC):
    """A model's architecture and, apart from it, its weights as :class:`LazyTensor` or, where computed, as tensors."""

    kind: str

    def __init__(self, path: Path, options: SourceOptions) -> None:
        self.path = path
        self.options = options
        self.unused: tuple[str, ...] = ()
        """Stored tensors that the model does not use."""
        self._tensors: dict[str, Tensor] | None = None
        self._model: nn.Module | None = None

    @abstractmethod
    def _build(self) -> tuple[nn.Module, dict[str, Tensor]]:
        """The model, on any device, and the value of each of its parameters and buffers, tied names included."""

    @abstractmethod
    def _describe(self) -> Mapping[str, object]:
        """What, besides the stored tensors, decides what the model computes."""

    @abstractmethod
    def stored(self) -> Iterator[StoredTensor]:
        """Every tensor in the checkpoint's files."""

    @abstractmethod
    def example_inputs(self) -> dict[str, Tensor]:
        """Small valid inputs by argument name, to trace and plan with; every free dimension larger than 1."""

    def constraints(self) -> Constraints:
        """What the shapes of the inputs must meet, where the checkpoint itself says so."""
        return Constraints()

    def default_inputs(self) -> Mapping[str, tuple[str, int]]:
        """Inputs a request may leave out: name -> (the input whose shape it takes, the value it is filled with)."""
        return {}

    def build_meta(self) -> nn.Module:
        """The model in ``eval`` mode with parameters on the meta device and real buffers; a new one at each call."""
        if self._model is None:
            self._resolve()
        model, self._model = self._model, None
        assert model is not None
        return model

    def tensors(self) -> Mapping[str, Tensor]:
        """The value of every parameter and buffer by fully qualified name; those in files as :class:`LazyTensor`."""
        if self._tensors is None:
            self._resolve()
        assert self._tensors is not None
        return self._tensors

    def read(self, name: str, shard: Shard, rank: int) -> Tensor:
        """The part of tensor ``name`` that ``rank`` holds under ``shard``, in host memory; only its bytes are read."""
        value = self.tensors().get(name)
        if value is None:
            raise CheckpointError(f"the model of {self.path.name} has no tensor {name}")
        if not isinstance(value, LazyTensor):
            return shard.take(value, rank)
        parts = [read_box(value.node, box) for box in shard_boxes(value.node, shard, rank)]
        if not parts:
            return torch.empty(shard.local_shape(value.shape, rank), dtype=value.dtype)
        return parts[0] if shard.dim is None or len(parts) == 1 else torch.cat(parts, shard.dim)

    def architecture(self) -> Mapping[str, object] | None:
        """What decides what the model computes, besides its tensors: two models of which this is equal are one but for
        their weights. None where that cannot be told.
        """
        return {"kind": self.kind, **self._describe()}

    @property
    def total_bytes(self) -> int:
        """Bytes of the model's distinct parameters and buffers, in the dtype it is served in."""
        distinct = {id(value): value.numel() * value.element_size() for value in self.tensors().values()}
        return sum(distinct.values())

    @property
    def bytes_read(self) -> int:
        """Bytes of the checkpoint's files that were read so far: headers, samples for the digest, and weights."""
        return sum(file.bytes_read for file in {stored.file for stored in self.stored()})

    def digest(self) -> str:
        """Digest of config, headers, sizes and samples of the content; equal on every rank that reads the same
        checkpoint.
        """
        return source_digest({"kind": self.kind, **self._describe()}, self.stored())

    def _resolve(self) -> None:
        model, tensors = self._build()
        _leave_weights_out(model, tensors)
        self._model = model.eval()
        if self._tensors is None:
            self._tensors = tensors
            if self.unused:
                log.warning(
                    "%s: %d stored tensors are not used: %s", self.path.name, len(self.unused), ", ".join(self.unused)
                )


def shard_boxes(node: Node, shard: Shard, rank: int) -> list[Box]:
    """The boxes of a full tensor that a rank holds, in the order in which they lie along the divided dimension."""
    full = whole(node.shape)
    if shard.dim is None:
        return [full]
    shard.local_shape(node.shape, rank)  # checks that the runs lie inside
    return [(*full[: shard.dim], run, *full[shard.dim + 1 :]) for run in shard.runs[rank]]


def given_inputs(options: tuple[InputOption, ...]) -> dict[str, Tensor]:
    """Example inputs for the input specs a user gave."""
    return {option.name: option.example(seed) for seed, option in enumerate(options)}


def _leave_weights_out(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Replace parameters by ones on meta, and stored buffers by their values; what was tied stays tied."""
    replaced: dict[int, nn.Parameter] = {}
    for name, parameter in list(model.named_parameters(remove_duplicate=False)):
        if id(parameter) not in replaced:
            empty = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
            replaced[id(parameter)] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
        owner, leaf = _owner(model, name)
        owner._parameters[leaf] = replaced[id(parameter)]
    read: dict[int, Tensor] = {}
    for name, buffer in list(model.named_buffers(remove_duplicate=False)):
        if isinstance(buffer, LazyTensor) or buffer.device.type == "meta":
            value = tensors.setdefault(
                name, torch.zeros(buffer.shape, dtype=buffer.dtype)
            )  # a config alone has no value
            if isinstance(value, LazyTensor):
                if id(value) not in read:
                    read[id(value)] = read_whole(value.node)
                tensors[name] = read[id(value)]
            owner, leaf = _owner(model, name)
            owner._buffers[leaf] = tensors[name]


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, leaf = name.rpartition(".")
    return model.get_submodule(path), leaf
