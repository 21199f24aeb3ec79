"""The ordered channel as a Unix socket and a shared arena, for a coordinator on this host.

Same commands, answers and order as ``Shard.Execute``; payloads do not pass through the socket.

Opening
    ``OpenLocalChannel(generation, owner)`` answers with ``socket_path`` and ``token``. Within ``OPEN_SECONDS`` the
    coordinator connects a ``SOCK_SEQPACKET`` socket to it (abstract when it begins with ``@``) and sends one message:
    the bytes of ``token``, with the arena's memfds attached (``SCM_RIGHTS``, at most ``MAX_ATTACHED`` to a message).
    They become segments 0, 1, ... in that order. Each must be sealed with ``F_SEAL_SHRINK``. The daemon answers with a
    ``ChannelResponse`` holding ``done`` once the channel is open, or one holding ``broken`` before it hangs up.
    The socket takes one connection, of the same user. ``open`` is not sent on this channel.

Commands
    Every message is one serialised ``ChannelRequest`` of at most ``MAX_MESSAGE`` bytes. Any of them may have further
    memfds attached, which become the next segments, to be used from that message on. ``part`` is not used.
    ``ExecuteModel.arena_inputs`` is empty, or has one entry for each input: its bytes in the arena, or ``byte_size`` 0
    when they are in ``Tensor.data``. Inputs should start at multiples of 64 and must not change until every rank that
    was given them has answered.
    ``ExecuteModel.arena_outputs`` is a region that is this rank's to write to until it has answered. (Give each rank
    an output segment of its own under the same number, and all ranks can be sent the same message.)

Answers
    Every message is one serialised ``ChannelResponse``. ``ExecuteResult.arena_outputs`` is empty, or has one entry for
    each output: its bytes in that region; or, with segment ``ATTACHED``, in the memfd attached to this message (when
    the region was too small), which is the receiver's to map and to close. Empty: all are in ``Tensor.data``.

End
    Either side hangs up; the daemon says ``broken`` first. An arena belongs to one generation: the daemon drops its
    mappings once its executor has let go, which is before it answers the next Fence; and as the next generation comes
    with memfds of its own, a rank that is slow to die can write only to memory that nobody reads any more.
"""

from __future__ import annotations

import array
import contextlib
import hmac
import os
import secrets
import select
import socket
import struct
import threading
from collections.abc import Callable, Mapping

import torch
from google.protobuf.message import DecodeError

from protos.tensor_parallel.v1 import shard_pb2
from shardd import tensors
from shardd.arena import Arena, copy_into, layout, new_segment
from shardd.channel import Channel, Request, Response
from shardd.errors import InvalidRequest, ShardError, judge
from shardd.logging import Logger

OPEN_SECONDS = 5.0
MAX_MESSAGE = 128 << 10
MAX_ATTACHED = 16
ATTACHED = 0xFFFFFFFF
INLINE_BYTES = 16 << 10
"""Outputs that found no room in the arena go into the message itself up to this size."""

_ANCILLARY = socket.CMSG_SPACE(MAX_ATTACHED * array.array("i").itemsize)
# As plain numbers: the operators of enums are several calls each.
_CLOSE_ON_EXEC, _SILENT = int(socket.MSG_CMSG_CLOEXEC), int(socket.MSG_NOSIGNAL)
_CUT = int(socket.MSG_TRUNC | socket.MSG_CTRUNC)


class LocalChannel:
    """See :class:`~shardd.channel.Channel`. The executor blocks in ``recvmsg`` itself: no thread stands between."""

    def __init__(self, generation: int, connection: socket.socket, arena: Arena) -> None:
        self.generation = generation
        self._socket = connection
        self._arena = arena
        self._kept = tensors.Kept()
        self._incoming = memoryview(bytearray(MAX_MESSAGE))
        self._readable = select.poll()
        self._readable.register(connection, select.POLLIN)
        self._closing = threading.Lock()
        self._closed = False
        self._lost = False
        self._attached: int | None = None

    @property
    def lost(self) -> bool:
        return self._lost

    def wait(self, seconds: float) -> bool:
        return bool(self._readable.poll(1e3 * seconds))

    def receive(self) -> Request | None:
        try:
            data, descriptors = receive_message(self._socket, self._incoming)
            if not data:
                self._lost = not self._closed
                return None
            for descriptor in descriptors:
                self._arena.add(descriptor)
            request = Request()
            request.ParseFromString(data)  # type: ignore[arg-type]  # any buffer, says its documentation
            return request
        except OSError:
            self._lost = not self._closed
        except (DecodeError, InvalidRequest) as error:
            self.close(f"a message on the local channel made no sense: {error}")
        return None

    def inputs(self, execute: shard_pb2.ExecuteModel) -> dict[str, torch.Tensor]:
        refs = execute.arena_inputs
        if refs and len(refs) != len(execute.inputs):
            raise InvalidRequest(f"{len(execute.inputs)} inputs came with {len(refs)} places in the arena")
        values: dict[str, torch.Tensor] = {}
        for index, tensor in enumerate(execute.inputs):
            name = tensor.name
            if name in values:
                raise InvalidRequest(f"input {name!r} came twice")
            if refs and refs[index].byte_size:
                values[name] = self._arena.input(tensor, refs[index])
            else:
                values[name] = self._kept.value(tensor)
        return values

    def outputs(self, execute: shard_pb2.ExecuteModel, response: Response, values: Mapping[str, torch.Tensor]) -> None:
        result = response.execute
        if not values:
            return
        refs = self._arena.place(values, execute.arena_outputs) if execute.HasField("arena_outputs") else None
        inline = refs is None and sum([value.nbytes for value in values.values()]) <= INLINE_BYTES
        hosted = tensors.to_host(list(values.values())) if inline else values.values()
        for name, value in zip(values, hosted, strict=True):
            tensors.describe(result.outputs, name, value, tensors.copied(value) if inline else None)
        if refs is not None:
            result.arena_outputs.extend(refs)
        elif not inline:
            refs, size = layout(values, 0, ATTACHED)
            self._attached, memory = new_segment(size)
            copy_into(memory, values, refs)
            result.arena_outputs.extend(refs)

    def reply(self, response: Response) -> None:
        attached, self._attached = self._attached, None
        try:
            send_message(self._socket, response.SerializeToString(), [] if attached is None else [attached])
        except OSError:
            self._lost = not self._closed  # the next receive will say so too
        finally:
            if attached is not None:
                os.close(attached)

    def close(self, reason: str) -> None:
        with self._closing:
            if self._closed:
                return
            self._closed = True
        farewell = Response(generation=self.generation, broken=shard_pb2.Broken(reason=reason))
        with contextlib.suppress(OSError):
            self._socket.send(farewell.SerializeToString(), socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # wakes a blocked receive or reply

    def release(self) -> None:
        self._socket.close()
        self._arena.release()


def receive_message(connection: socket.socket, room: memoryview) -> tuple[memoryview, list[int]]:
    """One message, which is put into ``room``, and the descriptors attached to it; nothing at the end. Raises OSError
    if it was too long."""
    size, ancillary, flags, _ = connection.recvmsg_into((room,), _ANCILLARY, _CLOSE_ON_EXEC)
    if not ancillary and not flags & _CUT:
        return room[:size], []
    descriptors = array.array("i")
    for level, kind, payload in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            descriptors.frombytes(payload[: len(payload) - len(payload) % descriptors.itemsize])
    if flags & _CUT:
        for descriptor in descriptors:
            os.close(descriptor)
        raise OSError("a message on the local channel is too long")
    return room[:size], list(descriptors)


def send_message(connection: socket.socket, data: bytes, descriptors: list[int]) -> None:
    """One message with ``descriptors`` attached. Raises OSError."""
    if descriptors:
        rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))
        connection.sendmsg([data], [rights], _SILENT)
    else:
        connection.send(data, _SILENT)


Enter = Callable[[Channel, Callable[[], None]], None]
"""Takes the channel, and what to call once it is the generation's and before it is served."""


class LocalDoor:
    """Waits, on a thread of its own, for the one connection that was announced, and opens the channel on it."""

    def __init__(self, generation: int, enter: Enter, *, device: torch.device, log: Logger) -> None:
        self._generation = generation
        self._enter = enter
        self._device = device
        self._log = log
        self._name = f"shardd.{os.getpid()}.{secrets.token_hex(8)}"
        self._token = secrets.token_hex(32)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
        self._listener.bind("\0" + self._name)
        self._listener.listen(1)
        self._listener.settimeout(OPEN_SECONDS)
        threading.Thread(target=self._admit, name="local-door", daemon=True).start()

    def announce(self) -> shard_pb2.OpenLocalChannelResponse:
        return shard_pb2.OpenLocalChannelResponse(socket_path="@" + self._name, token=self._token)

    def _admit(self) -> None:
        try:
            with self._listener:
                connection, _ = self._listener.accept()
            connection.settimeout(OPEN_SECONDS)
            self._open(connection)
        except TimeoutError:
            self._log.info("local_channel_unused", generation=self._generation)
        except OSError as error:
            self._log.warning("local_channel_failed", generation=self._generation, error=str(error))

    def _open(self, connection: socket.socket) -> None:
        arena = Arena(self._device)
        channel = LocalChannel(self._generation, connection, arena)
        try:
            self._check_caller(connection, arena)
            connection.settimeout(None)
            done = Response(generation=self._generation, done=shard_pb2.Done())
            self._enter(channel, lambda: channel.reply(done))
        except (ShardError, OSError) as error:
            self._log.warning("local_channel_refused", generation=self._generation, error=judge(error).message)
            channel.close(judge(error).message)
            channel.release()

    def _check_caller(self, connection: socket.socket, arena: Arena) -> None:
        """Raises :class:`InvalidRequest` unless the first message is right."""
        credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        _, user, _ = struct.unpack("3i", credentials)
        token, descriptors = receive_message(connection, memoryview(bytearray(MAX_MESSAGE)))
        try:
            if user != os.getuid() or not hmac.compare_digest(bytes(token), self._token.encode()):
                raise InvalidRequest("the local channel was opened by somebody else")
            while descriptors:
                arena.add(descriptors.pop(0))
        finally:
            for descriptor in descriptors:
                os.close(descriptor)
