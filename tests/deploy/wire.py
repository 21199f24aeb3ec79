"""A slow, lossy network segment: forwards Ethernet frames between interfaces, each one late and some never.

    python wire.py DELAY_SECONDS LOSS IFACE IFACE ...

Run in the namespace of the interfaces. Kernels without the netem queueing discipline have no other way to delay. Says
``wired`` once it forwards. The same frames are lost in every run.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import heapq
import itertools
import random
import select
import socket
import struct
import sys
import time

ETH_P_ALL = 3
PACKET_OUTGOING = 4
SIOCETHTOOL = 0x8946
OFFLOADS = (0x17, 0x1F, 0x24, 0x2C)  # transmit checksums, TSO, GSO, GRO: frames must be whole and of normal size


def disable_offloads(name: str) -> None:
    """What is captured from an interface must be a complete frame, so the kernel may leave nothing to hardware."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        for command in OFFLOADS:
            value = ctypes.create_string_buffer(struct.pack("II", command, 0))
            request = struct.pack("16sP", name.encode(), ctypes.addressof(value))
            fcntl.ioctl(control, SIOCETHTOOL, request.ljust(40, b"\0"))


class Wire:
    def __init__(self, delay: float, loss: float, names: list[str]) -> None:
        self._delay, self._loss = delay, loss
        self._random = random.Random(1)
        self._sockets = [self._open(name) for name in names]
        self._late: list[tuple[float, int, socket.socket, bytes]] = []
        self._order = itertools.count()
        self._learned: dict[bytes, socket.socket] = {}

    def _open(self, name: str) -> socket.socket:
        raw = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL))
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
        raw.bind((name, ETH_P_ALL))
        raw.setblocking(False)
        return raw

    def run(self) -> None:
        while True:
            pause = max(0.0, self._late[0][0] - time.monotonic()) if self._late else None
            for ready in select.select(self._sockets, [], [], pause)[0]:
                self._receive(ready)
            while self._late and self._late[0][0] <= time.monotonic():
                _, _, out, frame = heapq.heappop(self._late)
                with contextlib.suppress(OSError):  # the cable at that end is cut
                    out.send(frame)

    def _receive(self, source: socket.socket) -> None:
        for _ in range(64):
            try:
                frame, address = source.recvfrom(65536)
            except OSError:
                return  # nothing more, or the cable at this end is cut
            if address[2] == PACKET_OUTGOING or self._random.random() < self._loss:
                continue
            self._learned[frame[6:12]] = source
            known = self._learned.get(frame[:6])
            for out in [known] if known else [each for each in self._sockets if each is not source]:
                if out is not source:
                    heapq.heappush(self._late, (time.monotonic() + self._delay, next(self._order), out, frame))


if __name__ == "__main__":
    wire = Wire(float(sys.argv[1]), float(sys.argv[2]), sys.argv[3:])
    print("wired", flush=True)
    wire.run()
