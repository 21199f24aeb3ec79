"""``python -m tests.chaos.parsers NAME [-runs=N] [CORPUS]``: coverage-guided fuzzing (atheris) of one parser in its own
process. Every parser here reads bytes from a stranger: it accepts them, or says no in the one way that it promises.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Target:
    """``read`` a message; ``refusals`` are the only exceptions that it may raise. ``seeds`` are good messages."""

    read: Callable[[bytes], Any]
    refusals: tuple[type[Exception], ...]
    seeds: list[bytes]

    def __call__(self, data: bytes) -> None:
        with contextlib.suppress(*self.refusals):
            self.read(bytes(data))


def forward() -> Target:
    """A Forward's request."""
    from coordinator.codec import parse_forward
    from coordinator.errors import ServiceError

    return Target(parse_forward, (ServiceError,), [_request().SerializeToString()])


def stream() -> Target:
    """A message of a ForwardStream."""
    from coordinator.codec import parse_stream
    from coordinator.errors import ServiceError
    from protos.tensor_parallel.v1 import coordinator_pb2 as pb

    chunk = pb.TensorChunk(request_id="r", tensor="x", offset=3, data=b"abc", last=True)
    messages = (pb.ForwardStreamRequest(begin=_request()), pb.ForwardStreamRequest(chunk=chunk))
    return Target(parse_stream, (ServiceError,), [message.SerializeToString() for message in messages])


def inference() -> Target:
    """An Open Inference ModelInfer's request."""
    import protos.inference as inference
    from coordinator.errors import ServiceError
    from coordinator.inference_codec import decode

    request = inference.message("ModelInferRequest")(model_name="m", id="1")
    tensor = request.inputs.add(name="x", datatype="FP32", shape=[2, 2])
    tensor.contents.fp32_contents.extend([1, 2, 3, 4])
    request.parameters["priority"].int64_param = 3
    typed = request.SerializeToString()
    request.inputs[0].ClearField("contents")
    request.raw_input_contents.append(bytes(16))
    return Target(decode, (ServiceError,), [typed, request.SerializeToString()])


def response() -> Target:
    """A rank's answer on the ordered channel."""
    from coordinator.commands import ResponseReader
    from protos.tensor_parallel.v1 import shard_pb2 as pb
    from protos.tensor_parallel.v1 import tensor_pb2

    output = tensor_pb2.Tensor(name="y", dtype=1, shape=[2], data=bytes(8))
    part = pb.TensorPart(tensor="y", offset=0, data=b"1234")
    messages = (
        pb.ChannelResponse(generation=1, seq=2, execute=pb.ExecuteResult(outputs=[output], forward_seconds=1)),
        pb.ChannelResponse(generation=1, seq=2, part=part),
        pb.ChannelResponse(generation=1, failure=pb.Failure(code=3, kind="k", message="m")),
    )

    def read(data: bytes) -> None:
        reader = ResponseReader()
        answer = reader.read(data)
        if answer is not None and answer.HasField("execute"):
            reader.executed(answer.execute)

    return Target(read, (ValueError,), [message.SerializeToString() for message in messages])


def safetensors() -> Target:
    """The header of a weights file."""
    from tensor_parallel.checkpoint.safetensors_header import read_header
    from tensor_parallel.errors import CheckpointError

    header = json.dumps(
        {"__metadata__": {"format": "pt"}, "w": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}}
    ).encode()

    def read(data: bytes) -> None:
        for tensor in read_header(_File(data)).values():  # type: ignore[arg-type]
            assert 0 <= tensor.offset <= tensor.offset + tensor.nbytes <= len(data)

    return Target(read, (CheckpointError,), [len(header).to_bytes(8, "little") + header + bytes(16)])


@dataclass(frozen=True)
class _File:
    """What a header is read from, in memory."""

    data: bytes
    name: str = "model.safetensors"

    @property
    def size(self) -> int:
        return len(self.data)

    def read(self, offset: int, size: int) -> bytes:
        return self.data[offset : offset + size]


def expression() -> Target:
    """A symbolic size of an exported program, which torch would hand to an evaluator."""
    from tensor_parallel.checkpoint.pt2_grammar import check_expression
    from tensor_parallel.errors import CheckpointError

    texts = (b"2*s0 + Max(1, s1//3)", b"Mod(s0, 16)", b"-s0**2", b"Piecewise((1, s0 > 2), (s0, True))")
    return Target(lambda data: check_expression(data.decode("utf-8", "replace")), (CheckpointError,), list(texts))


TARGETS: dict[str, Callable[[], Target]] = {
    made.__name__: made for made in (forward, stream, inference, response, safetensors, expression)
}


def _request() -> Any:
    from protos.tensor_parallel.v1 import coordinator_pb2 as pb

    request = pb.ForwardRequest(model="m", version="1", request_id="r", outputs=["y"], priority=2)
    request.inputs.add(name="x", dtype=1, shape=[2, 2], data=bytes(16))
    request.output_regions["y"].region = "r"
    return request


def mutations(seeds: list[bytes], count: int, seed: int = 0) -> Iterator[bytes]:
    """Blind ones, where atheris is not installed."""
    chance = random.Random(seed)
    for _ in range(count):
        data = bytearray(chance.choice(seeds))
        for _ in range(chance.randint(1, 6)):
            at = chance.randrange(len(data) + 1)
            match chance.randrange(4):
                case 0 if at < len(data):
                    data[at] ^= 1 << chance.randrange(8)
                case 1:
                    data[at:at] = chance.randbytes(chance.randint(1, 6))
                case 2:
                    del data[at : at + chance.randint(1, 8)]
                case _:
                    data[at:at] = data[: chance.randint(0, 24)]
        yield bytes(data)


def main(arguments: list[str]) -> None:
    import atheris

    name, *options = arguments
    with atheris.instrument_imports(include=["coordinator", "tensor_parallel.checkpoint", "protos"]):
        target = TARGETS[name]()
    with tempfile.TemporaryDirectory() as corpus:
        for number, seed in enumerate(target.seeds):
            (Path(corpus) / str(number)).write_bytes(seed)
        atheris.Setup([sys.argv[0], *options, *(() if options and os.path.isdir(options[-1]) else (corpus,))], target)
        atheris.Fuzz()


if __name__ == "__main__":
    main(sys.argv[1:])
