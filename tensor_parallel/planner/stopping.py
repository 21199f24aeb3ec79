"""Giving up a plan that nobody wants any more.

Planning takes seconds to minutes on one thread, deep inside its caller: :func:`pause` is called wherever it takes long,
and raises what the caller asked to be stopped with. A trace is made by torch, which runs the model's own code: there it
is called before each of the model's modules. What remains in one piece are the import of a model's code and what torch
does with a whole graph (about a second for 16 layers).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from torch import jit, nn

_check: ContextVar[Callable[[], None] | None] = ContextVar("check", default=None)


@contextmanager
def stoppable(check: Callable[[], None]) -> Iterator[None]:
    """Call ``check`` now and then, on this thread, while the block runs; it may raise."""
    token = _check.set(check)
    try:
        yield
    finally:
        _check.reset(token)


def pause() -> None:
    """Raise what the caller of :func:`stoppable` raises. Where errors of all kinds are caught, call it first: it may
    be that error, by whatever name torch passed it on."""
    check = _check.get()
    if check is not None:
        check()


@contextmanager
def pausing(model: nn.Module) -> Iterator[None]:
    """Pause before each of ``model``'s modules while it runs. Only for a model that nobody else runs meanwhile."""
    if _check.get() is None:
        yield
        return
    modules = [module for module in model.modules() if not isinstance(module, jit.ScriptModule)]
    hooks = [module.register_forward_pre_hook(lambda *_: pause()) for module in modules]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
