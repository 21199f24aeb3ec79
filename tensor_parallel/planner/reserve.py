"""CPU tensors of any size that occupy no memory: address space is reserved, no page is ever touched.

Tracing a model needs parameters with a shape, strides, dtype and device, never their values. Meta tensors would do,
but mix badly
with real buffers on the CPU (device mismatches while tracing) and write ``device="meta"`` into the graph.
"""

from __future__ import annotations

import copy
import mmap
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, fx, nn

from tensor_parallel.planner import torch_transformer

_FLAGS = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)


def reserved_like(tensor: Tensor) -> Tensor:
    """A contiguous CPU tensor of ``tensor``'s shape and dtype whose memory is reserved but not committed."""
    nbytes = tensor.numel() * tensor.element_size()
    if nbytes == 0:
        return torch.empty(tensor.shape, dtype=tensor.dtype)
    region = mmap.mmap(-1, nbytes, flags=_FLAGS)
    return torch.frombuffer(region, dtype=torch.uint8).view(tensor.dtype)[: tensor.numel()].view(tensor.shape)


def skeleton(model: nn.Module) -> nn.Module:
    """A copy of ``model`` with its own structure, the same buffers, and meta parameters. Models are traced on the CPU:
    of a model on a GPU, the buffers are copied there.

    Raises whatever ``copy.deepcopy`` raises for a module that cannot be copied.
    """
    memo: dict[int, object] = {}
    keep: list[object] = []  # deepcopy's memo is keyed by id: what it names must stay alive
    for parameter in model.parameters():
        stand_in = nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=parameter.requires_grad)
        memo[id(parameter)] = stand_in
        keep.append(parameter)
    for buffer in model.buffers():
        memo[id(buffer)] = _on_host(buffer)
    for tensor in _stray_tensors(model):
        memo.setdefault(id(tensor), _on_host(tensor.detach()))
        keep.append(tensor)
    twin: nn.Module = copy.deepcopy(model, memo)
    return twin


def _on_host(tensor: Tensor) -> Tensor:
    return tensor if tensor.is_cpu or tensor.is_meta else tensor.detach().cpu()


@contextmanager
def reserved(model: nn.Module) -> Iterator[None]:
    """Meta parameters stand as reserved CPU tensors meanwhile; tied ones stay tied."""
    stand_ins: dict[int, nn.Parameter] = {}
    swapped: list[tuple[dict[str, nn.Parameter | None], str, nn.Parameter]] = []
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.is_meta:
                if id(parameter) not in stand_ins:
                    empty = reserved_like(parameter.detach())
                    stand_ins[id(parameter)] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
                swapped.append((module._parameters, name, parameter))
                module._parameters[name] = stand_ins[id(parameter)]
    try:
        yield
    finally:
        for table, name, parameter in swapped:
            table[name] = parameter


@contextmanager
def attributes_kept(model: nn.Module) -> Iterator[None]:
    """What a trace assigns to attributes of modules is gone afterwards."""
    before = [(vars(module), dict(vars(module))) for module in model.modules()]
    try:
        yield
    finally:
        for now, then in before:
            now.clear()
            now.update(then)


def _stray_tensors(model: nn.Module) -> Iterator[Tensor]:
    """Tensors held as plain attributes (results of old-style weight norm, caches) that refuse to be copied, or must not
    be where they are."""
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, Tensor) and not (value.is_leaf and (value.is_cpu or value.is_meta)):
                yield value


@contextmanager
def tracing_settings(happened: Callable[[str], None] | None = None) -> Iterator[None]:
    """Settings under which a model is traced: no fused fast paths (opaque kernels), no kernels chosen by available
    hardware. And nothing that only a reader of the trace would want, which takes a tenth of the time: where each node
    comes from, and source code for the graph after each of torch's passes. ``happened``: see ``torch_transformer``."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with _no_stack_traces(), _no_source_code(), torch_transformer.traceable(nested=fast, happened=happened):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


@contextmanager
def _no_stack_traces() -> Iterator[None]:
    known = getattr(fx.config, "do_not_emit_stack_traces", None)  # older versions of torch have no such setting
    if known is None:
        yield
        return
    fx.config.do_not_emit_stack_traces = True
    try:
        yield
    finally:
        fx.config.do_not_emit_stack_traces = known


def _no_source_code() -> AbstractContextManager[None]:
    """Graphs get their source code when they are first called, as all do that ``torch.compile`` handles. There is no
    public way to ask for that."""
    try:
        from torch.fx._lazy_graph_module import _use_lazy_graph_module
    except ImportError:
        return nullcontext()
    return _use_lazy_graph_module(True)


@contextmanager
def replaced_forward(model: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """``model`` runs ``forward`` meanwhile, whether its own is that of its class or of the instance."""
    own = vars(model).get("forward")
    model.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        if own is not None:
            model.forward = own  # type: ignore[method-assign]
        else:
            del model.forward
