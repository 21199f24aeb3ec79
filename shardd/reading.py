"""From a Load's request to weights, with the library: the wire's names for things against the library's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from protos.tensor_parallel.v1 import coordinator_pb2, shard_pb2
from shardd.loading import LoadedWeights, Report
from tensor_parallel.group import Group


class Reader:
    """Opens, plans and reads models for one rank."""

    def __init__(
        self, *, group: Group, device: torch.device, model_root: Path | None, factories: tuple[str, ...]
    ) -> None:
        self._group = group
        self._device = device
        self._model_root = model_root
        self._factories = factories

    def read(self, request: shard_pb2.ShardLoadRequest, report: Report, cancelled: Callable[[], bool]) -> LoadedWeights:
        raise NotImplementedError

    def plan(self, request: coordinator_pb2.PlanRequest) -> coordinator_pb2.PlanResponse:
        raise NotImplementedError
