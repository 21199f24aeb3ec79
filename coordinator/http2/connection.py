"""One client's connection: the sockets' bytes into streams, and the streams' answers into bytes.

All of HTTP/2's state, and every decision about it, is in ``httpunk``'s ``H2Streams`` (the state of hyper's h2 crate,
without any I/O). Its own asyncio driver wakes five tasks for a request; this one none, as nothing here has to wait.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from httpunk import _httpunk as h2

from coordinator.http2.peers import OneByOne, keep_alive, peer_of
from coordinator.http2.stream import Gone, Stream

PREFACE = 20.0  # seconds that a new connection has to say that it speaks HTTP/2
PATIENCE = 0.5  # seconds that a client has to say that it has heard of the end
IDLE_PATIENCE = 0.05  # seconds that one without calls has; what it sends meanwhile is told not to have been looked at
MAX_HEADER_LIST = 16 << 10  # bytes as HTTP/2 counts them, 32 more for each field
# What the state reads of a head: past that it leaves fields out without a word, and past four times that it ends the
# connection with all its calls. So that a call with somewhat too much is told so, it is more than a call may have.
_READ_HEADER_LIST = 16 * MAX_HEADER_LIST
_TURN = 500  # frames that are acted upon before others have their turn
_OWED = 1000  # control frames that a client may send while it reads no answers
_NO_ERROR, _PROTOCOL_ERROR, _CALM = 0, 1, 11  # RFC 9113, section 7
_OPTIONS: dict[str, Any] = {
    "initial_window_size": 8 << 20,
    "connection_window": 32 << 20,
    "max_frame_size": 1 << 20,
    "max_header_list_size": _READ_HEADER_LIST,
    "max_send_buf_size": 4 << 20,
    "max_concurrent_streams": 10_000,  # past that a client's own library queues
    "auto_date_header": False,
}


class Connection(asyncio.Protocol):
    """Calls ``serve`` with every new stream; its tasks are the connection's ``calls``."""

    def __init__(self, serve: Callable[[Stream], Any], closed: Callable[[Connection], None]) -> None:
        self.state: Any = h2.H2Streams("server", **_OPTIONS)
        self.peer = ""
        self.calls: set[asyncio.Task[None]] = set()
        self._serve = serve
        self._closed = closed
        self._loop = asyncio.get_running_loop()
        self._transport: Any = None
        self._expiry: asyncio.TimerHandle | None = None
        self._spare = Stream(self)  # the next stream to be opened
        self._one_by_one = OneByOne()
        self._acknowledged = False
        self._heard = False
        self._paused = False
        self._owed = 0
        self._ending = False
        self._dispatch: dict[type, Callable[[Any], None]] = {
            h2.H2FrameHeaders: self._headers,
            h2.H2FrameData: self._data,
            h2.H2FrameWindowUpdate: self._window_update,
            h2.H2FrameSettings: self._settings,
            h2.H2FramePing: self._ping,
            h2.H2FrameRstStream: self._reset,
            h2.H2FrameGoAway: self._go_away,
            h2.H2FrameStreamError: self._stream_error,
        }

    # ---- asyncio.Protocol

    def connection_made(self, transport: Any) -> None:
        self._transport = transport
        self.peer = peer_of(transport)
        keep_alive(transport)
        self.state.begin()
        self.flush()
        self._expiry = self._loop.call_later(PREFACE, self._expire)

    def data_received(self, data: bytes) -> None:
        self._heard = True
        count = 0
        try:
            # At first one frame at a time, because after the client's acknowledgement of our settings, in the same
            # bytes, its frames may be larger than before.
            for frame in self.state.receive(data) if self._acknowledged else self._one_at_a_time(data):
                count += 1
                act = self._dispatch.get(type(frame))  # None: priorities, which nobody heeds any more
                if act is None:
                    continue
                try:
                    act(frame)
                except h2.H2StreamError as error:
                    self._refuse(error)
            if flags := self.state.maybe_goaway_reply():
                self._after(flags)
            self.flush()
            if count > _TURN:  # else a transport may read on for as long as there is something, past all other work
                self._transport.pause_reading()
                self._loop.call_soon(self._read_on)
        except h2.H2Error as error:
            reason = error.args[0] if error.args and isinstance(error.args[0], int) else _PROTOCOL_ERROR
            self._abandon(reason)

    def _read_on(self) -> None:
        if not self._transport.is_closing():
            self._transport.resume_reading()

    def connection_lost(self, _error: Exception | None) -> None:
        self._paused = True  # nothing is written any more
        if self._expiry is not None:
            self._expiry.cancel()
        self._fail()
        self._closed(self)

    def pause_writing(self) -> None:
        self._paused = True

    def resume_writing(self) -> None:
        self._paused = False
        self._owed = 0
        self.flush()

    # ---- frames

    def _one_at_a_time(self, data: bytes) -> Iterator[Any]:
        while data and not self._acknowledged:
            piece, data = self._one_by_one.cut(data)
            yield from self.state.receive(piece)
        if data:
            yield from self.state.receive(data)

    def _headers(self, frame: Any) -> None:
        verdict = self.state.recv_headers(frame, self._spare)
        if verdict.kind == h2.H2_HEADERS_OPENED:
            stream, self._spare = self._spare, Stream(self)
            stream.id, stream.head = verdict.stream_id, frame
            self.state.accepted(stream.id)
            if verdict.eof:
                stream.arrived(None, False, True)
            task = stream.task = self._loop.create_task(self._serve(stream))
            self.calls.add(task)
            task.add_done_callback(self._served)
        elif verdict.kind == h2.H2_HEADERS_TRAILERS:
            verdict.handle.arrived(None, False, True)
        if verdict.flags:
            self._after(verdict.flags)

    def _data(self, frame: Any) -> None:
        verdict = self.state.recv_data(frame)
        if verdict.handle is not None:
            verdict.handle.arrived(verdict.payload, verdict.budgeted, verdict.eof)
        if verdict.flags:
            self._after(verdict.flags)

    def _window_update(self, frame: Any) -> None:
        if woken := self.state.recv_window_update(frame):
            _writable(woken)

    def _settings(self, frame: Any) -> None:
        self._count()
        self._acknowledged = self._acknowledged or frame.ack
        _, woken, flags = self.state.recv_settings(frame)
        _writable(woken)
        self._after(flags)

    def _ping(self, frame: Any) -> None:
        self._count()
        self._after(self.state.recv_ping(frame))

    def _reset(self, frame: Any) -> None:
        found = self.state.recv_reset(frame)
        if found is not None:
            stream, _, _, flags = found
            stream.stop()
            self._after(flags)

    def _go_away(self, frame: Any) -> None:
        aborted, flags = self.state.recv_go_away(frame)
        for stream, _ in aborted:
            stream.stop()
        self._after(flags)

    def _stream_error(self, frame: Any) -> None:
        raise h2.H2StreamError(frame.stream_id, frame.error_code, "library")

    def _refuse(self, error: Any) -> None:
        """Resets the one stream on which the client broke a rule."""
        self._spare = Stream(self)  # the frame may have consumed it
        number, reason, initiator = error.args
        if initiator != "remote":
            verdict = self.state.reset_on_error(number, reason)
            if verdict.handle is not None:
                verdict.handle.stop()
            self._after(verdict.flags)

    def _count(self) -> None:
        if self._paused:
            self._owed += 1
            if self._owed > _OWED:
                raise h2.H2ProtocolError(_CALM)

    # ---- what the state asks for

    def _after(self, flags: int) -> None:
        if flags & h2.H2_FLAG_CAPACITY:
            stream = self.state.next_capacity_wake()
            if stream is not None:
                stream.writable()
        if flags & (h2.H2_FLAG_CONN_DONE | h2.H2_FLAG_STOP_ACCEPTING):
            self._loop.call_soon(self._end)

    def acted(self, verdict: Any) -> Any:
        """Checks and passes on what the state made of something sent. Raises Gone."""
        if verdict.stopped is not None:
            raise Gone
        if verdict.flags & ~h2.H2_FLAG_WAKE:  # whoever sends flushes
            self._after(verdict.flags)
        if verdict.handle is not None:  # the answer is complete, and the rest of the request was refused
            verdict.handle.arrived(None, False, True)
        return verdict

    def sent(self, stream: int, data: bytes, offset: int) -> tuple[int, bool]:
        """Sends of ``data[offset:]`` what there is room for: where it stopped, and whether that is the end."""
        send = self.state.send_data
        while True:
            verdict = self.acted(send(stream, data, offset, False))
            offset += verdict.sent
            if verdict.done or not verdict.sent:
                return offset, verdict.done

    def consumed(self, stream: int, size: int, budgeted: bool) -> None:
        """Makes room for as much as the servicer has taken."""
        if budgeted:
            self.state.release_data_frame(stream, size)
        if flags := self.state.release_capacity(stream, size):
            self._after(flags)

    def flush(self) -> None:
        """Writes what is pending, unless the client does not read."""
        while not self._paused and self.state.has_pending():
            batch, _ = self.state.take_pending()
            self._transport.write(memoryview(batch))  # a view of its own, as the transport may keep what it is given
            batch.release()
            if woken := self.state.credit_written():
                _writable(woken)

    # ---- the end

    def shut(self) -> None:
        """Asks the client for no more calls; closes when those at work are done."""
        self._after(self.state.begin_graceful_shutdown())
        self.flush()
        if self._expiry is not None:
            self._expiry.cancel()
        patience = PATIENCE if self.calls else IDLE_PATIENCE
        self._expiry = self._loop.call_later(patience, self._end)  # a client that hangs need not answer

    def cut(self) -> None:
        """Ends whatever still runs."""
        for task in self.calls:
            task.cancel()
        self._paused = True
        self._transport.abort()

    def _served(self, task: asyncio.Task[None]) -> None:
        self.calls.discard(task)
        if self._ending:
            self._close_if_done()

    def _end(self) -> None:
        self._ending = True
        if self.state.graceful and not self.state.shutdown_final:
            self.state.send_goaway(
                _NO_ERROR
            )  # whatever else was sent has not been looked at, and can be sent elsewhere
        self._close_if_done()

    def _close_if_done(self) -> None:
        if not self.calls:
            self.flush()
            self._transport.close()

    def _expire(self) -> None:
        if not self._heard:
            self._transport.abort()

    def _abandon(self, reason: int) -> None:
        """The client broke a rule of the connection, of which it is told."""
        self.state.send_goaway(reason)
        self._paused = False
        self.flush()
        self._fail()
        self._transport.close()

    def _fail(self) -> None:
        for stream, _ in self.state.fail(None):
            stream.stop()


def _writable(streams: Iterable[Any]) -> None:
    for stream in streams:
        if stream.writer is not None:
            stream.writable()
