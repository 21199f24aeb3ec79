"""Models that do not export (control flow that depends on values): their own code runs, on divided parameters.

A ``Linear`` computes its own output features, and a gather follows. Any other divided parameter is gathered when the
model's code
reads it, wherever that happens, and dropped when the forward ends. Inputs and outputs of every layer are whole on
every rank, so
this is right for any model; ``mode`` is ``"modules"``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils import _pytree as pytree

from tensor_parallel import collectives
from tensor_parallel.group import Group
from tensor_parallel.planner.plan import FREE, Collective, InputSpec, Plan
from tensor_parallel.planner.reserve import attributes_kept
from tensor_parallel.planner.shard import Shard
from tensor_parallel.planner.tensors import Tensors

if TYPE_CHECKING:
    from tensor_parallel.planner.module import ShardedModule

_SMALL = 0.002  # of all bytes: tensors below it stay whole


def plan_modules(
    twin: nn.Module,
    tensors: Tensors,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    world_size: int,
    *,
    reason: str,
    fixed: Mapping[str, Shard] | None = None,
) -> Plan:
    """Every large parameter divided: a ``Linear``'s by output features, others along their longest dimension."""
    shards = dict(fixed) if fixed is not None else _shards(twin, tensors, world_size)
    linears = _linears(twin, tensors, shards)
    biases = {tensors.canonical(f"{name}.bias") for name in linears}
    gathers = [name for name, shard in shards.items() if shard.dim is not None and name not in biases]
    held = [
        sum(_local_bytes(tensors, name, shards[name], rank) for name in tensors.stored) for rank in range(world_size)
    ]
    return Plan(
        world_size=world_size,
        mode="modules",
        shards=shards,
        tied=dict(tensors.tied),
        inputs=_inputs(args, kwargs),
        outputs=(),
        collectives=tuple(Collective("all_gather", tensors.nbytes(name), name) for name in gathers),
        reasons=(),
        bytes_per_rank=tuple(held),
        total_bytes=tensors.total_bytes,
        training=twin.training,
        notes=(f"not planned as a graph: {reason}",),
    )


def _inputs(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[InputSpec, ...]:
    named = [(f"input_{i}", value) for i, value in enumerate(args)] + list(kwargs.items())
    leaves = [(name, leaf) for name, value in named for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]
    return tuple(InputSpec(name, leaf.dtype, (FREE,) * leaf.ndim) for name, leaf in leaves)


def _local_bytes(tensors: Tensors, name: str, shard: Shard, rank: int) -> int:
    stored = tensors.stored[name]
    return stored.nbytes if shard.dim is None else stored.nbytes // stored.shape[shard.dim] * shard.local_size(rank)


def _shards(twin: nn.Module, tensors: Tensors, ranks: int) -> dict[str, Shard]:
    scripted = _scripted(twin, tensors)
    shards = {
        name: Shard.replicated() if name in scripted else _longest(tensors, name, ranks) for name in tensors.stored
    }
    for prefix, module in twin.named_modules():
        if not _is_linear(module) or not prefix:
            continue
        weight, bias = tensors.canonical(f"{prefix}.weight"), tensors.canonical(f"{prefix}.bias")
        if shards[weight].dim is None:
            continue
        rows = tensors.shape(weight)[0]
        shards[weight] = Shard.even(0, rows, ranks) if rows >= ranks else Shard.replicated()
        if bias in shards:
            shards[bias] = shards[weight]
    return shards


def _scripted(twin: nn.Module, tensors: Tensors) -> set[str]:
    """What code that is not Python's reads: it cannot be given anything else than is stored."""
    names: set[str] = set()
    for prefix, module in twin.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            names |= {tensors.canonical(f"{prefix}.{name}" if prefix else name) for name in module.state_dict()}
    return names


def _longest(tensors: Tensors, name: str, ranks: int) -> Shard:
    stored = tensors.stored[name]
    if not stored.is_parameter or not stored.shape or stored.nbytes < _SMALL * tensors.total_bytes:
        return Shard.replicated()
    dim = max(range(len(stored.shape)), key=lambda d: (stored.shape[d], -d))
    return Shard.even(dim, stored.shape[dim], ranks) if stored.shape[dim] >= ranks else Shard.replicated()


def _is_linear(module: nn.Module) -> bool:
    """A layer that computes what ``nn.Linear`` computes, by its code, not its name."""
    if not isinstance(module, nn.Linear) or type(module).forward is not nn.Linear.forward or module._forward_pre_hooks:
        return False
    return module._parameters.get("weight") is not None  # which a parametrization would compute


def _linears(twin: nn.Module, tensors: Tensors, shards: Mapping[str, Shard]) -> dict[str, nn.Module]:
    """Linear layers divided by output features, weight and bias alike."""
    found: dict[str, nn.Module] = {}
    for prefix, module in twin.named_modules():
        if _is_linear(module) and prefix:
            shard = shards[tensors.canonical(f"{prefix}.weight")]
            bias = f"{prefix}.bias" if module.bias is not None else None
            if shard.dim == 0 and _in_order(shard) and (bias is None or shards[tensors.canonical(bias)] == shard):
                found[prefix] = module
    return found


def _in_order(shard: Shard) -> bool:
    """Whether the ranks' parts, one after the other, are the whole."""
    return bool((torch.diff(_indices(shard)) == 1).all())


def _indices(shard: Shard) -> Tensor:
    return torch.cat([shard.index(rank) for rank in range(len(shard.runs))])


class ModulesModel(nn.Module):
    """The model's own code over this rank's tensors, which it holds under the model's own names."""

    def __init__(self, twin: nn.Module) -> None:
        super().__init__()
        self._twin = (twin,)
        self._gathered: dict[tuple[int, str], _Gathered] = {}
        self._running = False
        self._modes = (False, True)  # whether the call is one without autograd, and whether it records gradients
        self._whole: Callable[[str], Tensor] | None = None
        self._modules, self._parameters, self._buffers = twin._modules, twin._parameters, twin._buffers
        self._non_persistent_buffers_set = twin._non_persistent_buffers_set

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the model's own."""
        twin = self._twin[0]
        twin.training = self.training
        self._running, self._modes = True, (torch.is_inference_mode_enabled(), torch.is_grad_enabled())
        try:
            outputs = twin(*args, **kwargs)
            for gathered in self._gathered.values():
                gathered.keep_writes()
            return outputs
        finally:
            self._gathered.clear()
            self._running = False

    def whole(self, key: tuple[int, str], local: Tensor, shard: Shard, group: Group) -> Tensor:
        """A divided parameter, gathered once in a call; with its gradient wherever in the call it is read first. A
        backward that computes activations again is not in a call: it asks with modes of its own."""
        if not self._running:
            return _as_parameter(gather(local, shard, group))
        if key not in self._gathered:
            inference, records = self._modes
            with torch.inference_mode(inference), torch.set_grad_enabled(records):
                self._gathered[key] = _Gathered(local, shard, group)
        return self._gathered[key].whole

    def rehearse(self, inputs: Mapping[str, Any], whole: Callable[[str], Tensor]) -> None:
        """Run the model once without its peers: ``whole(name)`` gives the undivided tensors, one at a time. Raises what
        the model raises, and leaves no trace in its buffers and attributes."""
        held = [(module._buffers, name) for module in self._twin[0].modules() for name in module._buffers]
        before = [(place, name, place[name], _cloned(place[name])) for place, name in held]
        self._whole = whole
        try:
            with torch.no_grad(), attributes_kept(self._twin[0]):
                self(**inputs)
        finally:
            self._whole = None
            for place, name, buffer, value in before:
                place[name] = buffer
                if buffer is not None and value is not None:
                    buffer.copy_(value)


class _Gathered:
    """A divided parameter, whole, for the time of one call."""

    def __init__(self, local: Tensor, shard: Shard, group: Group) -> None:
        self._local, self._shard, self._rank = local, shard, group.rank
        self.whole = _as_parameter(gather(local, shard, group))
        self._version, self._memory = self._now()

    def _now(self) -> tuple[int, int]:
        return 0 if self.whole.is_inference() else self.whole._version, self.whole.data_ptr()

    def keep_writes(self) -> None:
        """If the model has written to it, this rank's part is written to."""
        if self._now() != (self._version, self._memory):
            with torch.no_grad():
                self._local.copy_(self._shard.take(self.whole.detach(), self._rank))


def _as_parameter(whole: Tensor) -> Tensor:
    whole._is_param = True  # type: ignore[attr-defined]  # for isinstance(..., nn.Parameter)
    return whole


def _cloned(buffer: Tensor | None) -> Tensor | None:
    return None if buffer is None else buffer.clone()


class OwnCode:
    """The model's own code over the tensors that a :class:`ShardedModule` holds, for calls that no graph computes.

    Divided parameters are gathered when they are read. Divided buffers are gathered before the call, and what the call
    made of them is divided again after it.
    """

    def __init__(self, plan: Plan, twin: nn.Module, module: ShardedModule, group: Group, device: torch.device) -> None:
        self._plan, self._twin, self._group = plan, twin, group
        tensors = Tensors(twin)
        self._held: list[tuple[dict[str, Any], str, str]] = []  # where the twin has it, and its name
        for prefix, child in twin.named_modules(remove_duplicate=False):
            for table in (child._parameters, child._buffers):
                for leaf, tensor in table.items():
                    if tensor is not None:
                        self._held.append((table, leaf, tensors.canonical(f"{prefix}.{leaf}" if prefix else leaf)))
        self._slots = {name: module.slot(name) for _, _, name in self._held}

        def held(name: str, shard: Shard) -> Tensor:
            table, key = self._slots[name]
            return table[key]  # type: ignore[no-any-return]

        self._model = build_modules(plan, twin, rank=group.rank, group=group, read=held, device=device)

    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any], training: bool) -> Any:
        whole: dict[str, Tensor] = {}
        for table, leaf, name in self._held:
            if name not in whole:
                slots, key = self._slots[name]
                whole[name] = self._whole_buffer(name, slots[key])
            table[leaf] = whole[name]
        self._twin.train(training)
        self._model.training = training
        try:
            outputs = self._model(*args, **kwargs)
            for table, leaf, name in self._held:
                slots, key = self._slots[name]
                if not isinstance(slots[key], nn.Parameter):
                    shard, value = self._plan.shards[name], table[leaf].detach()
                    slots[key] = value if shard.dim is None else shard.take(value, self._group.rank)
            return outputs
        finally:
            for table, leaf, name in self._held:  # nothing stays whole
                slots, key = self._slots[name]
                table[leaf] = slots[key]

    def _whole_buffer(self, name: str, local: Tensor) -> Tensor:
        shard = self._plan.shards[name]
        return local if isinstance(local, nn.Parameter) or shard.dim is None else gather(local, shard, self._group)


def build_modules(
    plan: Plan, twin: nn.Module, *, rank: int, group: Group, read: Callable[[str, Shard], Tensor], device: torch.device
) -> ModulesModel:
    """Give the model's own modules this rank's tensors, and the ways to reach the whole ones."""
    tensors = Tensors(twin)
    linears = _linears(twin, tensors, plan.shards)
    module = ModulesModel(twin)
    _fill(twin, tensors, plan, read, device)
    split = [name for name in (*plan.shards, *plan.tied) if plan.shards[tensors.canonical(name)].dim is not None]
    for prefix, child in twin.named_modules():
        names = {
            leaf: tensors.canonical(f"{prefix}.{leaf}" if prefix else leaf)
            for leaf, parameter in child._parameters.items()
            if parameter is not None
        }
        divided = {leaf: name for leaf, name in names.items() if plan.shards[name].dim is not None}
        if divided or any(name.startswith(f"{prefix}." if prefix else "") for name in split):
            shards = {leaf: plan.shards[name] for leaf, name in divided.items()}
            _specialise(child, shards, divided, group, module, prefix in linears)
        if isinstance(getattr(child, "_orig_mod", None), nn.Module):  # torch.compile cannot look into a gather
            vars(child)["forward"] = child._orig_mod
    return module


def _fill(
    twin: nn.Module, tensors: Tensors, plan: Plan, read: Callable[[str, Shard], Tensor], device: torch.device
) -> None:
    made: dict[str, Any] = {}
    for prefix, child in twin.named_modules(remove_duplicate=False):
        for table, is_parameter in ((child._parameters, True), (child._buffers, False)):
            for leaf, tensor in table.items():
                if tensor is None:
                    continue
                name = tensors.canonical(f"{prefix}.{leaf}" if prefix else leaf)
                if name not in made:
                    local = read(name, plan.shards[name]).to(device)
                    if is_parameter and not isinstance(local, nn.Parameter):
                        local = nn.Parameter(local, requires_grad=tensor.requires_grad)
                    made[name] = local
                table[leaf] = made[name]


def _specialise(
    child: nn.Module,
    divided: Mapping[str, Shard],
    names: Mapping[str, str],
    group: Group,
    owner: ModulesModel,
    linear: bool,
) -> None:
    """Make ``child`` an instance of a subclass that finds whole parameters where its class finds its own."""
    base = type(child)

    def is_local(self: nn.Module, name: str) -> bool:
        """Not what ``torch.func.functional_call`` and its like have put in place."""
        tensor, shard = self._parameters.get(name), divided[name]
        assert shard.dim is not None
        return tensor is not None and tensor.shape[shard.dim] == shard.local_size(group.rank)

    def whole(self: nn.Module, name: str) -> Any:
        shard = divided.get(name)
        if shard is None or not is_local(self, name):
            return base.__getattr__(self, name)
        if owner._whole is not None:
            return owner._whole(names[name])
        return owner.whole((id(self), name), self._parameters[name], shard, group)  # type: ignore[arg-type]

    def forward(self: nn.Module, input: Tensor) -> Tensor:
        read = any((id(self), name) in owner._gathered or not is_local(self, name) for name in divided)
        if owner._whole is not None or read:
            return base.forward(self, input)  # type: ignore[no-any-return]
        weight, bias = self._parameters["weight"], self._parameters.get("bias")
        local = functional.linear(collectives.copy_to_ranks(input, group), weight, bias)  # type: ignore[arg-type]
        sizes = [divided["weight"].local_size(r) for r in range(group.world_size)]
        return collectives.all_gather_concat(local, local.ndim - 1, group, sizes)

    def named_parameters(self: nn.Module, prefix: str = "", *args: Any, **kwargs: Any) -> Any:
        """While the model's own code runs it sees them whole; optimizers, afterwards, see this rank's parts."""
        for name, parameter in base.named_parameters(self, prefix, *args, **kwargs):
            path, _, leaf = name[len(prefix) + 1 if prefix else 0 :].rpartition(".")
            yield name, getattr(self.get_submodule(path), leaf) if owner._running else parameter

    methods: dict[str, Any] = {"named_parameters": named_parameters, "__module__": base.__module__}
    if divided:
        methods["__getattr__"] = whole
    if linear:
        methods["forward"] = forward
    child.__class__ = type(base.__name__, (base,), methods)


def gather(local: Tensor, shard: Shard, group: Group) -> Tensor:
    """The whole of a divided tensor; differentiable."""
    assert shard.dim is not None
    ranks = range(group.world_size)
    whole = collectives.all_gather_concat(local, shard.dim, group, [shard.local_size(r) for r in ranks])
    if _in_order(shard):
        return whole
    index = _indices(shard)
    # Of an index that several ranks hold this rank's own copy is used, so that its gradient arrives here whole.
    position = torch.empty(int(index.max()) + 1, dtype=torch.long)
    position[index] = torch.arange(len(index))
    start = sum(shard.local_size(r) for r in range(group.rank))
    own = shard.index(group.rank)
    position[own] = torch.arange(start, start + len(own))
    return whole.index_select(shard.dim, position.to(whole.device))
