"""Everything that is a sum of products: linear, matmul and its kin, einsum, grouped matmul.

Operands' dimensions carry letters. If the letter that is divided reaches the result, so does the division; if it is
summed over,
each rank's product is its term of a pending sum. A weight not settled yet is divided by the input features it will
meet divided,
else by its output features: alternating the two is Megatron-LM's scheme (Shoeybi et al., 2019).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tensor_parallel.planner import runtime
from tensor_parallel.planner.engine import Engine
from tensor_parallel.planner.placement import PARTIAL, Partial, Replicated, Sharded, Undecided, Unproven, positions
from tensor_parallel.planner.program import PerRank, Ref
from tensor_parallel.planner.rules.pointwise import is_pending
from tensor_parallel.planner.rules.registry import partial_rule, rule
from tensor_parallel.planner.values import Call, Value

aten = torch.ops.aten
Letters = tuple[str | None, ...]
Operand = tuple[Value, Letters]
Emit = Callable[[list[Ref | None]], Ref | None]


def contract(
    e: Engine,
    call: Call,
    operands: Sequence[Operand],
    out: Letters,
    product: Emit,
    bias: Operand | None = None,
    with_bias: Callable[[list[Ref | None], Ref | None], Ref | None] | None = None,
    bias_scale: float = 1,
    replay: Callable[[], Any] | None = None,
) -> Any:
    """Divide one letter. ``product`` emits the operation on local operands, ``with_bias`` the same with a local
    bias."""
    tables = [v for v, _ in operands if isinstance(place := e.place(v), Undecided) and place.looked_up]
    if tables:
        for value in tables:
            e.commit(value)
        return e.visit_again(call)
    _settle_weights(e, operands, out)
    letter, owners, origin = _choose(e, operands)
    if letter is None:
        raise Unproven("no operand is divided along a dimension of the product")
    if letter not in out and all(value.weight is None for value, _ in operands) and e.share(owners):
        return e.visit_again(call)  # a small piece of a weight (an input matrix of all heads), rather than a large sum
    # A whole activation cut only for this product: the sum that follows could be avoided.
    avoidable = any(v.weight is None and letter in ls and not e.is_sharded(v) for v, ls in operands)
    refs: list[Ref | None] = []
    for value, letters in operands:
        ref, owners, origin = _operand(e, value, letters, letter, owners, origin)
        refs.append(ref)
    if letter in out:
        weights = [value.weight for value, _ in operands]
        dim = out.index(letter)
        place = Sharded(dim, owners, origin)
        if bias is None or with_bias is None:
            return gathered(e, weights, e.result(call, product(refs), place))
        value, letters = bias
        if letter in letters:
            part = e.part(value, letters.index(letter), owners)
        else:
            e.commit_whole(value)
            part = e.enter(e.whole_now(value))
        return gathered(e, weights, e.result(call, with_bias(refs, part), place))
    e.exclusive(owners)
    ref = product(refs)
    if not e.solving:
        ref = _scaled_after(e, call, operands, out, refs, product, ref)
    if bias is not None:
        ref = _add_bias(e, ref, *bias, out, bias_scale)
    result = e.result(call, ref, PARTIAL)
    # A narrow product beside the main path (a gate, a step size): its operand might better be whole.
    narrow = any(v.weight is None and 4 * result.nbytes <= v.nbytes for v, _ in operands)
    if avoidable or narrow:
        result.place = Partial(origin)
    return result


def _add_bias(e: Engine, pending: Ref | None, value: Value, letters: Letters, out: Letters, scale: float) -> Ref | None:
    """A bias added once to the whole sum: each rank adds the part that it holds, or one rank all of it."""
    e.settle_addend(value)
    if e.is_sharded(value) and letters == out[-1:]:
        owner = e.sharded(value).owners[0]  # a parameter's: alike at every assignment
        index = PerRank(tuple(_indices(positions(owner, rank)) for rank in range(e.ranks)))
        return e.emit(runtime.add_part, pending, value, scale, index)
    e.commit_whole(value)
    whole = e.full(value, "a bias is added once to the whole sum")
    return e.emit(runtime.add_once, pending, whole, scale, PerRank(tuple(rank == 0 for rank in range(e.ranks))))


def _indices(held: NDArray[np.int64]) -> range | tuple[int, ...]:
    found = tuple(held.tolist())
    run = range(found[0], found[-1] + 1) if found else range(0)
    return run if len(run) == len(found) else found


def _scaled_after(
    e: Engine,
    call: Call,
    operands: Sequence[Operand],
    out: Letters,
    refs: Sequence[Ref | None],
    product: Emit,
    ref: Ref | None,
) -> Ref | None:
    """A product over a divided letter whose first operand is scaled by row: scaled afterwards instead.

    The sum then need not wait for the scale, which is itself a sum over ranks where a normalisation runs over a
    divided dimension: both travel together.
    """
    value, letters = operands[0]
    if value.factors is None or letters[:-1] != out[:-1] or len(operands) != 2:
        return ref
    base, scale = value.factors
    summed = e.result(call, product([base.ref, *refs[1:]]), PARTIAL)
    if scale.dtype != summed.dtype or scale.ndim != summed.ndim:
        return ref
    return e.result(call, e.emit(aten.mul.Tensor, summed, e.enter(scale)), PARTIAL).ref


def gathered(e: Engine, weights: Sequence[str | None], result: Value) -> Value:
    """The result of these weights, made whole where the search wants it so."""
    if e.gathers_after(weights):
        return e.full(result, "what follows needs it whole")
    return result


def _settle_weights(e: Engine, operands: Sequence[Operand], out: Letters) -> None:
    """Decide how undecided weights are divided, given what is already divided."""
    divided = {ls[e.sharded(v).dim]: e.sharded(v).owners for v, ls in operands if e.is_sharded(v)}
    for value, letters in operands:
        place = e.place(value)
        if not isinstance(place, Undecided):
            continue
        others = {letter for v, ls in operands if v is not value for letter in ls}
        meets = [letter for letter in divided if letter in letters and letter is not None]
        if meets and place.dims[letters.index(meets[0])] is not None:
            e.commit(value, letters.index(meets[0]), divided[meets[0]])
            continue
        if divided and not meets and all(d in out for d in divided):
            e.commit(value)
            continue
        by_output = [x for x in letters if x in out and x not in others and x is not None]
        by_input = [x for x in letters if x not in out and x is not None]
        batch = [x for x in letters if x in out and x in others and x is not None]
        if e.prefer(value) == "in":
            order = [*by_input, *by_output, *batch]
        else:
            order = [*by_output, *by_input, *batch] if e.worth_dividing(value) else by_output
        for letter in order:
            try:
                e.divide(value, letters.index(letter))
            except Unproven:
                continue
            place = e.place(value)
            if isinstance(place, Sharded):
                divided[letters[place.dim]] = place.owners
            break
        else:
            e.commit(value)


def _choose(e: Engine, operands: Sequence[Operand]) -> tuple[str | None, Any, frozenset[str]]:
    """The letter to divide: a weight's, since weights cannot cheaply be gathered; else the largest operand's."""
    divided = [(v, ls) for v, ls in operands if e.is_sharded(v) and ls[e.sharded(v).dim] is not None]
    if not divided:
        return None, None, frozenset()
    value, letters = max(divided, key=lambda o: (o[0].weight is not None, o[0].nbytes))
    place = e.sharded(value)
    return letters[place.dim], place.owners, place.origin


def _operand(e: Engine, value: Value, letters: Letters, letter: str, owners: Any, origin: frozenset[str]) -> Any:
    place = e.place(value)
    if isinstance(place, Sharded):
        if letters[place.dim] == letter:
            try:
                return value.ref, e.unify(owners, place.owners), origin | place.origin
            except Unproven:
                pass
        value = e.full(value, "operands of a product are divided differently")
    if letter in letters:
        return e.part(value, letters.index(letter), owners), owners, origin
    if isinstance(place, Undecided):
        e.commit_whole(value)
        value = e.whole_now(value)
    return e.enter(value), owners, origin


# ------------------------------------------------------------------------------------------------------ letters
def _names(prefix: str, count: int) -> list[str | None]:
    return [f"{prefix}{i}" for i in range(count)]


def matmul_letters(x: Value, y: Value) -> tuple[Letters, Letters, Letters]:
    """Letters of ``matmul``: batch dimensions broadcast from the right."""
    nx, ny = x.ndim, y.ndim
    batch = max(nx, ny, 2) - 2
    lx: list[str | None] = ["m", "k"] if nx > 1 else ["k"]
    ly: list[str | None] = ["k", "n"] if ny > 1 else ["k"]
    for i in range(1, batch + 1):
        name = f"b{i}"
        if nx - 2 >= i:
            lx.insert(0, None if x.shapes[0][nx - 2 - i] == 1 and ny - 2 >= i else name)
        if ny - 2 >= i:
            ly.insert(0, None if y.shapes[0][ny - 2 - i] == 1 and nx - 2 >= i else name)
    out: list[str | None] = [f"b{i}" for i in range(batch, 0, -1)]
    return tuple(lx), tuple(ly), (*out, *(["m"] if nx > 1 else []), *(["n"] if ny > 1 else []))


@rule("linear")
def linear(e: Engine, call: Call) -> Any:
    x, w, b = call.value("input"), call.value("weight"), call["bias"]
    if w.ndim != 2:
        raise Unproven("a weight that is a vector")
    lead = _names("x", x.ndim - 1)
    operands = [(x, (*lead, "i")), (w, ("o", "i"))]
    bias = (b, ("o",)) if isinstance(b, Value) else None
    return contract(
        e, call, operands, (*lead, "o"),
        lambda refs: e.emit(aten.linear.default, *refs),
        bias, lambda refs, part: e.emit(aten.linear.default, *refs, part),
    )  # fmt: skip


@rule("matmul", "mm", "bmm", "mv", "dot", "inner_")
def matmul(e: Engine, call: Call) -> Any:
    x, y = (call.value(a.name) for a in call.arguments[:2])
    lx, ly, out = matmul_letters(x, y)
    return contract(e, call, [(x, lx), (y, ly)], out, lambda refs: e.emit(aten.matmul.default, *refs))


@rule("addmm", "baddbmm", "addbmm_")
def addmm(e: Engine, call: Call) -> Any:
    x, y = (call.value(a.name) for a in call.arguments[1:3])
    lx, ly, out = matmul_letters(x, y)
    bias = call.value("self")
    beta, alpha = call["beta"], call["alpha"]
    if not isinstance(beta, (int, float)) or alpha != 1:
        if e.undecided(bias) or e.is_sharded(bias):
            raise Unproven("scales that are not constant")
        if not isinstance(beta, (int, float)):
            raise Unproven("scales that are not constant")
    letters = tuple(None if bias.shapes[0][d] == 1 else out[d + len(out) - bias.ndim] for d in range(bias.ndim))

    def product(refs: list[Ref | None]) -> Ref | None:
        ref = e.emit(aten.matmul.default, *refs)
        return ref if alpha == 1 else e.emit(torch.mul, ref, alpha)

    def whole(refs: list[Ref | None], part: Ref | None) -> Ref | None:
        if len(out) == 2:
            return e.emit(aten.addmm.default, part, *refs, beta=beta, alpha=alpha)
        return e.emit(torch.add, product(refs), part, alpha=beta)

    return contract(e, call, [(x, lx), (y, ly)], out, product, (bias, letters), whole, beta)


@rule("einsum")
def einsum(e: Engine, call: Call) -> Any:
    equation = call["equation"].replace(" ", "")
    values: list[Value] = list(call["tensors"])
    if "..." in equation or "->" not in equation:
        raise Unproven("an einsum with an ellipsis or implicit result")
    left, right = equation.split("->")
    sides = left.split(",")
    if any(len(set(side)) != len(side) for side in sides):
        raise Unproven("an einsum with a repeated letter")
    operands: list[Operand] = []
    for value, side in zip(values, sides, strict=True):
        operands.append((value, tuple(side)))
    sizes: dict[Any, Any] = {}
    for value, letters in operands:
        for d, letter in enumerate(letters):
            sizes.setdefault(letter, set()).add(value.shapes[0][d])
    if any(len(s) > 1 for s in sizes.values()):
        raise Unproven("an einsum that broadcasts")
    return contract(e, call, operands, tuple(right), lambda refs: e.emit(aten.einsum.default, equation, refs))


@rule("grouped_mm_fallback", "_grouped_mm", "grouped_mm")
def grouped_mm(e: Engine, call: Call) -> Any:
    """Rows of one operand, grouped by offsets, each group times its own matrix."""
    names = [a.name for a in call.arguments]
    x, w = call.value(names[0]), call.value(names[1])
    if x.ndim != 2 or w.ndim != 3:
        raise Unproven("a grouped product of other ranks than 2 and 3")
    for name in names[2:]:
        operand = call[name]
        if isinstance(operand, Value) and not isinstance(e.place(operand), Replicated):
            raise Unproven("offsets or bias are divided")
    if call["bias"] is not None if "bias" in names else False:
        raise Unproven("a grouped product with a bias")
    letters: Letters = (None, "k", "n")

    def product(refs: list[Ref | None]) -> Ref | None:
        return e.replay(call, **{names[0]: refs[0], names[1]: refs[1]})

    return contract(e, call, [(x, ("t", "k")), (w, letters)], ("t", "n"), product)


@partial_rule("linear", "matmul", "mm", "bmm", "einsum")
def product_of_sum(e: Engine, call: Call) -> Any:
    """A pending sum times something whole, where the result is no larger than the sum."""
    pending = [v for v in call.values() if is_pending(e, v)]
    if len(pending) != 1 or (call.name == "linear" and call["bias"] is not None):
        raise Unproven("several pending sums, or a bias")
    if not all(isinstance(e.place(v), Replicated) for v in call.values() if v is not pending[0]):
        raise Unproven("the other operand is divided")
    size = e.result(call, None, PARTIAL).nbytes
    if size > pending[0].nbytes:
        raise Unproven("the product is larger than the sum")
    return e.result(call, e.replay_entered(call, pending[0]), PARTIAL)
