"""Proof that a model's rows do not depend on each other, before requests are ever joined into one forward.

A free leading dimension does not say that it is a batch: in a sequence-first model it is time, and joining two requests
would give both wrong answers. So once per version two small batches are run apart and together, and requests are joined
only if the rows came out the same. Whatever cannot be shown (the inputs made up here do not suit, outputs unknown) is
not joined, which is always right and only slower.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

from coordinator.assemble import assemble
from coordinator.catalog import ModelVersion
from coordinator.commands import BatchInput, Execute
from coordinator.dtypes import DataType
from coordinator.errors import ServiceError
from coordinator.generation import Generation
from coordinator.logging import get_logger
from coordinator.types import TensorValue
from coordinator.validation import FREE, can_join
from protos.tensor_parallel.v1 import tensor_pb2

ROWS = (2, 3)
FREE_SIZES = (4, 8, 16)  # tried in turn for free dimensions other than the batch
# Mixing rows changes results by about their own size; another order of summation by far less.
TOLERANCE = {DataType.FLOAT64: 1e-6, DataType.FLOAT32: 1e-3, DataType.FLOAT16: 5e-2, DataType.BFLOAT16: 1e-1}

Arrays = dict[str, np.ndarray]
Specs = Sequence[tensor_pb2.TensorSpec]


async def prove(entry: ModelVersion, generation: Generation) -> None:
    """Sets ``entry.joinable`` if it can be shown. Tried once: inputs that hurt a rank must not hurt it twice."""
    if entry.join_tried:
        return
    entry.join_tried = True
    assert entry.info is not None
    if entry.info.batching.max_joined_rows <= 1 or not can_join(entry):
        return
    required = [spec for spec in entry.info.inputs if not spec.optional]
    for specs, size in itertools.product((list(entry.info.inputs), required), FREE_SIZES):
        try:
            entry.joinable = await _independent(entry, generation, specs, size)
            why = "" if entry.joinable else "rows of one batch depend on each other"
            break
        except ServiceError as error:
            why = error.message
            if not generation.alive:
                break
    if not entry.joinable:
        entry.info.warnings.append(f"requests are not joined into batches: {why}")
        get_logger().warning("not_joined", model=entry.label, reason=why)


async def _independent(entry: ModelVersion, generation: Generation, specs: Specs, size: int) -> bool:
    random = np.random.default_rng(0)
    parts = [{spec.name: _sample(spec, rows, size, random) for spec in specs} for rows in ROWS]
    whole = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    apart = [await _run(entry, generation, part) for part in parts]
    together = await _run(entry, generation, whole)
    return all(_same(value, [part[index] for part in apart]) for index, value in enumerate(together))


def _sample(spec: tensor_pb2.TensorSpec, rows: int, size: int, random: np.random.Generator) -> np.ndarray:
    dtype = DataType(spec.dtype)
    shape = (rows, *(size if wanted == FREE else wanted for wanted in spec.shape[1:]))
    if dtype.is_integer:
        low = spec.minimum if spec.HasField("minimum") else 1  # unbounded integers are mostly masks
        high = spec.maximum if spec.HasField("maximum") else low
        return random.integers(low, high, shape, dtype=np.int64, endpoint=True).astype(dtype.storage_dtype)
    if dtype.numpy_dtype is None:
        bits = random.standard_normal(shape).astype("<f4").view("<u4")
        return (bits >> 16).astype(np.uint16) if dtype is DataType.BFLOAT16 else np.zeros(shape, dtype.storage_dtype)
    if dtype is DataType.BOOL:
        return np.ones(shape, bool)
    return random.standard_normal(shape).astype(dtype.numpy_dtype)


async def _run(entry: ModelVersion, generation: Generation, arrays: Arrays) -> list[TensorValue]:
    assert entry.info is not None
    dtypes = {spec.name: DataType(spec.dtype) for spec in entry.info.inputs}
    inputs = [
        BatchInput(TensorValue(name, dtypes[name], array.shape, None), [array.tobytes()])
        for name, array in arrays.items()
    ]
    answers = await generation.dispatch(Execute(entry.name, entry.version, inputs, [], ["join-proof"]))
    return assemble(answers, entry.placements)


def _same(together: TensorValue, apart: Sequence[TensorValue]) -> bool:
    rows = sum(ROWS)
    if together.shape[:1] != (rows,) or [part.shape[0] if part.shape else 0 for part in apart] != list(ROWS):
        return False
    if any(part.shape[1:] != together.shape[1:] for part in apart):
        return False
    wanted = np.concatenate([_values(part) for part in apart])
    found = _values(together)
    tolerance = TOLERANCE.get(together.dtype, 0.0)
    finite = np.isfinite(wanted)
    if not np.array_equal(finite, np.isfinite(found)):
        return False
    scale = float(np.abs(wanted[finite]).max(initial=0.0))
    return bool(np.all(np.abs(wanted[finite] - found[finite]) <= tolerance * scale))


def _values(value: TensorValue) -> np.ndarray:
    raw = np.frombuffer(value.data or b"", value.dtype.storage_dtype).reshape(value.shape)
    if value.dtype is DataType.BFLOAT16:
        return (raw.astype("<u4") << 16).view("<f4").astype(np.float64)
    return raw.astype(np.float64)
