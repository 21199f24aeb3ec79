"""Calls end, whatever the servicer does; and connections leave nothing behind."""

from __future__ import annotations

import asyncio
import gc
import random
import socket
import sys
import threading
import weakref
from collections.abc import AsyncIterator, Iterator
from typing import Any

import grpc
import pytest
from httpunk import _httpunk as h2

from coordinator import server
from coordinator.http2 import server as http2
from coordinator.http2.call import Requests
from coordinator.http2.connection import Connection
from coordinator.http2.fields import metadata_of
from coordinator.http2.messages import IDENTITY, Messages, prefix
from tests.unit.test_http2 import Running, channel, client, running
from tests.unit.test_http2_hostile import CALL, PING, PREFACE, SETTINGS, Raw, frame

__all__ = ["client", "running"]  # the fixtures

DEADLINE = 20.0  # seconds; a call that does not end takes all of them


class Odd:
    """A servicer that does what none should."""

    def __init__(self) -> None:
        self.told: list[grpc.StatusCode] = []
        self.told_all = threading.Event()

    async def cancels(self, _data: bytes, _context: Any) -> bytes:
        raise asyncio.CancelledError

    async def trails(self, data: bytes, context: Any) -> bytes:
        context.set_trailing_metadata((("k", "a\nb"),))
        return data

    async def leads(self, data: bytes, context: Any) -> bytes:
        await context.send_initial_metadata((("k", "a\nb"),))
        return data

    async def calls_back(self, data: bytes, context: Any) -> bytes:
        def fail(_context: Any) -> None:
            raise RuntimeError("of a callback")

        def tell(ended: Any) -> None:
            self.told.append(ended.code())
            self.told_all.set()

        context.add_done_callback(fail)
        context.add_done_callback(tell)
        return data

    async def patient(self, _requests: Any, context: Any) -> AsyncIterator[bytes]:
        """Gives up a read, says so, and reads again."""
        first = asyncio.ensure_future(context.read())
        await asyncio.sleep(0)
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        yield b"gave up"
        yield await context.read()

    def handler(self) -> grpc.GenericRpcHandler:
        unary = (self.cancels, self.trails, self.leads, self.calls_back)
        methods: dict[str, Any] = {one.__name__: grpc.unary_unary_rpc_method_handler(one) for one in unary}
        methods["patient"] = grpc.stream_stream_rpc_method_handler(self.patient)
        return grpc.method_handlers_generic_handler("odd", methods)


@pytest.fixture
def odd(running: Running) -> Odd:
    made = Odd()
    running.server.add_generic_rpc_handlers((made.handler(),))
    return made


@pytest.mark.parametrize(
    ("method", "code"),
    [
        ("cancels", grpc.StatusCode.CANCELLED),
        ("trails", grpc.StatusCode.INTERNAL),
        ("leads", grpc.StatusCode.INTERNAL),
    ],
)
def test_the_client_is_told(odd: Odd, client: grpc.Channel, method: str, code: grpc.StatusCode) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        client.unary_unary(f"/odd/{method}")(b"x", timeout=DEADLINE)
    assert caught.value.code() is code
    assert client.unary_unary("/t/echo")(b"x", timeout=DEADLINE) == b"x"


def test_a_callback_that_fails_keeps_nothing_from_the_others(odd: Odd, client: grpc.Channel) -> None:
    assert client.unary_unary("/odd/calls_back")(b"x", timeout=DEADLINE) == b"x"
    assert odd.told_all.wait(DEADLINE)
    assert odd.told == [grpc.StatusCode.OK]


def test_a_read_that_was_cancelled_loses_nothing(odd: Odd, client: grpc.Channel) -> None:
    go_on = threading.Event()

    def requests() -> Iterator[bytes]:
        assert go_on.wait(DEADLINE)
        yield b"late"

    answers = client.stream_stream("/odd/patient")(requests(), timeout=DEADLINE)
    assert next(answers) == b"gave up"
    go_on.set()
    assert list(answers) == [b"late"]


@pytest.mark.parametrize(
    "metadata",
    [[("k", "v" * 17_000)], [("k", "v" * 200_000)], [(f"k{number}", "v") for number in range(1000)]],
    ids=["one", "one-large", "many"],
)
def test_too_much_metadata_is_refused_and_the_connection_stays(
    client: grpc.Channel, metadata: list[tuple[str, str]]
) -> None:
    beside = client.unary_unary("/t/pause").future(b"beside", timeout=DEADLINE)
    with pytest.raises(grpc.RpcError) as caught:
        client.unary_unary("/t/echo")(b"x", timeout=DEADLINE, metadata=metadata)
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert beside.result(DEADLINE) == b"beside"


def test_refused_uploads_give_their_room_back(running: Running, client: grpc.Channel) -> None:
    for _ in range(12):  # each has more than the connection's window
        with pytest.raises(grpc.RpcError, match="larger than max"):
            client.unary_unary("/t/echo")(bytes(33 << 20), timeout=DEADLINE)
    assert client.unary_unary("/t/echo")(b"x", timeout=DEADLINE) == b"x"

    async def states() -> list[tuple[int, int]]:
        return [(one.state.num_streams, one.state.conn_recv_available) for one in running.server._connections]

    assert running.run(states()) == [(0, 32 << 20)]


def test_a_closed_connection_is_forgotten_at_once(running: Running) -> None:
    with channel(running.target) as opened:
        assert opened.unary_unary("/t/echo")(b"x", timeout=DEADLINE) == b"x"
        left = [weakref.ref(one) for one in running.server._connections]
        assert left

    async def closed() -> None:
        await asyncio.wait_for(running.server._all_closed.wait(), DEADLINE)
        gc.collect()

    running.run(closed())
    assert [one() for one in left] == [None]


def test_a_silent_client_does_not_hold_up_the_end(running: Running) -> None:
    with Raw(running) as raw:
        raw.call(*CALL)
        assert raw.answer()["grpc-status"] == "0"
        running.run(running.server.stop(60))  # twice as long as ``run`` waits
        said = [one.last_stream_id for one in raw.frames() if isinstance(one, h2.H2FrameGoAway)]
    assert said == [2**31 - 1, 1]  # it leaves, and then: what came after the first call was not looked at


def test_what_a_transport_keeps_stays_readable() -> None:
    """asyncio's own, from Python 3.12, keeps the very object that it is given."""
    kept: list[Any] = []

    class Keeping(asyncio.Transport):
        def write(self, data: Any) -> None:
            kept.append(data)

    async def connect() -> None:
        connection = Connection(lambda _stream: None, lambda _connection: None)
        connection.connection_made(Keeping())
        connection.connection_lost(None)

    asyncio.run(connect())
    assert b"".join(kept)[3:5] == b"\x04\x00"  # settings


def test_a_client_with_many_frames_lets_others_have_their_turn() -> None:
    asked: list[str] = []

    class Told(asyncio.Transport):
        def write(self, data: Any) -> None:
            pass

        def is_closing(self) -> bool:
            return False

        def pause_reading(self) -> None:
            asked.append("pause")

        def resume_reading(self) -> None:
            asked.append("resume")

    async def receive(pings: int) -> list[str]:
        connection = Connection(lambda _stream: None, lambda _connection: None)
        connection.connection_made(Told())
        connection.data_received(PREFACE + frame(SETTINGS, 0, 0) + frame(PING, 0, 0, bytes(8)) * pings)
        asked.append("others")
        await asyncio.sleep(0)
        connection.connection_lost(None)
        return asked

    assert asyncio.run(receive(3)) == ["others"]
    asked.clear()
    assert asyncio.run(receive(2000)) == ["pause", "others", "resume"]


def test_a_call_with_many_messages_lets_others_have_their_turn() -> None:
    async def read() -> tuple[int, int]:
        chunks = iter([prefix(0) * 1000, None])

        async def chunk() -> bytes | None:
            return next(chunks)

        seen = 0
        others: list[int] = []
        asyncio.get_running_loop().call_soon(lambda: others.append(seen))
        async for _ in Requests(Messages(chunk, IDENTITY, 100), bytes):
            seen += 1
        return seen, others[0]

    seen, others = asyncio.run(read())
    assert seen == 1000
    assert others < 200


def test_messages_however_they_are_cut() -> None:
    dice = random.Random(7)
    sent = [dice.randbytes(dice.choice((0, 0, 1, 5, 40))) for _ in range(60)]
    body = b"".join(prefix(len(one)) + one for one in sent)
    for most in (1, 2, 7, 50, len(body)):
        pieces = []
        left = body
        while left:
            size = dice.randint(0, most)
            pieces.append(left[:size])
            left = left[size:]
        chunks = iter([*pieces, None])

        async def chunk(chunks: Iterator[bytes | None] = chunks) -> bytes | None:
            return next(chunks)

        async def read(chunk: Any = chunk) -> list[bytes]:
            return [one async for one in Messages(chunk, IDENTITY, 100)]

        assert asyncio.run(read()) == sent


def test_binary_metadata_joined_on_the_way() -> None:
    assert metadata_of([(b"k-bin", b"AP8, AQ==,Ag")]) == (("k-bin", b"\0\xff"), ("k-bin", b"\1"), ("k-bin", b"\2"))


def _names(monkeypatch: pytest.MonkeyPatch, *targets: tuple[Any, ...]) -> None:
    found = [(socket.AF_INET6 if len(target) == 4 else socket.AF_INET, 1, 6, "", target) for target in targets]
    monkeypatch.setattr(http2.socket, "getaddrinfo", lambda *_args, **_kwargs: found)


NOT_HERE = ("2001:db8::1", 0, 0, 0)  # an address for documentation


def test_addresses_of_a_name_that_this_host_has(monkeypatch: pytest.MonkeyPatch) -> None:
    _names(monkeypatch, NOT_HERE, ("127.0.0.1", 0))
    bound = http2._bound("name:0")
    assert [one.getsockname()[0] for one in bound] == ["127.0.0.1"]
    bound[0].close()


def test_a_name_without_any_address_of_this_host(monkeypatch: pytest.MonkeyPatch) -> None:
    _names(monkeypatch, NOT_HERE)
    with pytest.raises(OSError, match=r"."):
        http2._bound("name:0")


def test_without_httpunk_grpc_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith(("coordinator.http2", "httpunk"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "httpunk", None)

    async def serve() -> bytes:
        made = server._server(1 << 20, [], secure=False)
        assert isinstance(made, grpc.aio.Server)
        port = made.add_insecure_port("127.0.0.1:0")
        echo = grpc.unary_unary_rpc_method_handler(_echo)
        made.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("t", {"echo": echo}),))
        await made.start()
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as opened:
            answer: bytes = await opened.unary_unary("/t/echo")(b"x", timeout=DEADLINE)
        await made.stop(None)
        return answer

    assert asyncio.run(serve()) == b"x"


async def _echo(data: bytes, _context: Any) -> bytes:
    return data
