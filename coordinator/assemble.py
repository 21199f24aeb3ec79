"""The ranks' parts of the outputs as whole tensors, and a joined batch's outputs as each request's own.

A replicated output comes from one rank, as it is. A sharded one is written run by run into its final place: this is the
gather of a vocabulary, done here so that it costs the ranks no collective.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from coordinator.commands import Executed
from coordinator.errors import Internal
from coordinator.types import Buffer, TensorValue
from coordinator.wire import flat
from protos.tensor_parallel.v1 import shard_pb2 as pb

Placements = Sequence[Mapping[str, pb.OutputPlacement]]


def assemble(answers: Sequence[Executed | None], placements: Placements) -> list[TensorValue]:
    """Whole outputs, in the order of rank 0's; ``placements`` by rank. Raises Internal when parts do not fit."""
    first = answers[0]
    if first is None:
        raise Internal("rank 0 answered a forward without outputs")
    about = placements[0]
    return [
        _joined(value, answers, placements) if (found := about.get(value.name)) is not None and found.sharded else value
        for value in first.outputs
    ]


def _joined(value: TensorValue, answers: Sequence[Executed | None], placements: Placements) -> TensorValue:
    parts = [_part(rank, value.name, answer) for rank, answer in enumerate(answers)]
    return _gather(parts, [placements[rank][value.name] for rank in range(len(parts))])


def _part(rank: int, name: str, answer: Executed | None) -> TensorValue:
    for value in answer.outputs if answer is not None else ():
        if value.name == name:
            return value
    raise Internal(f"rank {rank} gave no part of output {name!r}")


def _gather(parts: Sequence[TensorValue], placements: Sequence[pb.OutputPlacement]) -> TensorValue:
    first = parts[0]
    dim = placements[0].dim % len(first.shape)
    width = max((run.stop for placement in placements for run in placement.runs), default=0)
    shape = (*first.shape[:dim], width, *first.shape[dim + 1 :])
    whole = np.empty(shape, dtype=first.dtype.storage_dtype)
    for rank, (part, placement) in enumerate(zip(parts, placements, strict=True)):
        wanted = (*shape[:dim], sum(run.stop - run.start for run in placement.runs), *shape[dim + 1 :])
        if part.shape != wanted:
            raise Internal(f"rank {rank} gave {list(part.shape)} of output {part.name!r}, not {list(wanted)}")
        held = np.frombuffer(part.data or b"", dtype=whole.dtype).reshape(part.shape)
        at = 0
        for run in placement.runs:
            size = run.stop - run.start
            whole[_along(dim, run.start, run.stop)] = held[_along(dim, at, at + size)]
            at += size
    return TensorValue(first.name, first.dtype, shape, flat(whole.data))


def _along(dim: int, start: int, stop: int) -> tuple[slice, ...]:
    return (*(slice(None),) * dim, slice(start, stop))


def split(outputs: Sequence[TensorValue], rows: Sequence[int]) -> list[list[TensorValue]]:
    """Each request's outputs, ``rows`` of them in order; views, nothing is copied. Raises Internal."""
    total = sum(rows)
    for value in outputs:
        if not value.shape or value.shape[0] != total:
            raise Internal(f"output {value.name!r} has shape {list(value.shape)} for a batch of {total} rows")
    made: list[list[TensorValue]] = []
    start = 0
    for count in rows:
        made.append([_rows(value, start, count, total) for value in outputs])
        start += count
    return made


def _rows(value: TensorValue, start: int, count: int, total: int) -> TensorValue:
    data: Buffer = value.data if value.data is not None else b""
    size = value.byte_size // total
    view = flat(data)[start * size : (start + count) * size]
    return TensorValue(value.name, value.dtype, (count, *value.shape[1:]), view)
