"""An HTTP/2 connection (RFC 9113) that carries one call at a time, driven by the thread that makes the call.

With one stream there is little to keep: how much either side may send, and what ends the stream. The bytes of bodies
go between the socket and their final place in memory; all other frames are read and written by ``httpunk``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import grpc
from httpunk import _httpunk as h2

from coordinator.client.transport.answer import Answer
from coordinator.client.transport.deadline import Deadline
from coordinator.client.transport.failures import CallFailed, Unprocessed, of_reset, unavailable, violation
from coordinator.client.transport.framing import (
    MAX_FRAME,
    MAX_HEADER_LIST,
    MAX_STREAM,
    Data,
    Framing,
    data_header,
    headers_too_large,
)
from coordinator.client.transport.link import Link
from coordinator.http2.fields import timeout_field
from coordinator.http2.messages import prefix
from coordinator.types import Buffer

_MAX_WINDOW = (1 << 31) - 1
_DEFAULT_WINDOW, _DEFAULT_FRAME = 65_535, 16_384
_CREDIT = 1 << 28  # bytes read after which the server is allowed as many more
_DIRECT = 16 << 10  # bytes; a longer rest of a message is read straight into place
_IDLE_READS = 100  # a server that says more while nobody listens is not listened to
_IDLE_SECONDS = 1.0  # for a read that need not wait
_MOST_OWED = 64 << 10  # bytes of replies that a server may cause without reading them


class Session:
    """``fields`` begin every request, ``authority`` is the server's name in it. Not safe to share between threads."""

    def __init__(self, link: Link, authority: str, fields: Iterable[tuple[str, str]]) -> None:
        self.link = link
        self._authority = authority
        self._fields = list(fields)
        self._framing = Framing(link)
        self._codec = self._framing.codec
        self._stream = -1  # the latest
        self._answer = Answer()
        self._leaving = ""  # why the server takes no more calls
        self._greeted = False
        self._window = self._stream_window = self._initial_window = _DEFAULT_WINDOW  # bytes that we may send
        self._frame = _DEFAULT_FRAME
        self._streams = 1  # that the server takes at a time; more than one is all the same
        self._read = self._stream_read = 0  # bytes that the server has sent of what it may
        self._owed = 0  # bytes of replies that the server has not taken
        self._complete = True  # the latest request was queued to its end
        self._dispatch: dict[type, Callable[[Any], None]] = {
            h2.H2FrameHeaders: self._headers,
            h2.H2FrameSettings: self._settings,
            h2.H2FrameWindowUpdate: self._window_update,
            h2.H2FramePing: self._ping,
            h2.H2FrameRstStream: self._reset,
            h2.H2FrameGoAway: self._go_away,
            h2.H2FrameStreamError: self._stream_error,
        }

    def greet(self, deadline: Deadline) -> None:
        """Waits for the server's first words, which show that it speaks HTTP/2. Raises CallFailed."""
        settings = self._codec.serialize_settings(
            enable_push=False,
            initial_window_size=_MAX_WINDOW,
            max_frame_size=MAX_FRAME,
            max_header_list_size=MAX_HEADER_LIST,
        )
        room = self._codec.serialize_window_update(0, _MAX_WINDOW - _DEFAULT_WINDOW)
        self.link.queue(h2.H2_PREFACE + settings + room)
        self.link.flush()
        try:
            while not self._greeted:
                self._step(deadline)
        except CallFailed as error:
            if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                raise
            raise unavailable(f"{self.link.name} does not speak HTTP/2: {error.details()}") from None

    def usable(self) -> bool:
        """Whether another call can be made, going by what the server has said meanwhile. Does not wait."""
        try:
            for _ in range(_IDLE_READS):
                if not self.link.readable():
                    return self.clean and self._stream < MAX_STREAM - 2
                soon = Deadline(_IDLE_SECONDS)
                self.link.fill(soon)
                while self._framing.whole():
                    self._step(soon)
        except CallFailed:
            pass
        return False

    @property
    def clean(self) -> bool:
        """Whether nothing is left of the last request, and the server has not said that it leaves."""
        return self._complete and not (self.link.unsent or self.link.broken or self._leaving)

    def call(self, path: str, message: Buffer, metadata: Iterable[tuple[str, str]], deadline: Deadline) -> Answer:
        """The answer, ended. Raises CallFailed, after which the connection is of no use any more."""
        answer = self._answer = Answer()
        before = self.link.sent
        try:
            while not (self._streams or self._leaving):
                self._step(deadline)
            if self._leaving:
                raise Unprocessed(self._leaving)
            self._open(path, metadata, deadline)
            self._send(memoryview(message), deadline)
            while not answer.ended:
                self._step(deadline)
        except Unprocessed:
            raise
        except CallFailed as error:
            if self.link.broken and self.link.sent == before:
                raise Unprocessed(error.details()) from None
            if self._leaving and error.code() is grpc.StatusCode.UNAVAILABLE:
                raise unavailable(f"{error.details()}; {self._leaving}") from None
            raise
        return answer

    # ---- the request

    def _open(self, path: str, metadata: Iterable[tuple[str, str]], deadline: Deadline) -> None:
        self._stream += 2
        self._complete = False
        self._stream_window, self._stream_read = self._initial_window, 0
        fields = [*self._fields, *metadata]
        if (left := deadline.remaining()) is not None:
            fields.append(("grpc-timeout", timeout_field(left)))
        self.link.queue(
            self._codec.serialize_request_headers(
                self._stream, "POST", path, h2.HeaderMap(fields), False, scheme="http", authority=self._authority
            )
        )

    def _send(self, message: memoryview, deadline: Deadline) -> None:
        """Returns when all was sent, or the answer has ended before that."""
        head = prefix(len(message))
        done, total = 0, len(head) + len(message)
        while done < total and not self._answer.ended:
            room = min(self._window, self._stream_window, total - done)
            if room <= 0:
                self.link.flush()
                self._step(deadline)
                continue
            self._window -= room
            self._stream_window -= room
            while room:
                size = min(room, self._frame)
                end = done + size
                header = data_header(self._stream, size, end == total)
                piece = message[max(done - len(head), 0) : max(end - len(head), 0)]
                self.link.queue(header, head[done:end], piece)
                done, room = end, room - size
            self.link.flush()
            while self.link.unsent and not self._answer.ended:
                if self.link.wait(deadline):
                    self._step(deadline)
        self._complete = done == total

    # ---- what the server sends

    def _step(self, deadline: Deadline) -> None:
        """Reads one frame and acts on it. Raises CallFailed."""
        found = self._framing.next(deadline)
        if isinstance(found, Data):
            self._data(found, deadline)
        else:
            for frame in found:
                if (act := self._dispatch.get(type(frame))) is not None:  # else priorities, which nobody heeds
                    act(frame)
        self.link.flush()

    def _data(self, frame: Data, deadline: Deadline) -> None:
        answer = self._wanted(frame.stream)
        if answer is not None and not answer.begun:
            raise violation(self.link.name, "data came before the answer's head")
        self._take(frame.size, answer, deadline)
        self._take(frame.padding, None, deadline)
        self._read += frame.counted
        self._stream_read += frame.counted
        if answer is not None and frame.last:
            answer.fields(None, [], True)
        if self._read >= _CREDIT:
            self._reply(self._codec.serialize_window_update(0, self._read))
            self._read = 0
        if self._stream_read >= _CREDIT and not self._answer.ended:
            self._reply(self._codec.serialize_window_update(self._stream, self._stream_read))
            self._stream_read = 0

    def _take(self, left: int, answer: Answer | None, deadline: Deadline) -> None:
        """Reads ``left`` bytes to where they belong; None: nowhere."""
        link = self.link
        while left:
            if answer is not None and not link.held and len(room := answer.room()[:left]) > _DIRECT:
                got = link.receive_into(room, deadline)
                answer.filled(got)
            else:
                while not link.held:
                    link.fill(deadline)
                piece = link.peek(left)
                if answer is not None:
                    answer.feed(piece)
                got = len(piece)
                link.skip(got)
            left -= got

    def _wanted(self, stream: int) -> Answer | None:
        """Where a frame of ``stream`` belongs; None: to a call that is over."""
        if not stream & 1 or stream > self._stream:
            raise violation(self.link.name, f"a frame came for stream {stream}, which was never opened")
        return self._answer if stream == self._stream and not self._answer.ended else None

    def _headers(self, frame: Any) -> None:
        answer = self._wanted(frame.stream_id)
        if answer is None or (frame.is_informational and not answer.begun and not frame.end_stream):
            return
        fields = frame.headers.raw_items()
        if sum(len(name) + len(value) + 32 for name, value in fields) > MAX_HEADER_LIST:
            raise headers_too_large(self.link.name)
        if answer.begun and not frame.end_stream:
            raise violation(self.link.name, "the answer has a second head")
        answer.fields(frame.status, fields, frame.end_stream)

    def _settings(self, frame: Any) -> None:
        if frame.ack:
            return
        self._greeted = True
        if frame.header_table_size is not None:
            self._codec.set_send_header_table_size(frame.header_table_size)
        if frame.max_frame_size is not None:
            self._frame = frame.max_frame_size
            self._codec.set_send_max_frame_size(frame.max_frame_size)
        if frame.max_concurrent_streams is not None:
            self._streams = frame.max_concurrent_streams
        if frame.initial_window_size is not None:
            self._stream_window += frame.initial_window_size - self._initial_window
            self._initial_window = frame.initial_window_size
        self._reply(self._codec.serialize_settings_ack())

    def _window_update(self, frame: Any) -> None:
        if frame.stream_id == 0:
            self._window += frame.increment
        elif self._wanted(frame.stream_id) is not None:
            self._stream_window += frame.increment
        if max(self._window, self._stream_window) > _MAX_WINDOW:
            raise violation(self.link.name, "it allows more data than there is a number for")

    def _ping(self, frame: Any) -> None:
        if not frame.ack:
            self._reply(self._codec.serialize_ping_ack(frame.data))

    def _reset(self, frame: Any) -> None:
        if self._wanted(frame.stream_id) is not None:
            raise of_reset(self.link.name, frame.error_code)

    def _stream_error(self, frame: Any) -> None:
        if self._wanted(frame.stream_id) is not None:
            raise violation(self.link.name, f"error {frame.error_code} in a frame of the answer")

    def _go_away(self, frame: Any) -> None:
        said = f": {frame.debug_data[:200].decode(errors='replace')}" if frame.debug_data else ""
        self._leaving = f"{self.link.name} takes no more calls (GOAWAY {frame.error_code}{said})"
        if not self._answer.ended and self._stream > frame.last_stream_id:
            raise Unprocessed(self._leaving)

    def _reply(self, frame: bytes) -> None:
        self._owed = len(frame) + (self._owed if self.link.unsent else 0)
        if self._owed > _MOST_OWED:
            raise violation(self.link.name, "it asks for replies that it does not read")
        self.link.queue(frame)
