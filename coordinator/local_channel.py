"""The ordered channel to a rank on this host: a Unix SEQPACKET socket whose messages point into the arena.

The protocol is described at the top of ``shardd/local_channel.py``. Small payloads travel in the message itself;
others are copied into the arena once, however many ranks there are. Outputs go where they are expected to fit, by what
the same shapes gave before; a rank that needs more attaches memory of its own, once.
"""

from __future__ import annotations

import array
import asyncio
import errno
import fcntl
import functools
import hashlib
import mmap
import os
import socket
import uuid
from collections import deque
from dataclasses import dataclass
from pathlib import Path

from google.protobuf.message import DecodeError

from coordinator.arena import Arena, Lease
from coordinator.channels import Dispatch, Listener
from coordinator.codec import tensor_pieces
from coordinator.commands import Execute, Executed, control_message, executed, failed
from coordinator.errors import InvalidArgument
from coordinator.types import Buffer
from coordinator.wire import VARINT, nested, number, payload, varint
from protos.tensor_parallel.v1 import shard_pb2 as pb

MAX_MESSAGE = 128 << 10
MAX_ATTACHED = 16
ATTACHED = 0xFFFFFFFF
INLINE = 8 << 10  # bytes of inputs or outputs that travel in the message
OPEN_SECONDS = 5.0
REMEMBERED = 4096  # forms of commands
_F_GET_SEALS, _SEAL_SHRINK = 1034, 2
_GENERATION = pb.ChannelRequest.GENERATION_FIELD_NUMBER
_SEQ = pb.ChannelRequest.SEQ_FIELD_NUMBER
_EXECUTE = pb.ChannelRequest.EXECUTE_FIELD_NUMBER
_REQUEST_IDS = pb.ExecuteModel.REQUEST_IDS_FIELD_NUMBER
_INPUTS = pb.ExecuteModel.INPUTS_FIELD_NUMBER
_SEQ_TAG = varint(_SEQ << 3 | VARINT)
# As plain numbers: the operators of enums are several calls each.
_CLOSE_ON_EXEC, _SILENT = int(socket.MSG_CMSG_CLOEXEC), int(socket.MSG_NOSIGNAL)
_CUT = int(socket.MSG_TRUNC | socket.MSG_CTRUNC)
_ANCILLARY = socket.CMSG_SPACE(MAX_ATTACHED * array.array("i").itemsize)


def host_id() -> str:
    """What a daemon of this host and user, with which memory can be shared, tells as its own."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        shared = os.stat("/dev/shm")
    except OSError:
        return uuid.uuid4().hex
    facts = f"{boot} {shared.st_dev} {shared.st_ino} {os.getuid()}"
    return hashlib.sha256(facts.encode()).hexdigest()[:16]


class LocalMemory:
    """The arena of a generation, and the form that a command takes in it: the same message for every rank."""

    def __init__(self, world_size: int, *, reclaim: bool) -> None:
        self.arena = Arena(world_size, reclaim=reclaim)
        self._forms: dict[tuple[object, ...], _Form] = {}
        self._numbered = functools.lru_cache(1)(lambda generation: number(_GENERATION, generation) + _SEQ_TAG)

    def place(self, generation: int, seq: int, command: Execute) -> tuple[bytes, Lease]:
        """Copies the inputs to where the ranks read them. Raises ServiceError."""
        lease = Lease(self.arena)
        form = self._form(command)
        pieces: list[Buffer] = [form.head]
        for id in command.request_ids:
            pieces += payload(_REQUEST_IDS, id.encode())
        for entry, head in zip(command.inputs, form.inputs, strict=True):
            pieces.append(head)
            if form.inline:
                pieces += entry.segments
        if not form.inline or form.needed > INLINE or command.trace_context:
            pieces.append(self._places(command, form, lease).SerializeToString())
        raw = b"".join((self._numbered(generation), varint(seq), *nested(_EXECUTE, pieces)))
        if len(raw) > MAX_MESSAGE:
            raise InvalidArgument(f"a command of {len(raw)} bytes, tensors not counted, is too long")
        return raw, lease

    def _places(self, command: Execute, form: _Form, lease: Lease) -> pb.ExecuteModel:
        """What of a command is not the same in all of its form, and not in all of them."""
        message = pb.ExecuteModel(trace_context=command.trace_context)
        for entry in () if form.inline else command.inputs:
            size = entry.byte_size
            whole = lease.adopt(entry.segments[0]) if len(entry.segments) == 1 else None
            place = whole or lease.put(entry.segments, size)
            message.arena_inputs.add(offset=place.offset, byte_size=size, segment=place.segment.number)
        if form.needed > INLINE:
            place = lease.expect(form.needed)
            message.arena_outputs.offset, message.arena_outputs.byte_size = place.offset, place.size
            message.arena_outputs.segment = place.segment.number
        return message

    def _form(self, command: Execute) -> _Form:
        key = (
            command.model,
            command.version,
            *command.outputs,
            *[(entry.value.name, entry.value.dtype, entry.value.shape, entry.byte_size) for entry in command.inputs],
        )
        form = self._forms.get(key)
        if form is None:
            if len(self._forms) >= REMEMBERED:
                self._forms.clear()
            form = self._forms[key] = _Form.of(command)
        return form

    def room(self, size: int) -> memoryview | None:
        """Where ``size`` bytes of an input can be written by whoever has them; None if they travel inline anyway."""
        return Lease(self.arena).room(size) if size > INLINE else None

    def learn(self, command: Execute, size: int) -> None:
        """Outputs of ``size`` bytes came from one rank."""
        if size > INLINE:
            form = self._form(command)
            form.needed = max(size, form.needed)


@dataclass(slots=True)
class _Form:
    """What is the same in all commands for one model that differ in nothing but the bytes of their inputs."""

    inline: bool
    """The inputs' bytes travel in the message."""
    head: bytes
    inputs: list[bytes]
    """All of each input but its bytes, which follow if they travel in the message."""
    needed: int = 0
    """Bytes of one rank's outputs, as far as is known."""

    @classmethod
    def of(cls, command: Execute) -> _Form:
        inline = command.byte_size <= INLINE
        fixed = pb.ExecuteModel(model=command.model, version=command.version, outputs=command.outputs)
        inputs = []
        for entry in command.inputs:
            size = entry.byte_size if inline else 0
            whole = b"".join(tensor_pieces(_INPUTS, entry.value, (bytes(size),) if size else ()))
            inputs.append(whole[: len(whole) - size])
        return cls(inline, fixed.SerializeToString(), inputs)


class LocalChannel:
    """See CommandChannel. ``open`` must have returned before anything is sent."""

    kind = "local"

    def __init__(self, rank: int, generation: int, memory: LocalMemory, listener: Listener) -> None:
        self._rank = rank
        self._generation = generation
        self._memory = memory
        self._listener = listener
        self._loop = asyncio.get_running_loop()
        self._socket: socket.socket | None = None
        self._segments_sent = 0
        self._waiting: deque[tuple[bytes, list[int]]] = deque()
        self._owed: dict[int, Dispatch] = {}
        self._opened: asyncio.Future[None] = self._loop.create_future()
        self._incoming = memoryview(bytearray(MAX_MESSAGE))
        self._reset = ""

    async def open(self, path: str, token: str) -> None:
        """Raises OSError or TimeoutError; then nothing has been opened, and the stream can be."""
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
        self._socket.setblocking(False)
        try:
            self._socket.connect("\0" + path[1:] if path.startswith("@") else path)
            self._loop.add_reader(self._socket, self._readable)
            self._transmit(token.encode(), self._unsent())
            await asyncio.wait_for(self._opened, OPEN_SECONDS)
        except (OSError, TimeoutError):
            self.close()
            raise

    def send(self, dispatch: Dispatch) -> None:
        if self._socket is None:
            return  # another rank was lost while the command went out to all
        raw = dispatch.placed
        if raw is None:
            assert not isinstance(dispatch.command, Execute)
            raw = control_message(dispatch.generation, dispatch.seq, dispatch.command).SerializeToString()
        self._owed[dispatch.seq] = dispatch
        if self._waiting or self._segments_sent < len(self._memory.arena.segments) or not self._sent(raw):
            self._transmit(raw, self._unsent())

    def close(self) -> None:
        if self._socket is not None:
            self._loop.remove_reader(self._socket)
            self._loop.remove_writer(self._socket)
            self._socket.close()
            self._socket = None
        self._owed.clear()
        self._waiting.clear()
        if not self._opened.done():
            self._opened.cancel()

    # ---- out

    def _sent(self, raw: bytes) -> bool:
        """Whether it went at once, with no more to it."""
        try:
            return self._socket is not None and self._socket.send(raw, _SILENT) > 0
        except OSError:
            return False  # tried again, by those who know what to do

    def _unsent(self) -> list[int]:
        """Descriptors of the segments that this rank has not been given yet."""
        segments = self._memory.arena.segments
        new = segments[self._segments_sent : self._segments_sent + MAX_ATTACHED]
        self._segments_sent += len(new)
        return [segment.descriptors[self._rank] for segment in new]

    def _transmit(self, raw: bytes, descriptors: list[int]) -> None:
        self._waiting.append((raw, descriptors))
        if len(self._waiting) == 1:
            self._flush()

    def _flush(self) -> None:
        """Sends what waits until the socket is full; then goes on when it is not."""
        while self._waiting and self._socket is not None:
            raw, descriptors = self._waiting[0]
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))] if descriptors else []
            try:
                self._socket.sendmsg([raw], rights, _SILENT)
            except BlockingIOError:
                self._loop.add_writer(self._socket, self._resume)
                return
            except OSError as error:
                if error.errno not in (errno.EPIPE, errno.ECONNRESET):  # of a closed connection the reader learns more
                    self._disconnected(f"its socket failed: {error.strerror}")
                return
            self._waiting.popleft()

    def _resume(self) -> None:
        if self._socket is not None:
            self._loop.remove_writer(self._socket)
            self._flush()

    # ---- in

    def _readable(self) -> None:
        if self._socket is None:
            return
        try:
            size, ancillary, flags, _ = self._socket.recvmsg_into((self._incoming,), _ANCILLARY, _CLOSE_ON_EXEC)
        except BlockingIOError:
            return
        except ConnectionResetError as error:
            # It went with commands unread. What it said before, perhaps why, comes now, and then the end; the loop may
            # tell of neither (libuv stops watching a socket that has had an error).
            self._reset = f"its socket failed: {error.strerror}"
            self._loop.call_soon(self._readable)
            return
        except OSError as error:
            self._disconnected(f"its socket failed: {error.strerror}")
            return
        descriptors = _descriptors(ancillary) if ancillary else []
        try:
            if not size:
                self._disconnected(self._reset or "it closed its socket")
            elif flags & _CUT:
                self._disconnected("it sent a message that is too long")
            else:
                self._take(_parse(self._incoming[:size]), descriptors)
                if self._reset:
                    self._loop.call_soon(self._readable)
        except (ValueError, DecodeError, OSError) as error:
            self._disconnected(f"it sent what is no response: {error}")
        finally:
            for descriptor in descriptors:
                os.close(descriptor)

    def _disconnected(self, reason: str) -> None:
        if not self._opened.done():
            self._opened.set_exception(ConnectionError(reason))
            return
        self.close()
        self._listener.disconnected(self._rank, reason)

    def _take(self, response: pb.ChannelResponse, descriptors: list[int]) -> None:
        kind = response.WhichOneof("result")
        if not self._opened.done():
            if kind == "done":
                self._opened.set_result(None)
            else:
                self._opened.set_exception(ConnectionError(response.broken.reason or f"it answered {kind}"))
            return
        if kind == "broken":
            self._listener.broken(self._rank, response.broken.reason)
            return
        dispatch = self._owed.pop(response.seq, None)
        if dispatch is None or response.generation != self._generation:
            raise ValueError(f"an answer to command {response.seq}, which it does not owe")
        if kind == "execute":
            answer = self._executed(dispatch, response.execute, descriptors)
            self._listener.answered(self._rank, response.seq, answer)
        elif kind == "failure":
            self._listener.answered(self._rank, response.seq, failed(response.failure))
        elif kind == "done":
            self._listener.answered(self._rank, response.seq, None)
        else:
            raise ValueError(f"a response with {kind or 'nothing'} in it")

    def _executed(self, dispatch: Dispatch, result: pb.ExecuteResult, descriptors: list[int]) -> Executed:
        refs = result.arena_outputs
        if not refs:
            return executed(result, [tensor.data for tensor in result.outputs])
        if len(refs) != len(result.outputs):
            raise ValueError(f"{len(result.outputs)} outputs with {len(refs)} places")
        lease = dispatch.lease
        payloads: list[Buffer] = []
        attached = _map_attached(descriptors) if any(ref.segment == ATTACHED for ref in refs) else None
        for ref in refs:
            if ref.segment != ATTACHED and lease is not None:
                payloads.append(lease.view(self._rank, ref.offset, ref.byte_size))
            elif attached is not None and ref.offset + ref.byte_size <= len(attached):
                payloads.append(attached[ref.offset : ref.offset + ref.byte_size])
            else:
                raise ValueError("an output outside of its memory")
        if isinstance(dispatch.command, Execute):
            self._memory.learn(dispatch.command, max(ref.offset + ref.byte_size for ref in refs) - refs[0].offset)
        return executed(result, payloads)


def _parse(data: memoryview) -> pb.ChannelResponse:
    """Raises DecodeError."""
    response = pb.ChannelResponse()
    response.ParseFromString(data)  # type: ignore[arg-type]  # any buffer, says its documentation
    return response


def _descriptors(ancillary: list[tuple[int, int, bytes]]) -> list[int]:
    found = array.array("i")
    for level, kind, data in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            found.frombytes(data[: len(data) - len(data) % found.itemsize])
    return list(found)


def _map_attached(descriptors: list[int]) -> memoryview:
    """The memory that a rank attached; unmapped with its last view. Raises ValueError or OSError."""
    if len(descriptors) != 1 or not fcntl.fcntl(descriptors[0], _F_GET_SEALS) & _SEAL_SHRINK:
        raise ValueError("attached memory must be one memfd sealed against shrinking")
    size = os.fstat(descriptors[0]).st_size
    return memoryview(mmap.mmap(descriptors[0], size, prot=mmap.PROT_READ))
