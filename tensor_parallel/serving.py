"""One rank's part of a served model: planned, loaded by slices, and run. What a daemon calls, and all it has to
know.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from tensor_parallel.checkpoint.load import Progress, load_shards
from tensor_parallel.checkpoint.memory import available_bytes, give_back_freed, peak_bytes
from tensor_parallel.checkpoint.prepared import PreparedMemory
from tensor_parallel.checkpoint.source import Source
from tensor_parallel.errors import (
    CannotCompile,
    DoesNotFit,
    InvalidInput,
    LoadCancelled,
    PlanError,
    TensorParallelError,
    out_of_memory,
)
from tensor_parallel.group import Group
from tensor_parallel.planned import find, keep
from tensor_parallel.planner.module import Runner, ShardedModule
from tensor_parallel.planner.plan import InputSpec, OutputSpec, Plan
from tensor_parallel.planner.shard import Shard
from tensor_parallel.planner.specs import output_names
from tensor_parallel.planner.stopping import pause, stoppable
from tensor_parallel.requests import REMEMBERED, Form, RequestChecker, form_of
from tensor_parallel.serving_options import ServingOptions

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Known:
    """The program for inputs of one form, the order in which it takes them, and its outputs' names."""

    runner: Runner
    inputs: list[str]
    outputs: list[str]


@dataclass(eq=False)
class ServedModel:
    """A rank's weights and program. ``run`` is for one thread; everything else may be called from any.

    The weights outlive any group: ``run`` uses whatever backend the :class:`Group` given to :func:`load_model` is
    bound to at that moment, and raises :class:`~tensor_parallel.errors.GroupUnbound` when there is none.
    """

    plan: Plan
    source_digest: str
    shard_digest: str
    """XXH3 of every byte this rank holds: equal if and only if the same rank of the same plan holds the same
    weights.
    """
    bytes_held: int
    unused: tuple[str, ...]
    checker: RequestChecker
    device: torch.device
    _module: nn.Module = field(repr=False)
    compiled: int | None = None
    """How many functions were compiled; None where execution is eager."""
    planned_by: str = "this rank"
    """Or ``a peer``, whose plan was given to :func:`load_model`, or ``an earlier load``, of a model still loaded."""
    architecture: str = field(default="", repr=False)
    """Equal to that of another model if what was planned for one serves the other; empty if that is not known."""
    plans: Sequence[Plan] = field(default=(), repr=False)
    """What was planned when the model was loaded, alike on all ranks; ``plan`` comes first."""
    _names: dict[pytree.TreeSpec, list[str]] = field(default_factory=dict, repr=False)
    _known: dict[Form, _Known] = field(default_factory=dict, repr=False)
    """By the inputs' names, types and sizes, where nothing else decides what is to be done."""

    @property
    def inputs(self) -> tuple[InputSpec, ...]:
        """What a request holds. ``optional_inputs`` of it may be left out."""
        return self.plan.inputs

    @property
    def optional_inputs(self) -> frozenset[str]:
        """Inputs filled with the value the model itself assumes: an attention mask with ones, segment ids with
        zeros.
        """
        return self.checker.optional

    @property
    def outputs(self) -> tuple[OutputSpec, ...]:
        """What ``run`` gives; an output with a ``shard`` is this rank's part, to be joined along ``shard.dim`` by
        index.
        """
        return self.plan.outputs

    @property
    def plan_digest(self) -> str:
        """Equal on every rank, or the ranks must not serve together."""
        return self.plan.digest()

    @property
    def peak_bytes(self) -> int:
        """The most memory this process has used so far: of the device on a GPU, resident on a CPU."""
        return peak_bytes(self.device)

    def checksum(self) -> int:
        """Sum of this rank's weights as 32-bit words (bytes, where they do not divide), on the device: a quick way to
        tell whether an aborted kernel has written over them. Not a digest: see ``shard_digest``. Buffers that the
        model itself writes to, or may, do not count.
        """
        total = 0
        buffers = self._module.unwritten_buffers() if isinstance(self._module, ShardedModule) else ()
        for tensor in (*self._module.parameters(), *buffers):
            flat = tensor.detach().reshape(-1).view(torch.uint8)
            words = flat.view(torch.int32) if flat.numel() % 4 == 0 and flat.storage_offset() % 4 == 0 else flat
            total += int(words.sum(dtype=torch.int64))
        return total

    def export_plan(self) -> bytes:
        """All that was planned for this model so far, for :func:`load_model` of a process that takes a lost rank's
        place. Raises :class:`~tensor_parallel.errors.NotPortable`.
        """
        from tensor_parallel.planner.portable import pack

        return pack(self._module.plans() if isinstance(self._module, ShardedModule) else self.plans)

    def validate(self, inputs: Mapping[str, Tensor]) -> Form:
        """The request's form, for ``run``. Raises :class:`InvalidInput` naming the field; see
        :meth:`RequestChecker.check`. Runs nothing.
        """
        return self.checker.check(inputs)

    def run(self, inputs: Mapping[str, Tensor], form: Form | None = None) -> dict[str, Tensor]:
        """This rank's outputs for a valid request, on ``device``; every rank must run the same one. Absent results
        are left out. ``form`` is the request's, if its caller knows it.
        """
        if not torch.is_inference_mode_enabled():
            with torch.inference_mode():
                return self.run(inputs, form)
        form = form or form_of(inputs)
        known = self._known.get(form)
        if known is not None:
            return _tensors(known.outputs, known.runner([inputs[name] for name in known.inputs]))
        placed = {name: self._placed(value) for name, value in self.checker.complete(inputs).items()}
        if not isinstance(self._module, ShardedModule):
            leaves, spec = pytree.tree_flatten(self._module(**placed))
            return _tensors(self._output_names(spec), leaves)
        runner, given = self._module.runner_by_name(placed)
        outputs = self._output_names(runner.compiled.signature.out_spec)
        as_they_are = len(placed) == len(inputs) and all(placed[name] is value for name, value in inputs.items())
        if as_they_are and self._module.sizes_decide():
            if len(self._known) >= REMEMBERED:
                self._known.clear()
            self._known[form] = _Known(runner, sorted(inputs), outputs)
        return _tensors(outputs, runner(given))

    def _placed(self, value: Tensor) -> Tensor:
        if value.device == self.device:
            return value
        if self.device.type == "cuda" and value.device.type == "cpu" and not value.is_pinned():
            value = value.pin_memory()  # else the copy below would wait for itself
        return value.to(self.device, non_blocking=True)

    def _output_names(self, spec: pytree.TreeSpec) -> list[str]:
        if spec not in self._names:
            self._names[spec] = output_names(spec)
        return self._names[spec]


def _tensors(names: Sequence[str], leaves: Sequence[Any]) -> dict[str, Tensor]:
    return {name: leaf for name, leaf in zip(names, leaves, strict=True) if isinstance(leaf, Tensor)}


def load_model(
    source: Source,
    *,
    world_size: int,
    rank: int,
    device: torch.device,
    group: Group,
    options: Mapping[str, Any] | ServingOptions | None = None,
    progress: Progress | None = None,
    cancelled: Callable[[], bool] | None = None,
) -> ServedModel:
    """Plan ``source`` for ``world_size`` ranks and load this rank's part onto ``device``. Communicates with nobody.

    ``progress(bytes_done, bytes_total)``, of bytes held, and ``cancelled()`` are called from this thread. Outputs
    stay divided where the plan leaves them so. Raises :class:`~tensor_parallel.errors.CheckpointError`,
    :class:`PlanError`, :class:`InvalidInput` for a malformed option, :class:`DoesNotFit`, :class:`LoadCancelled` and,
    with ``execution`` ``compile``, :class:`~tensor_parallel.errors.CannotCompile`; what was loaded is then freed.
    """
    parsed = options if isinstance(options, ServingOptions) else ServingOptions.parse(options or {})
    stop = cancelled or (lambda: False)
    with _current(device), stoppable(lambda: _stop_if(stop)):
        return _load(source, world_size, rank, device, group, parsed, progress, stop)


def _current(device: torch.device) -> AbstractContextManager[object]:
    """Makes a GPU the one that this thread works on; a thread begins with the first."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _load(
    source: Source,
    world_size: int,
    rank: int,
    device: torch.device,
    group: Group,
    parsed: ServingOptions,
    progress: Progress | None,
    stop: Callable[[], bool],
) -> ServedModel:
    from tensor_parallel.planner import instantiate, make_plan
    from tensor_parallel.planner.rehearsal import check_compiler
    from tensor_parallel.planner.verify import memory_needed

    compiles = parsed.execution == "compile"
    if compiles:
        check_compiler(device.type)  # before anything that takes long
    model = source.build_meta()
    pause()
    total = source.total_bytes
    besides = memory_needed(total) if parsed.verify and not parsed.known_plan else 0
    with PreparedMemory.for_weights(total, world_size, device, besides=besides) as memory:
        known = find(source, model, world_size, parsed)
        plan = known.plans[0] if known.plans else _planned(make_plan, model, source, world_size, parsed)
        pause()
        memory.stop()  # what is prepared meanwhile would count as neither
        give_back_freed()
        if compiles and plan.mode != "graph":
            raise CannotCompile(f"execution='compile' cannot be had: {'; '.join(plan.notes)}")
        _refuse_if_too_large(plan, rank, device, memory.present)
        loaded = load_shards(
            source,
            plan.shards,
            rank,
            device=device,
            progress=progress,
            cancelled=stop,
            threads=parsed.threads,
            memory=memory,
        )
    parts = dict(loaded.tensors)

    def read(name: str, shard: Shard) -> Tensor:
        pause()
        return parts.pop(name)

    functions: int | None = None
    module = instantiate(plan, model, rank=rank, group=group, read=read, device=device)
    if isinstance(module, ShardedModule):
        for other in known.plans[1:]:
            module.add_program(other, other.artifact)
        if not known.plans:
            module.plan_branches()  # a request would wait for it, and all behind it
        if compiles:
            functions = module.compile_programs(check=parsed.verify)
    if parsed.verify and plan.mode == "modules" and plan.digest() != parsed.known_plan:
        pause()
        _rehearse(module, source, device)
    give_back_freed()
    checker = RequestChecker(plan.inputs, source.constraints(), source.default_inputs())
    served = ServedModel(
        plan,
        source.digest(),
        loaded.digest,
        loaded.nbytes,
        source.unused,
        checker,
        device,
        module.eval(),
        functions,
        known.planned_by,
        known.architecture,
        module.plans() if isinstance(module, ShardedModule) else [plan],
    )
    keep(served)
    return served


def _planned(
    make_plan: Callable[..., Plan], model: nn.Module, source: Source, world_size: int, options: ServingOptions
) -> Plan:
    try:
        check = {"verify": options.verify, "known": options.known_plan}
        return make_plan(model, source.example_inputs(), world_size, gather_outputs=False, **check)
    except TensorParallelError:
        raise
    except Exception as error:  # tracing runs the model's own code, which raises anything for inputs it does not take
        pause()
        raise PlanError(f"{source.path.name} cannot be planned: {type(error).__name__}: {error}") from error


def _rehearse(module: nn.Module, source: Source, device: torch.device) -> None:
    """A model that could not be traced runs once, whole weights read one at a time: what always raises is not loaded.
    Raises :class:`InvalidInput`; alike on every rank.
    """
    from tensor_parallel.planner.fallback import ModulesModel

    def whole(name: str) -> Tensor:
        pause()
        return source.read(name, Shard.replicated(), 0).to(device)

    assert isinstance(module, ModulesModel)
    inputs = {name: value.to(device) for name, value in source.example_inputs().items()}
    devices = [device] if device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(0)
            module.eval().rehearse(inputs, whole)
    except Exception as error:  # the model's own code raises anything
        pause()
        if out_of_memory(error):
            log.warning("%s: no memory to see whether its forward runs: %s", source.path.name, _first_line(error))
            return
        tried = ", ".join(f"{name} {_described(value)}" for name, value in inputs.items())
        raise InvalidInput(
            f"the model does not run: its forward raised {type(error).__name__}: {_first_line(error)}; "
            f"tried with {tried}. "
            "If it takes other inputs, give them with the load (inputs=, or --model-input NAME:TYPE[SHAPE]); "
            "verify=false skips this trial"
        ) from error


def _described(value: Tensor) -> str:
    return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), "without a message")


def _refuse_if_too_large(plan: Plan, rank: int, device: torch.device, prepared: int) -> None:
    needed, available = plan.bytes_per_rank[rank], available_bytes(device)
    if available is not None and needed > available + prepared:
        raise DoesNotFit(
            f"rank {rank}'s part has {needed / 2**30:.2f} GiB, of which {available / 2**30:.2f} GiB fit on {device} now"
        )


def _stop_if(cancelled: Callable[[], bool]) -> None:
    if cancelled():
        raise LoadCancelled("the load was cancelled")
