"""What a model says of its derivatives, which a trace of its values does not show.

A model is traced without recording gradients, so that ``torch.no_grad()`` within it changes nothing, and of a
``torch.autograd.Function`` only the forward is seen. What enters a region without gradients is detached in the graph
here, where it is traced. Derivatives that the model defines itself are noted: a call that records gradients then has to
run the model's own code.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.utils.checkpoint import CheckpointFunction

from tensor_parallel.planner.reserve import replaced_forward
from tensor_parallel.planner.tensors import differentiable

aten = torch.ops.aten

_Records = Callable[[Any, bool], bool]

_REGIONS: tuple[tuple[Any, _Records], ...] = (
    (torch.no_grad, lambda region, outside: False),
    (torch.enable_grad, lambda region, outside: True),
    (torch.set_grad_enabled, lambda region, outside: outside),  # making one has set it already
    (torch.inference_mode, lambda region, outside: outside and not region.mode),
)
"""Context managers, and whether what runs in one records gradients, if what is outside does or not."""


class Derivatives:
    """Watches one trace; ``own`` says which derivatives the model defines itself."""

    def __init__(self) -> None:
        self.own: dict[str, None] = {}
        self._thread = threading.get_ident()
        self._watching = False
        self._records = True  # whether the model's code would, if its caller did
        self._outer: list[bool] = []
        self._since: fx.Node | None = None
        self._without: set[fx.Node] = set()  # made where no gradient is recorded

    @contextmanager
    def around(self, model: nn.Module) -> Iterator[None]:
        """While ``model`` is traced, in this thread."""
        for name, module in model.named_modules():
            if module._backward_hooks or getattr(module, "_backward_pre_hooks", None):
                self.note(f"{name or type(model).__name__} has backward hooks")
        forward = model.forward

        @wraps(forward)
        def watched(*args: Any, **kwargs: Any) -> Any:
            mode = get_proxy_mode()
            if mode is None:
                return forward(*args, **kwargs)
            self._records, self._outer, self._without = True, [], set()
            self._since, self._watching = _last(mode.tracer.graph), True
            try:
                result = forward(*args, **kwargs)
            finally:
                self._watching = False
            self._mark()
            self._detach(mode.tracer.graph)
            return result

        with ExitStack() as stack:
            for region, records in _REGIONS:
                stack.enter_context(patch.object(region, "__enter__", self._entering(region.__enter__, records)))
                stack.enter_context(patch.object(region, "__exit__", self._leaving(region.__exit__)))
            make = torch.set_grad_enabled.__init__
            stack.enter_context(patch.object(torch.set_grad_enabled, "__init__", self._setting(make)))
            apply = torch.autograd.Function.__dict__["apply"]
            stack.enter_context(patch.object(torch.autograd.Function, "apply", classmethod(self._applying(apply))))
            asked = torch.autograd.function._is_setup_context_defined
            stack.enter_context(
                patch.object(torch.autograd.function, "_is_setup_context_defined", self._passing(asked))
            )
            stack.enter_context(replaced_forward(model, watched))
            yield

    def note(self, own: str) -> None:
        """A derivative that the trace does not have; another thread may be running another model meanwhile."""
        if threading.get_ident() == self._thread:
            self.own[own] = None

    def _here(self) -> bool:
        """Whether the model's own code asks, and in the thread that traces it. The regions are then without effect:
        one that records gradients would be traced as one whose results have none."""
        return self._watching and threading.get_ident() == self._thread

    def _entering(self, enter: Callable[..., Any], records: _Records) -> Callable[..., Any]:
        @wraps(enter)
        def entering(region: Any) -> Any:
            if not self._here():
                return enter(region)
            before = region.prev if isinstance(region, torch.set_grad_enabled) else self._records
            self._outer.append(before)
            return self._now(records(region, self._records))

        return entering

    def _leaving(self, leave: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(leave)
        def leaving(region: Any, *exception: Any) -> Any:
            return self._now(self._outer.pop()) if self._here() else leave(region, *exception)

        return leaving

    def _setting(self, make: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(make)
        def setting(region: Any, mode: bool) -> None:
            if not self._here():
                return make(region, mode)  # type: ignore[no-any-return]
            region.prev, region.mode = self._records, mode
            return self._now(bool(mode))

        return setting

    def _now(self, records: bool) -> None:
        self._mark()
        self._records = records

    def _applying(self, apply: Any) -> Callable[..., Any]:
        def applying(function: Any, *args: Any, **kwargs: Any) -> Any:
            if function is CheckpointFunction and threading.get_ident() == self._thread:
                run, _, *given = args  # it records no gradients now, to run once more when they are asked for
                return run(*given)
            return apply.__get__(None, function)(*args, **kwargs)

        return applying

    def _passing(self, asked: Callable[[Any], bool]) -> Callable[[Any], bool]:
        """``apply`` asks this of its function, also an ``apply`` that the model has kept since before the trace."""

        def passing(setup_context: Any) -> bool:
            function = sys._getframe(1).f_locals.get("cls")
            if function is not None and function.__module__ != CheckpointFunction.__module__:
                self.note(f"{function.__name__} has a derivative of its own")
            return asked(setup_context)

        return passing

    def _mark(self) -> None:
        """What was traced since the last time was made as the model's code is now."""
        mode = get_proxy_mode()
        if mode is None:
            return
        last = node = _last(mode.tracer.graph)
        found = []
        while not self._records and node is not None and node is not self._since and node.op != "root":
            found.append(node)
            node = node.prev
        for node in reversed(found):
            self._without.add(node)
            if any(self._has_gradients(written) for written in _written(node)):
                self.note("a tensor that has gradients is written to where none are recorded")
        self._since = last

    def _has_gradients(self, node: fx.Node) -> bool:
        """Not a buffer, which has none, and not what was made where none are recorded, unless it is a view."""
        while node in self._without and _is_view(node) and node.all_input_nodes:
            node = node.all_input_nodes[0]
        return node.op == "call_function" and node not in self._without and _has_derivative(node)

    def _detach(self, graph: fx.Graph) -> None:
        for node in [n for n in graph.nodes if n in self._without and n.op == "call_function"]:
            for source in node.all_input_nodes:
                if source not in self._without and _has_derivative(source):
                    with graph.inserting_before(node):
                        detached = graph.call_function(aten.detach.default, (source,))
                    detached.meta = {**node.meta, "val": source.meta["val"]}
                    node.replace_input_with(source, detached)


def _last(graph: fx.Graph) -> fx.Node:
    return graph._root.prev


def _written(node: fx.Node) -> Iterator[fx.Node]:
    schema = getattr(node.target, "_schema", None)
    if schema is None or not schema.is_mutable:
        return
    for number, argument in enumerate(schema.arguments):
        value = node.args[number] if number < len(node.args) else node.kwargs.get(argument.name)
        if argument.alias_info is not None and argument.alias_info.is_write and isinstance(value, fx.Node):
            yield value


def _is_view(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    made = schema.returns[0].alias_info if schema is not None and schema.returns else None
    return made is not None and not made.is_write


def _has_derivative(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and differentiable(value.dtype)
