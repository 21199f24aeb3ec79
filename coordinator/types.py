"""What a request and its answer are inside the coordinator, whichever protocol they came by."""

from __future__ import annotations

from dataclasses import dataclass, field

from coordinator.dtypes import DataType
from protos.tensor_parallel.v1.tensor_pb2 import TensorSpec

Buffer = bytes | bytearray | memoryview
Answer = bytes | list[Buffer]  # a message, or the pieces that it is one after another
Form = tuple[tuple[tuple[str, DataType, tuple[int, ...]], ...], tuple[str, ...], tuple[str, ...]]


@dataclass(frozen=True, slots=True)
class RegionRef:
    """A part of a shared-memory region that the client registered; ``offset`` and ``byte_size`` in bytes."""

    region: str
    offset: int
    byte_size: int


@dataclass(slots=True)
class TensorValue:
    """A dense tensor, little-endian and row-major, in ``data`` or in a client's ``region`` (exactly one of them)."""

    name: str
    dtype: DataType
    shape: tuple[int, ...]
    data: Buffer | None
    region: RegionRef | None = None

    @property
    def elements(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count

    @property
    def byte_size(self) -> int:
        """Bytes that shape and dtype ask for."""
        return self.elements * self.dtype.size


@dataclass(slots=True)
class InferRequest:
    """One forward. ``deadline`` is in the event loop's clock; ``priority`` 0 is default, a smaller non-zero first."""

    model: str
    inputs: list[TensorValue]
    version: str = ""
    outputs: list[str] = field(default_factory=list)
    request_id: str = ""
    deadline: float | None = None
    priority: int = 0
    trace_context: dict[str, str] = field(default_factory=dict)
    output_regions: dict[str, RegionRef] = field(default_factory=dict)

    @property
    def form(self) -> Form:
        """All that matters to the model but the values."""
        inputs = tuple([(value.name, value.dtype, value.shape) for value in self.inputs])
        return inputs, tuple(self.outputs), tuple(self.output_regions)


@dataclass(frozen=True, slots=True)
class Accepted:
    """What is known of all requests of one form that a model takes.

    ``rows``: the leading size that the inputs share, 0 where they share none. ``sizes``: of each input, in bytes.
    ``bounded``: the inputs whose values the model limits, by index, and how.
    """

    rows: int
    sizes: tuple[int, ...]
    bounded: tuple[tuple[int, TensorSpec], ...]


@dataclass(slots=True)
class Timings:
    """Seconds; ``forward``, ``collective``, ``copy`` of the slowest rank. ``rows``: of the batch it was joined into."""

    queue: float = 0.0
    dispatch: float = 0.0
    forward: float = 0.0
    collective: float = 0.0
    copy: float = 0.0
    total: float = 0.0
    rows: int = 0
    ranks: list[tuple[float, float, float]] = field(default_factory=list)
    """By rank: forward, collective, copy."""


@dataclass(slots=True)
class InferResult:
    """Outputs in the model's order (or the order asked for)."""

    model: str
    version: str
    outputs: list[TensorValue]
    timings: Timings = field(default_factory=Timings)
    request_id: str = ""


@dataclass(slots=True)
class ModelStatistics:
    """Totals of one model version since this coordinator began to serve it; nanoseconds."""

    requests_ok: int = 0
    requests_failed: int = 0
    queue_ns: int = 0
    compute_ns: int = 0
    """From dispatch to the last rank's answer."""
    forward_ns: int = 0
    """Of ``compute_ns``, inside the model on the slowest rank."""
    copy_ns: int = 0
    """Of ``compute_ns``, taking inputs in and outputs out on the slowest rank."""
    success_ns: int = 0
    failed_ns: int = 0
    executions: int = 0
    rows: int = 0
    last_request_unix_ms: int = 0
    batches: dict[int, int] = field(default_factory=dict)
    """Executions by the number of rows they had."""
