"""From a Load's request to weights, with the library: the wire's names for things against the library's."""

from __future__ import annotations

import functools
import gc
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from protos.tensor_parallel.v1 import coordinator_pb2, shard_pb2, tensor_pb2
from shardd.describing import describe_model, is_sharded, plan_report
from shardd.errors import InvalidRequest
from shardd.loading import LoadedWeights, Report
from shardd.models import check_digests
from shardd.tensors import TORCH_DTYPES
from tensor_parallel.group import Group

if TYPE_CHECKING:
    from tensor_parallel.checkpoint import Source
    from tensor_parallel.serving import ServedModel

MAX_RANKS = 1024
EXECUTIONS = ("", "eager", "compile")
_IMPORTING = threading.Lock()


class Reader:
    """Opens, plans and reads models for one rank.

    Planning brings ``torch.export`` and half of torch with it, so that is imported where it is used: a daemon joins its
    group before it has loaded anything.
    """

    def __init__(
        self,
        *,
        group: Group,
        device: torch.device,
        device_memory: int,
        model_root: Path | None,
        factories: tuple[str, ...],
    ) -> None:
        self._group = group
        self._device = device
        self._device_memory = device_memory
        self._model_root = model_root
        self._factories = factories

    def read(self, request: shard_pb2.ShardLoadRequest, report: Report, cancelled: Callable[[], bool]) -> LoadedWeights:
        """Plan the model and read this rank's part. Raises what the library raises, and ``InvalidRequest``."""
        import_library()
        from tensor_parallel.serving import load_model

        report("planning", 0, 0)
        source = self._open(request.path, request.options)
        found = shard_pb2.LoadedModel(source_digest=source.digest())
        check_digests(found, request.expected_source_digest, "", "", request.name)
        verify = not request.options.HasField("verify") or request.options.verify
        served = load_model(
            source,
            world_size=self._group.world_size,
            rank=self._group.rank,
            device=self._device,
            group=self._group,
            # What the survivors hold was verified when they loaded it.
            options={
                "verify": verify,
                "known_plan": request.expected_plan_digest,
                "plan": request.plan,
                "execution": request.options.execution,
            },
            progress=lambda done, total: report("reading", done, total),
            cancelled=cancelled,
        )
        warnings = _warnings(served)
        rank = self._group.rank
        sent = {output.name: is_sharded(output) or rank == 0 for output in served.outputs}
        return LoadedWeights(
            served=served,
            description=describe_model(request, served, rank, warnings),
            outputs=sent,
            first=rank == 0,
            writes_inputs=served.plan.mode != "graph",
            checksum=None if self._device.type == "cpu" else served.checksum(),
            bytes_read=source.bytes_read,
            warnings=warnings,
            functions_compiled=served.compiled,
        )

    def plan(self, request: coordinator_pb2.PlanRequest) -> coordinator_pb2.PlanResponse:
        """What sharding the model would cost, from its description alone."""
        import_library()
        from tensor_parallel.planner import make_plan

        ranks = request.ranks or self._group.world_size
        if ranks > MAX_RANKS:
            raise InvalidRequest(f"a plan is for at most {MAX_RANKS} ranks")
        source = self._open(request.path, request.options)
        plan = make_plan(source.build_meta(), source.example_inputs(), ranks, gather_outputs=False, verify=False)
        return plan_report(plan, request.path, request.device_memory or self._device_memory)

    def warm(self) -> None:
        """What :func:`warm_up` does; what it leaves is kept out of later garbage collections."""
        warm_up()
        gc.freeze()

    def _open(self, path: str, options: coordinator_pb2.LoadOptions) -> Source:
        from tensor_parallel.checkpoint import open_source

        if options.kind != "factory" and self._model_root is None and not _is_allowed(path, self._factories):
            raise InvalidRequest("this daemon has no model root: it loads the factories it was told of, and no files")
        return open_source(
            path, self._model_root, options.kind or "auto", source_options(options), factories=self._factories
        )


def import_library() -> None:
    """Import what loads and plans need, one thread at a time.

    Of two threads that import a package by different modules of it Python may give one a module that is not there yet,
    rather than let both wait for each other.
    """
    with _IMPORTING:
        from tensor_parallel import checkpoint, planner, serving  # noqa: F401


@functools.cache
def warm_up() -> None:
    """Import what the first load needs and trace something tiny, so that the first load need not wait for that. Once
    in a process, and in those forked from it."""
    import_library()
    from tensor_parallel.planner import make_plan

    make_plan(torch.nn.Linear(4, 4), (torch.zeros(2, 4),), 2, verify=False)


def source_options(options: coordinator_pb2.LoadOptions) -> dict[str, Any]:
    """The wire's options as the library's. Raises :class:`InvalidRequest` for what makes no sense."""
    if options.execution not in EXECUTIONS:
        raise InvalidRequest(f"execution {options.execution!r} is not available here; eager and compile are")
    chosen: dict[str, Any] = {}
    if options.dtype:
        chosen["dtype"] = options.dtype
    if options.architecture:
        chosen["architecture"] = options.architecture
    if options.inputs:
        chosen["inputs"] = [_input(spec) for spec in options.inputs]
    if options.arguments_json:
        chosen["kwargs"] = _arguments(options.arguments_json)
    return chosen


def _input(spec: tensor_pb2.TensorSpec) -> dict[str, Any]:
    dtype = TORCH_DTYPES.get(spec.dtype)
    if dtype is None:
        raise InvalidRequest(f"input spec {spec.name!r} has no dtype")
    described: dict[str, Any] = {
        "name": spec.name,
        "dtype": str(dtype).removeprefix("torch."),
        "shape": list(spec.shape),
    }
    if spec.HasField("minimum"):
        described["low"] = spec.minimum
    if spec.HasField("maximum"):
        described["high"] = spec.maximum + 1
    return described


def _arguments(text: str) -> dict[str, Any]:
    try:
        arguments = json.loads(text)
    except (ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        raise InvalidRequest("arguments_json is not a JSON object")
    return arguments


def _warnings(served: ServedModel) -> list[str]:
    """What whoever loads the model should know, though it works."""
    warnings = list(served.plan.notes)
    if served.unused:
        shown = ", ".join(served.unused[:5]) + (", ..." if len(served.unused) > 5 else "")
        warnings.append(f"{len(served.unused)} tensors of the checkpoint are not used: {shown}")
    if served.compiled == 0:
        warnings.append("execution='compile' changes nothing: this model has nothing that a compiler would join")
    return warnings


def _is_allowed(path: str, factories: tuple[str, ...]) -> bool:
    return path in factories
