"""What the server of a connection sends, and what follows from it for the one call that may run on it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from httpunk import _httpunk as h2

from coordinator.client.transport.answer import Answer
from coordinator.client.transport.deadline import Deadline
from coordinator.client.transport.failures import Unprocessed, of_reset, violation
from coordinator.client.transport.framing import MAX_HEADER_LIST, Data, Framing, headers_too_large
from coordinator.client.transport.link import Link

MAX_WINDOW = (1 << 31) - 1
DEFAULT_WINDOW = 65_535
_DEFAULT_FRAME = 16_384
_CREDIT = 1 << 28  # bytes read after which the server is allowed as many more
_DIRECT = 16 << 10  # bytes; a longer rest of a message is read straight into place
_MOST_OWED = 64 << 10  # bytes of replies that a server may cause without reading them


class Incoming:
    """The public attributes are what the server allows, and how far it is; ``step`` reads on."""

    def __init__(self, link: Link) -> None:
        self.framing = Framing(link)
        self.answer = Answer()  # of the latest call
        self.stream = -1  # of the latest call
        self.greeted = False
        self.leaving = ""  # why the server takes no more calls
        self.window = self.stream_window = DEFAULT_WINDOW  # bytes that may be sent
        self.frame = _DEFAULT_FRAME  # bytes that may be sent in one
        self.streams = 1  # that the server takes at a time; more than one is all the same
        self._initial_window = DEFAULT_WINDOW
        self._link = link
        self._codec = self.framing.codec
        self._read = self._stream_read = 0  # bytes that the server has sent of what it may
        self._owed = 0  # bytes of replies that the server has not taken
        self._dispatch: dict[type, Callable[[Any], None]] = {
            h2.H2FrameHeaders: self._headers,
            h2.H2FrameSettings: self._settings,
            h2.H2FrameWindowUpdate: self._window_update,
            h2.H2FramePing: self._ping,
            h2.H2FrameRstStream: self._reset,
            h2.H2FrameGoAway: self._go_away,
            h2.H2FrameStreamError: self._stream_error,
        }

    def begin(self) -> int:
        """The next call's stream."""
        self.stream += 2
        self.stream_window, self._stream_read = self._initial_window, 0
        return self.stream

    def step(self, deadline: Deadline) -> None:
        """Reads one frame and acts on it. Raises CallFailed."""
        found = self.framing.next(deadline)
        if isinstance(found, Data):
            self._data(found, deadline)
        else:
            for frame in found:
                if (act := self._dispatch.get(type(frame))) is not None:  # else priorities, which nobody heeds
                    act(frame)

    def _data(self, frame: Data, deadline: Deadline) -> None:
        answer = self._wanted(frame.stream)
        if answer is not None and not answer.begun:
            raise violation(self._link.name, "data came before the answer's head")
        self._take(frame.size, answer, deadline)
        self._take(frame.padding, None, deadline)
        self._read += frame.counted
        self._stream_read += frame.counted
        if answer is not None and frame.last:
            answer.fields(None, [], True)
        if self._read >= _CREDIT:
            self._reply(self._codec.serialize_window_update(0, self._read))
            self._read = 0
        if self._stream_read >= _CREDIT and not self.answer.ended:
            self._reply(self._codec.serialize_window_update(self.stream, self._stream_read))
            self._stream_read = 0

    def _take(self, left: int, answer: Answer | None, deadline: Deadline) -> None:
        """Reads ``left`` bytes to where they belong; None: nowhere."""
        link = self._link
        while left:
            if answer is not None and not link.held and len(room := answer.room()[:left]) > _DIRECT:
                got = link.receive_into(room, deadline)
                answer.filled(got)
            else:
                link.need(1, deadline)
                piece = link.take(left)
                if answer is not None:
                    answer.feed(piece)
                got = len(piece)
            left -= got

    def _wanted(self, stream: int) -> Answer | None:
        """Where a frame of ``stream`` belongs; None: to a call that is over."""
        if not stream & 1 or stream > self.stream:
            raise violation(self._link.name, f"a frame came for stream {stream}, which was never opened")
        return self.answer if stream == self.stream and not self.answer.ended else None

    def _headers(self, frame: Any) -> None:
        answer = self._wanted(frame.stream_id)
        if answer is None or (frame.is_informational and not answer.begun and not frame.end_stream):
            return
        fields = frame.headers.raw_items()
        if sum(len(name) + len(value) + 32 for name, value in fields) > MAX_HEADER_LIST:
            raise headers_too_large(self._link.name)
        if answer.begun and not frame.end_stream:
            raise violation(self._link.name, "the answer has a second head")
        answer.fields(frame.status, fields, frame.end_stream)

    def _settings(self, frame: Any) -> None:
        if frame.ack:
            return
        self.greeted = True
        if frame.header_table_size is not None:
            self._codec.set_send_header_table_size(frame.header_table_size)
        if frame.max_frame_size is not None:
            self.frame = frame.max_frame_size
            self._codec.set_send_max_frame_size(frame.max_frame_size)
        if frame.max_concurrent_streams is not None:
            self.streams = frame.max_concurrent_streams
        if frame.initial_window_size is not None:
            self.stream_window += frame.initial_window_size - self._initial_window
            self._initial_window = frame.initial_window_size
        self._reply(self._codec.serialize_settings_ack())

    def _window_update(self, frame: Any) -> None:
        if frame.stream_id == 0:
            self.window += frame.increment
        elif self._wanted(frame.stream_id) is not None:
            self.stream_window += frame.increment
        if max(self.window, self.stream_window) > MAX_WINDOW:
            raise violation(self._link.name, "it allows more data than there is a number for")

    def _ping(self, frame: Any) -> None:
        if not frame.ack:
            self._reply(self._codec.serialize_ping_ack(frame.data))

    def _reset(self, frame: Any) -> None:
        if self._wanted(frame.stream_id) is not None:
            raise of_reset(self._link.name, frame.error_code)

    def _stream_error(self, frame: Any) -> None:
        if self._wanted(frame.stream_id) is not None:
            raise violation(self._link.name, f"error {frame.error_code} in a frame of the answer")

    def _go_away(self, frame: Any) -> None:
        said = f": {frame.debug_data[:200].decode(errors='replace')}" if frame.debug_data else ""
        self.leaving = f"{self._link.name} takes no more calls (GOAWAY {frame.error_code}{said})"
        if not self.answer.ended and self.stream > frame.last_stream_id:
            raise Unprocessed(self.leaving)

    def _reply(self, frame: bytes) -> None:
        self._owed = len(frame) + (self._owed if self._link.unsent else 0)
        if self._owed > _MOST_OWED:
            raise violation(self._link.name, "it asks for replies that it does not read")
        self._link.queue(frame)
