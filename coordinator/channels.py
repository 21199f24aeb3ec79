"""The ordered channel to one rank, and its form over a gRPC stream (any host)."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Protocol

import grpc

from coordinator.aio_status import FirstStatus
from coordinator.arena import Lease
from coordinator.commands import Answer, Command, ResponseReader, failed, frames
from protos.tensor_parallel.v1 import shard_pb2 as pb

Metadata = tuple[tuple[str, str], ...]
EXECUTE = "/tensor_parallel.v1.Shard/Execute"


class Dispatch:
    """One command with its place in the order. Encoded once, for however many ranks are sent it.

    ``placed`` is its form for ranks of this host, whose payloads lie in ``lease``.
    """

    __slots__ = ("_frames", "command", "generation", "lease", "placed", "seq")

    def __init__(self, generation: int, seq: int, command: Command) -> None:
        self.generation = generation
        self.seq = seq
        self.command = command
        self.placed: bytes | None = None
        self.lease: Lease | None = None
        self._frames: list[bytes] | None = None

    def frames(self) -> list[bytes]:
        if self._frames is None:
            self._frames = frames(self.generation, self.seq, self.command)
        return self._frames


class Listener(Protocol):
    """Who is told what a rank's channel brings. Called on the event loop."""

    def answered(self, rank: int, seq: int, answer: Answer) -> None: ...

    def broken(self, rank: int, reason: str) -> None:
        """The rank says that its generation has ended: a symptom, often of another rank's death."""

    def disconnected(self, rank: int, reason: str) -> None:
        """The channel itself is gone: most likely the rank is."""


class CommandChannel(Protocol):
    kind: str

    def send(self, dispatch: Dispatch) -> None:
        """Queues ``dispatch`` behind everything sent before. Never blocks and never fails: see Listener."""

    def close(self) -> None: ...


class StreamChannel:
    """``Shard.Execute``: messages are written in order by one task and read by another."""

    kind = "stream"

    def __init__(
        self,
        rank: int,
        generation: int,
        owner: str,
        channel: grpc.aio.Channel,
        listener: Listener,
        metadata: Metadata = (),
    ) -> None:
        self._rank = rank
        self._generation = generation
        self._listener = listener
        self._waiting: deque[bytes] = deque()
        self._wake = asyncio.Event()
        self._closed = False
        self._said_broken = False
        opening = pb.ChannelRequest(generation=generation, open=pb.OpenChannel(owner=owner))
        self._waiting.append(opening.SerializeToString())
        self._wake.set()
        self._call: grpc.aio.StreamStreamCall[bytes, bytes] = channel.stream_stream(EXECUTE)(metadata=metadata)
        self._status = FirstStatus(self._call)
        self._tasks = [asyncio.create_task(self._write()), asyncio.create_task(self._read())]

    def send(self, dispatch: Dispatch) -> None:
        self._waiting.extend(dispatch.frames())
        self._wake.set()

    def close(self) -> None:
        self._closed = True
        self._call.cancel()
        for task in self._tasks:
            task.cancel()

    async def _write(self) -> None:
        try:
            while True:
                while self._waiting:
                    await self._call.write(self._waiting.popleft())
                self._wake.clear()
                await self._wake.wait()
        except (grpc.RpcError, asyncio.InvalidStateError):
            pass  # the reader learns why

    async def _read(self) -> None:
        reader = ResponseReader()
        try:
            while isinstance(raw := await self._call.read(), bytes):
                response = reader.read(raw)
                if response is not None and response.generation == self._generation:
                    self._take(response, reader)
            code, details = self._status.of(await self._call.code(), await self._call.details())
        except grpc.RpcError as error:
            code, details = self._status.of(error.code(), error.details())
        except ValueError as error:
            code, details = grpc.StatusCode.INTERNAL, f"it sent what is no response: {error}"
        if self._closed:
            return
        if self._said_broken or code is grpc.StatusCode.OK:
            self._listener.broken(self._rank, "it closed its channel")
        else:
            self._listener.disconnected(self._rank, details or code.name)

    def _take(self, response: pb.ChannelResponse, reader: ResponseReader) -> None:
        match response.WhichOneof("result"):
            case "execute":
                self._listener.answered(self._rank, response.seq, reader.executed(response.execute))
            case "done":
                self._listener.answered(self._rank, response.seq, None)
            case "failure":
                self._listener.answered(self._rank, response.seq, failed(response.failure))
            case "broken":
                self._said_broken = True
                self._listener.broken(self._rank, response.broken.reason)
            case other:
                raise ValueError(f"a response with {other or 'nothing'} in it")
