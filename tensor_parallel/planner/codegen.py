"""From a program to the Python function one rank runs.

Plain generated source, one line per step: the fastest thing to call and easy to read (``module.source``). Values are
dropped after
their last use, so that activations live as long as in eager code.
"""

from __future__ import annotations

import linecache
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tensor_parallel.group import Group
from tensor_parallel.planner import cpu_linear
from tensor_parallel.planner.program import PerRank, Program, Ref, Step, refs_in
from tensor_parallel.planner.segments import Called, blocks, renumbered

aten = torch.ops.aten


def _copied(whole: Tensor, value: Tensor, non_blocking: bool = False) -> Tensor:
    """``aten.copy``, which has no derivative of its own."""
    return value.to(whole.dtype).expand(whole.shape)


def _scattered(view: Any, scatter: Any) -> Callable[..., Tensor]:
    """``scatter``, which has no derivative for complex numbers."""

    def scattered(whole: Tensor, part: Tensor, *where: int | None) -> Tensor:
        if not whole.is_complex():
            return scatter(whole, part, *where)  # type: ignore[no-any-return]
        result = whole.clone()
        view(result, *where).copy_(part)
        return result

    return scattered


_DIRECT: dict[Any, Callable[..., Any]] = {
    aten.copy.default: _copied,
    aten.slice_scatter.default: _scattered(aten.slice.Tensor, aten.slice_scatter.default),
    aten.select_scatter.default: _scattered(aten.select.int, aten.select_scatter.default),
    # The same kernels by a shorter way than the dispatcher's Python overloads.
    aten.linear.default: torch._C._nn.linear,
    aten.reshape.default: torch.reshape,
    aten.view.default: torch.reshape,
    aten._unsafe_view.default: torch.reshape,
    aten.transpose.int: torch.transpose,
    aten.permute.default: torch.permute,
    aten.unsqueeze.default: torch.unsqueeze,
    aten.add.Tensor: torch.add,
    aten.sub.Tensor: torch.sub,
    aten.mul.Tensor: torch.mul,
    aten.div.Tensor: torch.div,
    aten.matmul.default: torch.matmul,
    aten.rsqrt.default: torch.rsqrt,
    aten.pow.Tensor_Scalar: torch.pow,
    aten.mean.dim: torch.mean,
    aten.silu.default: torch._C._nn.silu,
    aten.gelu.default: torch._C._nn.gelu,
    aten.relu.default: torch.relu,
    aten.neg.default: torch.neg,
    aten.cat.default: torch.cat,
    aten.scaled_dot_product_attention.default: torch._C._nn.scaled_dot_product_attention,
    aten.layer_norm.default: torch.layer_norm,
    aten.embedding.default: torch.embedding,
    aten.tanh.default: torch.tanh,
}

_IN_PLACE: dict[Any, Callable[..., Any]] = {
    aten.relu.default: torch.relu_,
    aten.gelu.default: torch._C._nn.gelu_,  # type: ignore[attr-defined]
    aten.silu.default: torch._C._nn.silu_,
}
"""What computes the same in its argument's own memory, whose type is that of the result for any argument."""

_ELEMENTWISE = (aten.relu.default, aten.gelu.default, aten.silu.default, aten.tanh.default, aten.sigmoid.default)
"""Their result is laid out as their argument is."""

_ALLOCATING = (aten.linear.default, aten.matmul.default, aten.mm.default, aten.bmm.default, aten.addmm.default)
"""Their results share memory with nothing."""


def _getitem(value: Any, index: int) -> Any:
    return value[index]


def generate(
    program: Program,
    rank: int,
    group: Group,
    device: torch.device,
    tag: str,
    *,
    record_entries: bool,
    called: Called | None = None,
) -> tuple[Callable[..., Any], str]:
    """``fn(inputs, states, constants) -> (outputs, updates)`` for ``rank``, and its source.

    With ``record_entries`` False, which is for calls that record no gradient, the steps that matter to gradients only
    are left out, and sums over ranks and activations take over the memory of what nothing else needs. With
    ``called``, runs of steps that a compiler may join are functions of their own (see ``segments``), of which it gives
    what to call.
    """
    from tensor_parallel.planner.runtime import AllReduce, Enter, add_part

    scope: dict[str, Any] = {}
    alias: dict[int, int] = {}
    writer = _Writer(scope, rank, device, alias)
    steps: list[Step] = []
    for step in program.steps:
        if isinstance(step.fn, Enter) and not record_entries:
            alias[step.out] = _root(alias, step.args[0].id)
        else:
            steps.append(step)
    last = _last_uses(steps, program, alias)
    made_by = {step.out: step for step in steps}
    uses = Counter(_root(alias, number) for step in steps for number in refs_in(step))

    def owned(number: int) -> bool:
        """Nothing but the step that follows sees its memory: a view of it would be another use."""
        step = made_by.get(number)
        if step is None or uses[number] != 1:
            return False
        return step.fn in _ALLOCATING or (step.fn is add_part and owned(_root(alias, step.args[0].id)))

    layout = _Layout(steps, program, alias, uses)
    lines = ["def forward(inputs, states, constants):"]
    for what, numbers in (
        ("inputs", program.inputs),
        ("states", list(program.states.values())),
        ("constants", list(program.constants.values())),
    ):
        if numbers:
            lines.append(f"    {', '.join(f'v{n}' for n in numbers)}, = {what}")

    def statement(step: Step) -> str:
        if isinstance(step.fn, AllReduce) and not record_entries:
            number = _root(alias, step.args[0].id)
            if owned(number) and number in last.get(step.out, ()):
                step = replace(step, fn=_SumInPlace(group))
        if step.fn in _IN_PLACE and not record_entries:
            number = _root(alias, step.args[0].id)
            if owned(number) and number in last.get(step.out, ()):
                step = replace(step, fn=_IN_PLACE[step.fn])
        if step.fn is aten.linear.default and not record_entries and device.type == "cpu":
            features_first = step.out not in joined and layout.is_free(step.out)
            step = replace(step, fn=cpu_linear.linear_features_first if features_first else cpu_linear.linear)
        return writer.statement(step, group)

    parts = [[step] for step in steps] if called is None else list(blocks(steps))
    # Of what goes into compiled code, which is compiled for one layout.
    joined = {_root(alias, n) for block in parts if len(block) > 1 for step in block for n in refs_in(step)}
    for block in parts:
        dead = [number for step in block for number in last.get(step.out, ())]
        made = {step.out for step in block}
        if len(block) == 1 or called is None:
            lines.append("    " + statement(block[0]))
        else:
            lines.append("    " + writer.call(block, [step.out for step in block if step.out not in dead], called))
        if gone := [number for number in dead if number not in made]:
            lines.append("    " + " = ".join(f"v{n}" for n in gone) + " = None")
    outputs = writer.expression(list(program.outputs))
    updates = writer.expression(list(program.updates.values()))
    lines.append(f"    return {outputs}, {updates}")
    source = "\n".join(lines) + "\n"
    filename = f"<planned forward {tag} rank {rank}>"
    linecache.cache[filename] = (len(source), None, source.splitlines(True), filename)
    exec(compile(source, filename, "exec"), scope)
    return scope["forward"], source


@dataclass(frozen=True)
class _SumInPlace:
    """AllReduce without a copy, of a value that nothing else needs."""

    group: Group

    def __call__(self, value: Tensor) -> Tensor:
        return self.group.all_reduce_sum_(value if value.is_contiguous() else value.contiguous())


class _Layout:
    """Which values nobody but a ``linear``, or what is elementwise before it, looks at: any layout will do for them."""

    def __init__(self, steps: list[Step], program: Program, alias: dict[int, int], uses: Counter[int]) -> None:
        self._alias = alias
        self._made_by = {step.out: step for step in steps}
        self._user = {_root(alias, number): step for step in steps for number in refs_in(step)}
        results = [*program.outputs, *program.updates.values()]
        kept = {_root(alias, ref.id) for ref in results if isinstance(ref, Ref)}
        self._once = {number for number, count in uses.items() if count == 1 and number not in kept}

    def is_free(self, number: int) -> bool:
        user = self._user.get(number)
        if user is None or number not in self._once:
            return False
        if user.fn is aten.linear.default:
            return isinstance(user.args[0], Ref) and _root(self._alias, user.args[0].id) == number
        if user.fn in _ELEMENTWISE:
            return self.is_free(user.out)
        if user.fn is aten.mul.Tensor:
            return all(self._is_linear(factor) for factor in user.args) and self.is_free(user.out)
        return False

    def _is_linear(self, value: Any) -> bool:
        """Made by a ``linear``, or elementwise from one, and used once."""
        number = _root(self._alias, value.id) if isinstance(value, Ref) else None
        if number not in self._once or number not in self._made_by:
            return False
        step = self._made_by[number]
        return step.fn is aten.linear.default or (step.fn in _ELEMENTWISE and self._is_linear(step.args[0]))


def _root(alias: dict[int, int], number: int) -> int:
    return alias.get(number, number)


def _last_uses(steps: list[Step], program: Program, alias: dict[int, int]) -> dict[int, list[int]]:
    """By step result: the values nobody needs after that step."""
    keep = set(program.inputs) | set(program.states.values()) | set(program.constants.values())
    when: dict[int, int] = {}
    for step in steps:
        for number in refs_in(step):
            when[_root(alias, number)] = step.out
        when.setdefault(step.out, step.out)
    for ref in [*program.outputs, *program.updates.values()]:
        if isinstance(ref, Ref):
            keep.add(_root(alias, ref.id))
    result: dict[int, list[int]] = defaultdict(list)
    for number, at in when.items():
        if number not in keep:
            result[at].append(number)
    return result


class _Writer:
    def __init__(self, scope: dict[str, Any], rank: int, device: torch.device, alias: dict[int, int]) -> None:
        self.scope, self.rank, self.device, self.alias = scope, rank, device, alias
        self._known: dict[Any, str] = {}

    def statement(self, step: Step, group: Group | None) -> str:
        import operator

        if step.fn is operator.getitem and isinstance(step.args[1], int):
            return f"v{step.out} = {self.expression(step.args[0])}[{step.args[1]}]"
        if isinstance(step.fn, _SumInPlace):
            name = self.constant(step.fn, f"all_reduce_{step.out}")
        elif hasattr(step.fn, "simulate"):
            collective: Any = step.fn
            name = self.constant(_bound(collective.run, group), f"{collective.kind}_{step.out}")
        else:
            fn = _DIRECT.get(step.fn, step.fn)
            name = self.function(fn)
        parts = [self.expression(a) for a in step.args]
        parts += [f"{key}={self.expression(value)}" for key, value in step.kwargs.items()]
        return f"v{step.out} = {name}({', '.join(parts)})"

    def call(self, block: Sequence[Step], gives: Sequence[int], called: Called) -> str:
        """The call of a block that is compiled; its own source is written with numbers and a scope of its own."""
        steps, takes, local = renumbered(block, lambda number: _root(self.alias, number))
        inner = _Writer({}, self.rank, self.device, local)
        lines = [f"def segment({', '.join(f'v{local[number]}' for number in takes)}):"]
        lines += ["    " + inner.statement(step, None) for step in steps]
        lines.append(f"    return ({''.join(f'v{local[number]}, ' for number in gives)})")
        name = self.constant(called("\n".join(lines) + "\n", inner.scope), f"segment_{block[0].out}")
        targets = "".join(f"v{number}, " for number in gives)
        return f"{targets}= {name}({', '.join(f'v{number}' for number in takes)})"

    def function(self, fn: Any) -> str:
        if fn not in self._known:
            base = getattr(fn, "__name__", "fn").replace(".", "_")
            name = f"{base}_{len(self._known)}"
            self._known[fn] = name
            self.scope[name] = fn
        return self._known[fn]

    def constant(self, value: Any, name: str) -> str:
        self.scope[name] = value
        return name

    def expression(self, value: Any) -> str:
        if isinstance(value, Ref):
            return f"v{_root(self.alias, value.id)}"
        if isinstance(value, PerRank):
            return self.expression(value.values[self.rank])
        if isinstance(value, list):
            return "[" + ", ".join(self.expression(v) for v in value) + "]"
        if type(value) is tuple:
            return "(" + "".join(self.expression(v) + ", " for v in value) + ")"
        if value is None or isinstance(value, (bool, int, str)):
            return repr(value)
        if isinstance(value, float) and value == value and abs(value) != float("inf"):
            return repr(value)
        if isinstance(value, torch.device):
            value = self.device
        return self.constant(value, f"c{len(self.scope)}")


def _bound(run: Callable[..., Any], group: Group | None) -> Callable[..., Any]:
    return lambda *args: run(group, *args)
