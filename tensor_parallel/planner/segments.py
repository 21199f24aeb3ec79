"""``execution="compile"``: what a program computes between its matrices and collectives, compiled by ``torch.compile``.

Matrix products, convolutions, attention and collectives stay lines of the generated Python function, as in eager
execution: the compiler sees none of them, so that it can neither move a collective nor keep a group, and ranks whose
code was compiled differently still meet in the same order. Runs of other operations between them become functions of
tensors, of which each is compiled once for all the layers that it occurs in.

All is compiled when the model is loaded. A request whose sizes none of the compiled versions is for runs the same
functions as they are: nothing is ever compiled while a request waits.
"""

from __future__ import annotations

import hashlib
import linecache
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from tensor_parallel.planner.program import Step, refs_in
from tensor_parallel.planner.runtime import is_random, length, lookup_rows, share

aten = torch.ops.aten

FEWEST = 2
"""Operations that a compiler may join into one; for fewer, a call of compiled code costs more than it saves."""
SMALLEST = 1 << 17
"""Elements, on a CPU: below, what a segment works on stays in the cache, and joining passes over it saves less than the
10 us that a call of compiled code costs. Measured by ``python -m tests.benchmarks compile``."""

_KERNELS = (
    *("linear", "matmul", "mm", "bmm", "addmm", "baddbmm", "addmv", "mv", "dot", "einsum", "embedding"),
    *("scaled_dot_product_attention", "convolution", "conv1d", "conv2d", "conv3d", "lstm", "gru"),
    *("conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "_native_multi_head_attention"),
)
_CALLS = frozenset(getattr(aten, name) for name in _KERNELS if hasattr(aten, name))
_BY_VALUES = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)


@dataclass(eq=False)
class Segment:
    """A function of tensors and sizes, and a call of it that compiles. Compiled versions are kept with ``function``'s
    own code: :func:`with_compiled` runs them. ``largest``: the argument with the most elements; None where there are
    only sizes and parameters, for which nothing is compiled."""

    source: str
    function: Callable[..., Any]
    compiled: Callable[..., Any]
    largest: int | None = None


Called = Callable[[str, Mapping[str, Any]], Callable[..., Any]]
"""What generated code calls for the segment of a source over the names of a scope: see :meth:`Segments.get`."""


class Segments:
    """The segments of a module's programs, each once."""

    def __init__(self, device: torch.device) -> None:
        self._smallest = SMALLEST if device.type == "cpu" else 0
        self._known: dict[Any, Segment] = {}

    def get(self, body: str, scope: Mapping[str, Any]) -> Segment:
        """The segment of source ``body`` over the names of ``scope``: functions, dtypes, constants."""
        key = (body, *((name, _identity(value)) for name, value in scope.items()))
        if key not in self._known:
            self._known[key] = _compilable(body, dict(scope))
        return self._known[key]

    def called(self, body: str, scope: Mapping[str, Any]) -> Callable[..., Any]:
        """For serving: the segment compiled, where that pays. It has been rehearsed."""
        segment = self.get(body, scope)
        function, largest, smallest = segment.function, segment.largest, self._smallest
        if largest is None:
            return function
        compiled = with_compiled(function)

        def call(*args: Any) -> Any:
            return function(*args) if args[largest].numel() < smallest else compiled(*args)

        return call

    def __len__(self) -> int:
        """How many are compiled."""
        return sum(segment.largest is not None for segment in self._known.values())


def _identity(value: Any) -> Any:
    try:
        hash(value)
    except TypeError:
        return id(value)  # the scope of the segment keeps it alive
    return type(value), value


def _compilable(body: str, scope: dict[str, Any]) -> Segment:
    filename = f"<planned segment {hashlib.sha256(body.encode()).hexdigest()[:12]}>"
    linecache.cache[filename] = (len(body), None, body.splitlines(True), filename)
    exec(compile(body, filename, "exec"), scope)
    function = scope["segment"]
    return Segment(body, function, torch.compile(function, fullgraph=True, dynamic=True))


def blocks(steps: Sequence[Step]) -> Iterator[list[Step]]:
    """``steps`` in order, cut into runs to be compiled and steps alone."""
    run: list[Step] = []
    for step in steps:
        if _is_call(step):
            yield from _run(run)
            yield [step]
            run = []
        else:
            run.append(step)
    yield from _run(run)


def _run(run: list[Step]) -> Iterator[list[Step]]:
    if sum(not _is_view(step) for step in run) >= FEWEST:
        yield run
    else:
        yield from ([step] for step in run)


def _is_call(step: Step) -> bool:
    """Whether a step is not the compiler's: a kernel, a meeting of ranks, or what depends on values or on chance."""
    fn: Any = step.fn
    if hasattr(fn, "simulate") or fn is lookup_rows or is_random(step):
        return True
    tags = getattr(fn, "tags", ())
    return getattr(fn, "overloadpacket", None) in _CALLS or any(tag in tags for tag in _BY_VALUES)


def _is_view(step: Step) -> bool:
    """Whether a step moves nothing, or computes sizes only."""
    schema = getattr(step.fn, "_schema", None)
    if schema is None:
        return step.fn in (length, share) or getattr(step.fn, "__module__", "") in ("_operator", "math")
    return any(result.alias_info is not None for result in schema.returns)


def renumbered(block: Sequence[Step], root: Callable[[int], int]) -> tuple[list[Step], list[int], dict[int, int]]:
    """The steps of a block under numbers of its own, equal for blocks that do the same; the values it takes, in the
    order of those numbers; and which number is whose."""
    made = {step.out for step in block}
    takes = list(dict.fromkeys(root(number) for step in block for number in refs_in(step) if root(number) not in made))
    numbers = {number: index for index, number in enumerate([*takes, *(step.out for step in block)])}
    local = {number: numbers[root(number)] for step in block for number in refs_in(step)} | numbers
    steps = [replace(step, out=numbers[step.out]) for step in block]
    return steps, takes, local


def with_compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` by the compiled version of it that fits the arguments, if there is one; nothing is compiled.

    ``torch._dynamo.run`` does the same, but raises in a thread that serves while another one traces a model.
    """
    from torch._C._dynamo.eval_frame import set_eval_frame

    def call(*args: Any) -> Any:
        before = set_eval_frame(False)
        try:
            return function(*args)
        finally:
            set_eval_frame(before)

    return call
