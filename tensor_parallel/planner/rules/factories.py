"""Operations that use a tensor only for its dtype and device, and random ones."""

from __future__ import annotations

from typing import Any

from tensor_parallel.planner.engine import Engine
from tensor_parallel.planner.placement import REPLICATED, Sharded, Undecided, Unproven
from tensor_parallel.planner.rules.registry import rule
from tensor_parallel.planner.values import Call


@rule("new_zeros", "new_ones", "new_full", "new_empty")
def like(e: Engine, call: Call) -> Any:
    """A new tensor of a given size: whole, whatever the operand is."""
    value = call.value("self")
    if isinstance(e.place(value), Undecided):
        e.commit(value)
        return e.visit_again(call)
    result = e.result(call, e.replay(call), REPLICATED)
    result.grad = False
    return result


@rule("dropout", "native_dropout", "alpha_dropout", "bernoulli", "rand_like", "randn_like", "feature_dropout")
def random(e: Engine, call: Call) -> Any:
    """Random numbers for a rank's own part differ by rank; off (``train=False``) these are the identity."""
    value = call.value(call.arguments[0].name)
    if not e.is_sharded(value):
        if e.undecided(value):
            e.commit(value)
            return e.visit_again(call)
        raise Unproven("not the operand is divided")
    place = e.sharded(value)
    kept = Sharded(place.dim, place.owners, place.origin)
    off = any(a.name == "train" for a in call.arguments) and call["train"] is False
    if not off:
        e.exclusive(place.owners)
    ref = e.replay(call) if off else e.replay_random(call)
    if isinstance(call.shapes, list):
        return [e.result(call, e.item(ref, i), kept, i) for i in range(len(call.shapes))]
    return e.result(call, ref, kept)
