"""A socket that the calling thread drives: what was read and is not yet understood, and what waits to be sent."""

from __future__ import annotations

import select
import socket
import struct
from collections import deque

from coordinator.client.transport.deadline import Deadline
from coordinator.client.transport.failures import CallFailed, reason_of, unavailable

CAPACITY = (64 << 10) + 9  # bytes that are held at most
_AT_ONCE = 512  # pieces handed to the kernel together; it takes 1024
_JOINED = 64 << 10  # bytes; less are copied together rather than handed over in pieces
_NEVER = Deadline(None)


class Link:
    """``connected`` is closed by whoever opened it. ``name`` is the peer's address, for messages."""

    def __init__(self, connected: socket.socket, name: str) -> None:
        connected.setblocking(False)
        self.name = name
        self.socket = connected
        self.sent = 0  # bytes that the kernel took, ever
        self._reading, self._both = select.poll(), select.poll()
        self._reading.register(connected, select.POLLIN)
        self._both.register(connected, select.POLLIN | select.POLLOUT)
        self._memory = memoryview(bytearray(CAPACITY))
        self._start = self._end = 0
        self._unsent: deque[memoryview] = deque()
        self._unsent_bytes = 0
        self._broken = ""  # why nothing can be sent any more

    @property
    def closed(self) -> bool:
        """From here: this is a child of the process that opened it, say. Its number may be another file's by now."""
        return self.socket.fileno() < 0

    # ---- what was read

    @property
    def held(self) -> int:
        return self._end - self._start

    def need(self, size: int, deadline: Deadline) -> None:
        """Holds ``size`` bytes, CAPACITY at most; waits for them. Raises CallFailed."""
        while self._end - self._start < size:
            self.fill(deadline)

    def unpacked(self, layout: struct.Struct) -> tuple[int, ...]:
        """What is held begins with this; it is not taken."""
        return layout.unpack_from(self._memory, self._start)

    def take(self, size: int) -> memoryview:
        """The first ``size`` bytes held, or fewer; valid until the next read."""
        start = self._start
        self._start = min(start + size, self._end)
        return self._memory[start : self._start]

    def readable(self) -> bool:
        """Without waiting."""
        return bool(self._reading.poll(0))

    def fill(self, deadline: Deadline) -> None:
        """Holds more than before; waits for it. At most CAPACITY fits. Raises CallFailed."""
        if self._start == self._end:
            self._start = self._end = 0
        elif self._end == CAPACITY:
            held = self.held
            self._memory[:held] = self._memory[self._start : self._end]
            self._start, self._end = 0, held
        self._end += self.receive_into(self._memory[self._end :], deadline)

    def receive_into(self, memory: memoryview, deadline: Deadline) -> int:
        """Past what is held, at least one byte; waits for it, and sends meanwhile. Raises CallFailed."""
        while True:
            while not self.wait(deadline):
                pass
            try:
                size = self.socket.recv_into(memory)
            except BlockingIOError:
                continue
            except OSError as error:
                raise self.lost(reason_of(error)) from None
            if not size:
                raise self.lost("the server closed it")
            return size

    def lost(self, reason: str) -> CallFailed:
        return unavailable(f"the connection to {self.name} was lost: {self._broken or reason}")

    # ---- what is to be sent

    @property
    def unsent(self) -> int:
        return self._unsent_bytes

    def queue(self, *pieces: bytes | memoryview) -> None:
        """``flush`` and ``wait`` send them, in order; they are not copied."""
        for piece in pieces:
            if piece:
                self._unsent.append(memoryview(piece))
                self._unsent_bytes += len(piece)

    def flush(self, deadline: Deadline = _NEVER) -> None:
        """Sends without waiting, until it would have to. Where sending fails, for good, reading goes on and tells: the
        answer may be here. Raises CallFailed for the deadline."""
        while self._unsent:
            deadline.remaining()
            try:
                self._took(self._send())
            except BlockingIOError:
                return
            except OSError as error:
                self._broken = reason_of(error)
                self._unsent.clear()
                self._unsent_bytes = 0

    @property
    def broken(self) -> bool:
        """Whether something could not be sent."""
        return bool(self._broken)

    def wait(self, deadline: Deadline) -> bool:
        """Sends what is unsent; True once there is something to read, False once all is sent. Raises CallFailed."""
        while self._unsent:
            self.flush(deadline)
            if not self._unsent:
                return False
            if any(events & ~select.POLLOUT for _, events in self._both.poll(deadline.milliseconds())):
                return True
        while not self._reading.poll(deadline.milliseconds()):
            pass
        return True

    def _send(self) -> int:
        if self._unsent_bytes <= _JOINED:
            return self.socket.send(b"".join(self._unsent), socket.MSG_NOSIGNAL)
        pieces = [self._unsent[index] for index in range(min(_AT_ONCE, len(self._unsent)))]
        return self.socket.sendmsg(pieces, (), socket.MSG_NOSIGNAL)

    def _took(self, size: int) -> None:
        self.sent += size
        self._unsent_bytes -= size
        while size:
            first = self._unsent[0]
            if size < len(first):
                self._unsent[0] = first[size:]
                return
            size -= len(first)
            self._unsent.popleft()
