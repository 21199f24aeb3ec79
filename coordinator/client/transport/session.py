"""An HTTP/2 connection (RFC 9113) that carries one call at a time, driven by the thread that makes the call.

With one stream there is little to keep: how much either side may send, and what ends the stream. The bytes of bodies
go between the socket and their final place in memory; all other frames are read and written by ``httpunk``.
"""

from __future__ import annotations

from collections.abc import Iterable

import grpc
from httpunk import _httpunk as h2

from coordinator.client.transport.answer import Answer
from coordinator.client.transport.deadline import Deadline
from coordinator.client.transport.failures import CallFailed, Unprocessed, unavailable
from coordinator.client.transport.framing import MAX_FRAME, MAX_HEADER_LIST, MAX_STREAM, data_header
from coordinator.client.transport.incoming import DEFAULT_WINDOW, MAX_WINDOW, Incoming
from coordinator.client.transport.link import Link
from coordinator.http2.fields import timeout_field
from coordinator.http2.messages import BodyError, prefix
from coordinator.types import Buffer

_IDLE_READS = 4  # a server that says more while nobody listens is not listened to
_IDLE_SECONDS = 0.1  # for what should need no wait


class Session:
    """``fields`` begin every request, ``authority`` is the server's name in it. Not safe to share between threads."""

    def __init__(self, link: Link, authority: str, fields: Iterable[tuple[str, str]]) -> None:
        self.link = link
        self._authority = authority
        self._fields = list(fields)
        self._in = Incoming(link)
        self._codec = self._in.framing.codec
        self._complete = True  # the latest request was queued to its end

    def greet(self, deadline: Deadline) -> None:
        """Waits for the server's first words, which show that it speaks HTTP/2. Raises CallFailed."""
        settings = self._codec.serialize_settings(
            enable_push=False,
            initial_window_size=MAX_WINDOW,
            max_frame_size=MAX_FRAME,
            max_header_list_size=MAX_HEADER_LIST,
        )
        room = self._codec.serialize_window_update(0, MAX_WINDOW - DEFAULT_WINDOW)
        self.link.queue(h2.H2_PREFACE + settings + room)
        while not self._in.greeted:
            self._in.step(deadline)

    def usable(self) -> bool:
        """Whether another call can be made, going by what the server has said meanwhile. Does not wait."""
        if self.link.closed:
            return False
        try:
            for _ in range(_IDLE_READS):
                soon = Deadline(_IDLE_SECONDS)
                while self._in.framing.whole():
                    self._in.step(soon)
                self.link.flush()
                if not self.link.readable():
                    return self.clean and self._in.stream < MAX_STREAM - 2
                self.link.fill(soon)
        except CallFailed:
            pass
        return False

    @property
    def clean(self) -> bool:
        """Whether nothing is left of the last request, and the server has not said that it leaves."""
        return self._complete and not (self.link.unsent or self.link.broken or self._in.leaving)

    def call(self, path: str, message: Buffer, metadata: Iterable[tuple[str, str]], deadline: Deadline) -> Answer:
        """The answer, ended. Raises CallFailed, after which the connection is of no use any more."""
        answer = self._in.answer = Answer()
        before = self.link.sent
        try:
            while not (self._in.streams or self._in.leaving):
                self._in.step(deadline)
            if self._in.leaving:
                raise Unprocessed(self._in.leaving)
            self._open(path, metadata, deadline)
            self._send(memoryview(message), deadline)
            while not answer.ended:
                self._in.step(deadline)
            self.link.flush()
        except Unprocessed:
            raise
        except CallFailed as error:
            if self.link.broken and self.link.sent == before:
                raise Unprocessed(error.details()) from None
            if self._in.leaving and error.code() is grpc.StatusCode.UNAVAILABLE:
                raise unavailable(f"{error.details()}; {self._in.leaving}") from None
            raise
        return answer

    # ---- the request

    def _open(self, path: str, metadata: Iterable[tuple[str, str]], deadline: Deadline) -> None:
        stream = self._in.begin()
        self._complete = False
        fields = [*self._fields, *metadata]
        if (left := deadline.remaining()) is not None:
            fields.append(("grpc-timeout", timeout_field(left)))
        self.link.queue(
            self._codec.serialize_request_headers(
                stream, "POST", path, h2.HeaderMap(fields), False, scheme="http", authority=self._authority
            )
        )

    def _send(self, message: memoryview, deadline: Deadline) -> None:
        """Returns when all was sent, or the answer has ended before that. Raises CallFailed."""
        try:
            head = prefix(len(message))
        except BodyError as error:
            raise CallFailed(error.code, error.message) from None
        done, total = 0, len(head) + len(message)
        while done < total and not self._in.answer.ended:
            room = min(self._in.window, self._in.stream_window, total - done)
            if room <= 0:
                self._in.step(deadline)
                continue
            self._in.window -= room
            self._in.stream_window -= room
            while room:
                size = min(room, self._in.frame)
                end = done + size
                header = data_header(self._in.stream, size, end == total)
                piece = message[max(done - len(head), 0) : max(end - len(head), 0)]
                self.link.queue(header, head[done:end], piece)
                done, room = end, room - size
            while self.link.unsent and not self._in.answer.ended:
                if self.link.wait(deadline):
                    self._in.step(deadline)
        self._complete = done == total
