"""Layer, RMS, batch, group and instance normalisation, over whole and over divided dimensions.

Over a divided dimension each rank sums its own part, one tiny all-reduce of the moments follows, and the result stays
divided.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from tensor_parallel.planner import runtime
from tensor_parallel.planner.engine import Engine
from tensor_parallel.planner.placement import Owners, Partial, Replicated, Sharded, Unproven, counts
from tensor_parallel.planner.program import PerRank, Ref
from tensor_parallel.planner.rules.registry import rule
from tensor_parallel.planner.values import Call, Value

aten = torch.ops.aten


def _scaled(e: Engine, call: Call, ref: Ref | None, owners: Owners, dim: int, value: Value) -> Ref | None:
    """``ref * weight + bias`` with the parameters' parts along the divided dimension ``dim`` of ``value``."""
    negative = dim - value.ndim
    for name, fn in (("weight", torch.mul), ("bias", torch.add)):
        operand = call[name] if any(a.name == name for a in call.arguments) else None
        if isinstance(operand, Value):
            at = operand.ndim + negative
            if at < 0:
                e.commit_whole(operand)
                part = e.enter(e.whole_now(operand))
            else:
                part = e.part(operand, at, owners)
            ref = e.emit(fn, ref, part)
    return ref


def _sum_of_moments(e: Engine, value: Value, dims: tuple[int, ...]) -> Value:
    """Moments of the local part, reduced over ranks."""
    e.exclusive(e.sharded(value).owners)
    shape = tuple((*(1 if d in dims else s for d, s in enumerate(sizes)), 2) for sizes in value.shapes)
    pending = Value(
        e.emit(runtime.moments, value, dims), Partial(e.sharded(value).origin), shape, torch.float64, value.grad
    )
    return e.full(pending, "")


@rule("layer_norm", "native_layer_norm")
def layer_norm(e: Engine, call: Call) -> Any:
    value = call.value("input")
    if not e.is_sharded(value):
        raise Unproven("only a parameter is divided")
    if isinstance(call.shapes, list):
        raise Unproven("several results")
    place = e.sharded(value)
    normalized = len(call["normalized_shape"])
    if place.dim < value.ndim - normalized:
        for name in ("weight", "bias"):
            if isinstance(call[name], Value):
                e.commit_whole(call[name])
        return e.result(
            call, e.replay_with(call, {id(value): value.ref}), Sharded(place.dim, place.owners, place.origin)
        )
    dims = tuple(range(value.ndim - normalized, value.ndim))
    count = math.prod(value.shapes[0][d] for d in dims)
    sums = _sum_of_moments(e, value, dims)
    ref = e.emit(runtime.normalize, value, e.enter(sums), count, call["eps"])
    ref = _scaled(e, call, ref, place.owners, place.dim, value)
    return e.result(call, ref, Sharded(place.dim, place.owners, place.origin))


@rule("rms_norm")
def rms_norm(e: Engine, call: Call) -> Any:
    value = call.value("input")
    if not e.is_sharded(value):
        raise Unproven("only a parameter is divided")
    place = e.sharded(value)
    normalized = len(call["normalized_shape"])
    if place.dim < value.ndim - normalized:
        if isinstance(call["weight"], Value):
            e.commit_whole(call["weight"])
        return e.result(
            call, e.replay_with(call, {id(value): value.ref}), Sharded(place.dim, place.owners, place.origin)
        )
    dims = tuple(range(value.ndim - normalized, value.ndim))
    count = math.prod(value.shapes[0][d] for d in dims)
    eps = call["eps"] if call["eps"] is not None else torch.finfo(value.dtype).eps
    sums = _sum_of_moments(e, value, dims)
    ref = e.emit(runtime.normalize_rms, value, e.enter(sums), count, eps)
    ref = _scaled(e, call, ref, place.owners, place.dim, value)
    return e.result(call, ref, Sharded(place.dim, place.owners, place.origin))


@rule("batch_norm", "instance_norm", "_native_batch_norm_legit_no_training")
def batch_norm(e: Engine, call: Call) -> Any:
    """Per channel: every argument is cut to the rank's channels."""
    value = call.value("input")
    if not e.is_sharded(value, 1):
        raise Unproven("not divided by channel")
    place = e.sharded(value)
    refs: dict[int, Ref | None] = {id(value): value.ref}
    for name in ("weight", "bias", "running_mean", "running_var"):
        operand = call[name]
        if isinstance(operand, Value):
            refs[id(operand)] = e.part(operand, 0, place.owners)
    ref = e.replay_with(call, refs)
    kept = Sharded(1, place.owners, place.origin)
    if isinstance(call.shapes, list):
        return [
            e.result(
                call, e.item(ref, i), kept if len(shape[0]) == value.ndim else Sharded(0, place.owners, place.origin), i
            )
            if shape is not None and 0 not in shape[0]
            else None
            for i, shape in enumerate(call.shapes)
        ]
    return e.result(call, ref, kept)


@rule("_native_batch_norm_legit_functional", "_native_batch_norm_legit")
def batch_norm_training(e: Engine, call: Call) -> Any:
    """The functional form that also returns the new running statistics."""
    return batch_norm(e, call)


@rule("group_norm", "native_group_norm_")
def group_norm(e: Engine, call: Call) -> Any:
    """Groups of channels: local when every group lies on one rank, else by partial moments per group."""
    value = call.value("input")
    if not e.is_sharded(value, 1):
        raise Unproven("not divided by channel")
    place = e.sharded(value)
    groups, channels = call["num_groups"], value.shapes[0][1]
    labels = [o.reshape(groups, channels // groups) for o in place.owners]
    if groups >= e.ranks:
        try:
            _, owners = e.regroup_rows(labels)
            return _whole_groups(e, call, value, place, owners)
        except Unproven:
            pass
    if groups != 1:
        raise Unproven("groups straddle ranks")
    dims = tuple(range(1, value.ndim))
    sums = _sum_of_moments(e, value, dims)
    if any(len({shape[d] for shape in value.shapes}) > 1 for d in dims):
        count: Any = e.emit(runtime.group_size, value, channels)
    else:
        count = math.prod(value.shapes[0][d] for d in dims)
    ref = e.emit(runtime.normalize, value, e.enter(sums), count, call["eps"])
    for name, fn in (("weight", torch.mul), ("bias", torch.add)):
        if isinstance(call[name], Value):
            part = e.part(call[name], 0, place.owners)
            ref = e.emit(fn, ref, e.emit(runtime.per_channel, part, value.ndim))
    return e.result(call, ref, Sharded(1, place.owners, place.origin))


def _whole_groups(e: Engine, call: Call, value: Value, place: Sharded, owners: Owners) -> Any:
    per_rank = counts(owners[0], e.ranks) if not e.solving else (0,) * e.ranks
    refs: dict[int, Ref | None] = {id(value): value.ref}
    channel_owners = tuple(np.repeat(o, value.shapes[0][1] // len(o)) for o in owners)
    for name in ("weight", "bias"):
        if isinstance(call[name], Value):
            refs[id(call[name])] = e.part(call[name], 0, channel_owners)
    ref = e.replay_with(call, refs, num_groups=PerRank(per_rank))
    return e.result(call, ref, Sharded(1, place.owners, place.origin))


__all__ = ["Replicated"]
