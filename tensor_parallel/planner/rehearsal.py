"""A rank runs its program without its peers, to have it compiled before the first request and to see that what was
compiled computes the same.

A sum over ranks is this rank's own addend here, and what other ranks hold is made of what this one holds: shapes, types
and this rank's weights are the real ones, which is all that compiling asks for. Each compiled function is compared with
the same function uncompiled, on its own arguments. (That the plan is right is proven elsewhere, by ``verify``.)
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from typing import Any

import sympy
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from tensor_parallel.errors import CannotCompile, TensorParallelError, out_of_memory
from tensor_parallel.group import Group
from tensor_parallel.planner.export import TRACING
from tensor_parallel.planner.segments import Segment, Segments, with_compiled
from tensor_parallel.planner.signature import Signature
from tensor_parallel.planner.stopping import pause
from tensor_parallel.planner.verify import distance, tolerance

VERSIONS = 64
"""Of one function at most, for other shapes of weights and other kinds of sizes: torch refuses to compile more."""

Sizes = Mapping[sympy.Symbol, int]
Forward = Callable[[list[Any]], Any]


class Alone:
    """A backend without peers: they hold what this rank holds, and add nothing."""

    name = "alone"

    def __init__(self, group: Group) -> None:
        self.rank, self.world_size = group.rank, group.world_size

    def all_reduce_sum_(self, tensor: Tensor) -> Tensor:
        return tensor

    def all_gather(self, tensor: Tensor, sizes: Sequence[int], dim: int) -> Tensor:
        return torch.cat([_resized(tensor, dim, size) for size in sizes], dim)

    def reduce_scatter_sum(self, tensor: Tensor, sizes: Sequence[int], dim: int) -> Tensor:
        start = sum(sizes[: self.rank])
        return tensor.narrow(dim, start, sizes[self.rank]).clone(memory_format=torch.contiguous_format)

    def broadcast_(self, tensor: Tensor, src: int) -> Tensor:
        return tensor

    def barrier(self) -> None: ...
    def abort(self, reason: str) -> None: ...
    def check(self) -> None: ...
    def close(self) -> None: ...


class Rehearsal:
    """Runs a program at several sizes. The first run shows which sizes vary, the next compiles, the last compares."""

    def __init__(self, segments: Segments, *, check: bool) -> None:
        self._segments, self._check = segments, check
        self._visit: Callable[[Segment, tuple[Any, ...]], Any] = self._note
        self._shapes: list[list[torch.Size]] = []
        self._at = 0

    def called(self, body: str, scope: Mapping[str, Any]) -> Callable[..., Any]:
        """What the generated code of a rehearsal calls for a segment."""
        segment = self._segments.get(body, scope)
        return lambda *args: self._visit(segment, args)

    def run(self, forward: Forward, signature: Signature, device: torch.device) -> None:
        """Compile what ``forward(leaves)`` calls. Raises :class:`CannotCompile`."""
        from torch.fx.experimental import _config as symbolic

        def at(sizes: Sizes, visit: Callable[[Segment, tuple[Any, ...]], Any]) -> None:
            self._visit, self._at = visit, 0
            try:
                forward(_inputs(signature, sizes, device))
            except TensorParallelError:
                raise
            except Exception as error:  # compilers and models raise anything
                if out_of_memory(error):
                    raise
                raise CannotCompile(_refusal(error)) from error

        # Sizes that happen to be equal here need not be so in a request.
        apart = symbolic.patch(use_duck_shape=False)  # type: ignore[attr-defined]
        with torch.inference_mode(), apart, torch._dynamo.config.patch(recompile_limit=VERSIONS):
            for first, second in _kinds(signature):
                self._shapes = []
                at(first, self._note)
                at(second, self._compile)
                at(first, self._compare)

    def _note(self, segment: Segment, args: tuple[Any, ...]) -> Any:
        self._shapes.append([value.shape for value in _tensors(args)])
        made = [(value.numel(), index) for index, value in enumerate(args) if _is_made(value)]
        segment.largest = max(made)[1] if made else None
        return segment.function(*args)

    def _compile(self, segment: Segment, args: tuple[Any, ...]) -> Any:
        pause()
        for value, other in zip(_tensors(args), self._shapes[self._at], strict=True):
            for dim, size in enumerate(other):
                if value.shape[dim] == size:
                    torch._dynamo.mark_static(value, dim)
        self._at += 1
        return self._compared(segment, segment.compiled, args)

    def _compare(self, segment: Segment, args: tuple[Any, ...]) -> Any:
        return self._compared(segment, with_compiled(segment.function), args)

    def _compared(self, segment: Segment, compiled: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        if segment.largest is None:
            return segment.function(*args)
        copies = pytree.tree_map_only(Tensor, _copy, args)
        with TRACING:
            got = compiled(*args)
        if self._check:
            for value, want in zip(pytree.tree_leaves(got), pytree.tree_leaves(segment.function(*copies)), strict=True):
                wrong = distance(value, want) if isinstance(want, Tensor) else float(value != want)
                if not wrong <= (tolerance(want.dtype) if isinstance(want, Tensor) else 0.0):
                    raise CannotCompile(
                        "execution='compile' is refused: compiled code differs from the same code uncompiled, with a "
                        f"relative error of {wrong:.1e}, in\n{segment.source}"
                    )
        return got


def _tensors(args: Any) -> list[Tensor]:
    return [value for value in pytree.tree_leaves(args) if isinstance(value, Tensor)]


def _is_made(value: Any) -> bool:
    """Made by the program from its inputs, or one of them."""
    return isinstance(value, Tensor) and not isinstance(value, nn.Parameter)


def _copy(value: Tensor) -> Tensor:
    return value.clone() if _is_made(value) else value  # a segment may write to what was made for it


def _kinds(signature: Signature) -> Iterator[tuple[Sizes, Sizes]]:
    """Pairs of sizes for what is compiled apart: several rows, and one row, which torch takes for a constant."""
    first, second = signature.assignments[0], signature.assignments[-1]
    yield first, second
    rows = {sizes[0] for sizes in signature.sizes if sizes and isinstance(sizes[0], sympy.Symbol)}
    one = dict.fromkeys(rows, 1)
    if one and signature.satisfied(one):
        yield {**first, **one}, {**second, **one}


def _inputs(signature: Signature, assigned: Sizes, device: torch.device) -> list[Any]:
    """The example's inputs, repeated or cut to the sizes ``assigned``."""
    leaves: list[Any] = []
    for sizes, leaf in zip(signature.sizes, signature.example, strict=True):
        if sizes is not None:
            for dim, size in enumerate(sizes):
                if not isinstance(size, int):
                    leaf = _resized(leaf, dim, int(size.subs(dict(assigned))))
            leaf = leaf.to(device)
        leaves.append(leaf)
    return leaves


def _resized(value: Tensor, dim: int, size: int) -> Tensor:
    """``size`` indices along ``dim``, by repeating those there are."""
    have = value.shape[dim]
    if not have:
        return value.new_zeros([size if d == dim else length for d, length in enumerate(value.shape)])
    return value if size == have else value.index_select(dim, torch.arange(size, device=value.device) % have)


@cache
def check_compiler(kind: str) -> None:
    """Compile something tiny for devices of this kind. Raises :class:`CannotCompile` if that is impossible here."""
    _check_cache()
    try:
        with TRACING, torch.inference_mode():
            torch.compile(lambda value: value.sin() + 1, fullgraph=True)(torch.zeros(8, device=kind))
    except Exception as error:
        raise CannotCompile(_refusal(error)) from error


def _check_cache() -> None:
    """What torch compiled is kept in files, by default of a name under ``/tmp`` that anyone can guess, and run again by
    whoever finds it. Raises :class:`CannotCompile` where others could have put it there."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    found = os.stat(cache_dir())
    if found.st_uid not in (os.geteuid(), 0) or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise CannotCompile(
            f"execution='compile' is refused: others may write to {cache_dir()}, from which torch runs code; "
            "set TORCHINDUCTOR_CACHE_DIR to a directory of your own"
        )


def _refusal(error: Exception) -> str:
    error = getattr(error, "inner_exception", error)  # torch says first that a backend raised
    lines = [line.strip() for line in str(error).splitlines()]
    reason = next(filter(None, lines), "without a message")
    return f"execution='compile' cannot be had: {type(error).__name__}: {reason}; execution='eager' needs no compiler"
