"""What goes to the ranks on the ordered channel, and what comes back: ``ChannelRequest`` and ``ChannelResponse``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from google.protobuf.message import DecodeError

from coordinator import wire
from coordinator.codec import TENSOR_DATA, tensor_of, tensor_pieces
from coordinator.errors import InvalidArgument
from coordinator.types import Buffer, TensorValue
from protos.tensor_parallel.v1 import shard_pb2 as pb

INLINE_LIMIT = 4 << 20  # bytes of inputs in one message; more travels in parts, so that sending and receiving overlap
PART_SIZE = 2 << 20
_EXECUTE = pb.ChannelRequest.EXECUTE_FIELD_NUMBER
_PART = pb.ChannelRequest.PART_FIELD_NUMBER
_INPUTS = pb.ExecuteModel.INPUTS_FIELD_NUMBER
_RESPONSE: wire.Path = {
    pb.ChannelResponse.EXECUTE_FIELD_NUMBER: {pb.ExecuteResult.OUTPUTS_FIELD_NUMBER: {TENSOR_DATA: wire.ONE}},
    pb.ChannelResponse.PART_FIELD_NUMBER: {pb.TensorPart.DATA_FIELD_NUMBER: wire.ONE},
}


@dataclass(slots=True)
class BatchInput:
    """One input of a joined batch: the rows of its requests, in order. ``value.data`` is unused."""

    value: TensorValue
    segments: list[Buffer]

    @property
    def byte_size(self) -> int:
        return sum(map(len, self.segments))


@dataclass(slots=True)
class Execute:
    model: str
    version: str
    inputs: list[BatchInput]
    outputs: list[str]
    request_ids: list[str]
    trace_context: dict[str, str] = field(default_factory=dict)

    @property
    def byte_size(self) -> int:
        return sum(entry.byte_size for entry in self.inputs)

    def message(self) -> pb.ExecuteModel:
        """Without the inputs."""
        return pb.ExecuteModel(
            model=self.model,
            version=self.version,
            outputs=self.outputs,
            request_ids=self.request_ids,
            trace_context=self.trace_context,
        )


@dataclass(frozen=True, slots=True)
class Activate:
    model: str
    version: str


@dataclass(frozen=True, slots=True)
class Unload:
    model: str
    version: str


@dataclass(frozen=True, slots=True)
class Probe:
    pass


Command = Execute | Activate | Unload | Probe


@dataclass(slots=True)
class Executed:
    """One rank's part of the outputs, and what it spent, in seconds."""

    outputs: list[TensorValue]
    forward: float = 0.0
    collective: float = 0.0
    copy: float = 0.0


@dataclass(frozen=True, slots=True)
class Failed:
    """The command failed on one rank; see ``Failure`` in shard.proto."""

    code: int
    kind: str
    message: str
    collective: bool


Answer = Executed | Failed | None  # None: done, with nothing to say


def describe(command: Command) -> str:
    match command:
        case Execute(model=model, version=version):
            return f"forward of {model}@{version}"
        case Activate(model=model, version=version):
            return f"activation of {model}@{version}"
        case Unload(model=model, version=version):
            return f"unload of {model}@{version}"
    return "health probe"


def control_message(generation: int, seq: int, command: Command) -> pb.ChannelRequest:
    """Anything but Execute."""
    request = pb.ChannelRequest(generation=generation, seq=seq)
    match command:
        case Activate(model=model, version=version):
            request.activate.name, request.activate.version = model, version
        case Unload(model=model, version=version):
            request.unload.name, request.unload.version = model, version
        case _:
            request.probe.SetInParent()
    return request


def frames(generation: int, seq: int, command: Command) -> list[bytes]:
    """``command`` as messages of the stream: inputs beyond INLINE_LIMIT in parts, before the command itself."""
    if not isinstance(command, Execute):
        return [control_message(generation, seq, command).SerializeToString()]
    head = pb.ChannelRequest(generation=generation, seq=seq).SerializeToString()
    inline = command.byte_size <= INLINE_LIMIT
    messages = [] if inline else [part for entry in command.inputs for part in _parts(head, entry)]
    pieces: list[Buffer] = [command.message().SerializeToString()]
    for entry in command.inputs:
        pieces += tensor_pieces(_INPUTS, entry.value, entry.segments if inline else ())
    messages.append(b"".join((head, *wire.nested(_EXECUTE, pieces))))
    return messages


def _parts(head: bytes, entry: BatchInput) -> list[bytes]:
    made: list[bytes] = []
    offset = 0
    for segment in entry.segments:
        view = wire.flat(segment)
        for start in range(0, len(view), PART_SIZE):
            piece = view[start : start + PART_SIZE]
            message = pb.TensorPart(tensor=entry.value.name, offset=offset).SerializeToString()
            body = wire.nested(_PART, (message, *wire.payload(pb.TensorPart.DATA_FIELD_NUMBER, piece)))
            made.append(b"".join((head, *body)))
            offset += len(piece)
    return made


class ResponseReader:
    """Reads one rank's stream of responses; keeps the parts of outputs until the result that they belong to."""

    def __init__(self) -> None:
        self._parts: dict[str, bytearray] = {}

    def read(self, raw: bytes) -> pb.ChannelResponse | None:
        """Returns the response, outputs cut out (``executed`` gives them); None for a part. Raises ValueError."""
        small, self._payloads = wire.lift(raw, _RESPONSE)
        try:
            response = pb.ChannelResponse.FromString(small)
        except DecodeError as error:
            raise ValueError(f"no response: {error}") from None
        if response.WhichOneof("result") != "part":
            return response
        part, data = response.part, self._payloads[0]
        collected = self._parts.setdefault(part.tensor, bytearray())
        if part.offset != len(collected):
            raise ValueError(f"output {part.tensor!r} came out of order")
        collected += data or b""
        return None

    def executed(self, result: pb.ExecuteResult) -> Executed:
        """The result read last."""
        return executed(result, self._payloads, self._parts_taken())

    def _parts_taken(self) -> dict[str, bytearray]:
        taken, self._parts = self._parts, {}
        return taken


def executed(
    result: pb.ExecuteResult, payloads: Sequence[Buffer | None], parts: dict[str, bytearray] | None = None
) -> Executed:
    """Raises ValueError for what are no tensors."""
    outputs = []
    for tensor, data in zip(result.outputs, payloads, strict=True):
        try:
            value = tensor_of(tensor, None)
        except InvalidArgument as error:
            raise ValueError(error.message) from None
        value.data = data if data is not None else (parts or {}).get(tensor.name, b"")
        outputs.append(value)
    return Executed(outputs, result.forward_seconds, result.collective_seconds, result.copy_seconds)


def failed(failure: pb.Failure) -> Failed:
    return Failed(failure.code, failure.kind, failure.message, failure.collective)
