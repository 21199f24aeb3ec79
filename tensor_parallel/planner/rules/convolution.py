"""Convolutions divided by channel: output channels, input channels (a pending sum), or groups (depthwise included)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from tensor_parallel.planner import runtime
from tensor_parallel.planner.engine import Engine
from tensor_parallel.planner.placement import PARTIAL, Owners, Partial, Sharded, Undecided, Unproven, counts
from tensor_parallel.planner.program import PerRank, Ref
from tensor_parallel.planner.rules.contraction import contract, gathered
from tensor_parallel.planner.rules.registry import rule
from tensor_parallel.planner.values import Call, Value

aten = torch.ops.aten


@rule("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "convolution")
def convolution(e: Engine, call: Call) -> Any:
    x, w, b = call.value("input"), call.value("weight"), call["bias"]
    transposed = "transpose" in call.name or (call.name == "convolution" and bool(call["transposed"]))
    groups = call["groups"]
    if x.ndim != w.ndim:
        raise Unproven("an unbatched convolution")
    if groups != 1:
        return _grouped(e, call, x, w, b, groups, transposed)
    kernel: tuple[None, ...] = (None,) * (w.ndim - 2)
    letters = ("i", "o", *kernel) if transposed else ("o", "i", *kernel)
    bias = (b, ("o",)) if isinstance(b, Value) else None

    def product(refs: list[Ref | None], part: Ref | None = None) -> Ref | None:
        return e.replay(call, input=refs[0], weight=refs[1], bias=part)

    if bias is None:
        return contract(e, call, [(x, (None, "i", *kernel)), (w, letters)], (None, "o", *kernel), product)
    shaped = _Shaped(e, call, b, w.ndim)
    place = e.place(x)
    by_input = isinstance(place, Sharded) and place.dim == 1
    if by_input or (e.is_sharded(w) and letters[e.sharded(w).dim] == "i"):
        result = contract(e, call, [(x, (None, "i", *kernel)), (w, letters)], (None, "o", *kernel), product)
        return shaped.add_once(result)
    return contract(
        e, call, [(x, (None, "i", *kernel)), (w, letters)], (None, "o", *kernel), product, bias, product
    )  # fmt: skip


class _Shaped:
    """A bias over channels, added to a pending sum of images."""

    def __init__(self, e: Engine, call: Call, bias: Value, ndim: int) -> None:
        self.e, self.call, self.bias, self.ndim = e, call, bias, ndim

    def add_once(self, result: Any) -> Any:
        e = self.e
        if not isinstance(result, Value) or not isinstance(result.place, Partial):
            # The division reached the result after all: its own part of the bias is missing.
            place = e.sharded(result)
            part = e.part(self.bias, 0, place.owners)
            ref = e.emit(torch.add, result, e.emit(runtime.per_channel, part, self.ndim))
            return e.result(self.call, ref, place)
        e.commit_whole(self.bias)
        whole = e.emit(runtime.per_channel, e.full(self.bias, "a bias is added once to the whole sum"), self.ndim)
        first = PerRank(tuple(rank == 0 for rank in range(e.ranks)))
        return e.result(self.call, e.emit(runtime.add_once, result, whole, 1, first), PARTIAL)


def _grouped(e: Engine, call: Call, x: Value, w: Value, b: Any, groups: int, transposed: bool) -> Any:
    """Whole groups on each rank: input and output channels of a group stay together."""
    channels_in = x.shapes[0][1]
    channels_out = call.shapes[0][1]
    per_in, per_out = channels_in // groups, channels_out // groups
    rows = per_in if transposed else per_out  # weight rows (dimension 0) per group
    place = e.place(x)
    if isinstance(place, Sharded) and place.dim != 1:
        raise Unproven("a grouped convolution divided along space or batch")
    if isinstance(e.place(w), Undecided) and not isinstance(place, Sharded):
        if groups < e.ranks:
            e.commit(w)
            return e.visit_again(call)
        e.divide(w, 0)
    if isinstance(place, Sharded):
        owners = _group_owners(e, place.owners, per_in)
        origin = place.origin | (e.sharded(w).origin if e.is_sharded(w) else frozenset())
    elif e.is_sharded(w, 0):
        owners = _group_owners(e, e.sharded(w).owners, rows)
        origin = e.sharded(w).origin
    else:
        raise Unproven("a grouped convolution whose weight is divided within groups")
    in_owners, out_owners = (tuple(np.repeat(o, n) for o in owners) for n in (per_in, per_out))
    refs: dict[str, Any] = {
        "input": e.part(x, 1, in_owners),
        "weight": e.part(w, 0, tuple(np.repeat(o, rows) for o in owners)),
    }
    if isinstance(b, Value):
        refs["bias"] = e.part(b, 0, out_owners)
    local = counts(owners[0], e.ranks) if not e.solving else (0,) * e.ranks
    result = e.result(call, e.replay(call, **refs, groups=PerRank(local)), Sharded(1, out_owners, origin))
    return gathered(e, [w.weight], result)


def _group_owners(e: Engine, owners: Owners, per_group: int) -> Owners:
    if per_group == 1:
        return owners
    return e.regroup_rows([o.reshape(-1, per_group) for o in owners])[1]


@rule("max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d", "adaptive_avg_pool1d",
      "adaptive_avg_pool2d",
      "adaptive_avg_pool3d", "adaptive_max_pool1d", "adaptive_max_pool2d", "upsample_bilinear2d", "upsample_nearest1d",
      "upsample_nearest2d", "upsample_nearest3d", "upsample_bicubic2d", "upsample_linear1d", "upsample_trilinear3d",
      "_adaptive_avg_pool2d",
      "max_pool2d_with_indices", "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa", "grid_sampler_",
      "_upsample_nearest_exact2d",
      "max_pool1d_with_indices")  # fmt: skip
def spatial(e: Engine, call: Call) -> Any:
    """Works on the trailing (spatial) dimensions, each channel by itself."""
    value = call.value(call.arguments[0].name)
    if not e.is_sharded(value):
        raise Unproven("not the image is divided")
    place = e.sharded(value)
    kernel = 1 if "1d" in call.name else 3 if "3d" in call.name else 2
    if place.dim >= value.ndim - kernel:
        raise Unproven("divided along space")
    ref = e.replay(call)
    if isinstance(call.shapes, list):
        return [e.result(call, e.item(ref, i), place, i) for i in range(len(call.shapes))]
    return e.result(call, ref, place)
