"""The coordinator's own gRPC server, asked by gRPC's own client over real sockets."""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import threading
import time
from collections.abc import AsyncIterator, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest

from coordinator.http2.server import Server

LIMIT = 32 << 20


class Served:
    """The servicer under test, and what it saw."""

    def __init__(self) -> None:
        self.cancelled = threading.Event()
        self.ended: list[grpc.StatusCode] = []
        self.sent = 0
        self.read = 0
        self.go_on = threading.Event()

    async def echo(self, data: bytes, context: Any) -> bytes:
        context.set_trailing_metadata((("who", "echo"), ("raw-bin", b"\x00\xff")))
        return data

    async def about(self, _data: bytes, context: Any) -> bytes:
        await context.send_initial_metadata((("early", "yes"),))
        asked = [f"{key}={value!r}" for key, value in context.invocation_metadata() if key.startswith("k")]
        left = context.time_remaining()  # of 5 seconds; gRPC's client says 5010 ms as often as 5 s
        return f"{context.peer().split(':')[0]} {asked} {left is None or 0 < left <= 5.01}".encode()

    async def refuse(self, _data: bytes, context: Any) -> bytes:
        await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "grün 100%\n", (("why-bin", b"\x01"),))

    async def fail(self, _data: bytes, _context: Any) -> bytes:
        raise RuntimeError("secret")

    async def wait(self, _data: bytes, context: Any) -> bytes:
        context.add_done_callback(lambda ended: self.ended.append(ended.code()))
        try:
            await asyncio.sleep(30)
        except asyncio.CancelledError:
            self.cancelled.set()
            raise
        return b""

    async def pause(self, data: bytes, _context: Any) -> bytes:
        await asyncio.sleep(0.3)
        return data

    async def nothing(self, _data: bytes, _context: Any) -> Any:
        return None

    async def pieces(self, data: bytes, _context: Any) -> list[bytes | memoryview]:
        view = memoryview(data)
        return [b"", bytes(view[:7]), view[7:1000], view[1000:]]

    async def count(self, data: bytes, context: Any) -> AsyncIterator[bytes]:
        for number in range(int(data)):
            self.sent += 1
            yield bytes(1 << 20) if int(data) > 100 else str(number).encode()
        if int(data) == 3:
            await context.abort(grpc.StatusCode.DATA_LOSS, "after three")

    async def total(self, requests: AsyncIterator[bytes], _context: Any) -> bytes:
        return str(sum([len(data) async for data in requests])).encode()

    async def double(self, requests: AsyncIterator[bytes], _context: Any) -> AsyncIterator[bytes]:
        async for data in requests:
            yield data + data

    async def reluctant(self, requests: AsyncIterator[bytes], _context: Any) -> bytes:
        await asyncio.to_thread(self.go_on.wait)
        async for _ in requests:
            self.read += 1
        return str(self.read).encode()

    def handler(self) -> grpc.GenericRpcHandler:
        unary = (self.echo, self.about, self.refuse, self.fail, self.wait, self.pause, self.nothing, self.pieces)
        methods: dict[str, Any] = {one.__name__: grpc.unary_unary_rpc_method_handler(one) for one in unary}
        methods["count"] = grpc.unary_stream_rpc_method_handler(self.count)
        methods["total"] = grpc.stream_unary_rpc_method_handler(self.total)
        methods["reluctant"] = grpc.stream_unary_rpc_method_handler(self.reluctant)
        methods["double"] = grpc.stream_stream_rpc_method_handler(self.double)
        return grpc.method_handlers_generic_handler("t", methods)


class Running:
    """A server in a thread of its own."""

    def __init__(self, *addresses: str) -> None:
        self.served = Served()
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever)
        self.thread.start()
        self.ports: list[int] = []
        self.server = self.run(self._start(addresses or ("127.0.0.1:0",)))

    async def _start(self, addresses: tuple[str, ...]) -> Server:
        server = Server((), LIMIT)
        server.add_generic_rpc_handlers((self.served.handler(),))
        self.ports = [server.add_insecure_port(address) for address in addresses]
        await server.start()
        return server

    @property
    def target(self) -> str:
        return f"127.0.0.1:{self.ports[0]}"

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(30)

    def close(self) -> None:
        self.run(self.server.stop(0.5))
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(10)
        self.loop.close()


@pytest.fixture
def running() -> Iterator[Running]:
    made = Running()
    yield made
    made.close()


@contextlib.contextmanager
def channel(target: str) -> Iterator[grpc.Channel]:
    options = (("grpc.max_receive_message_length", -1), ("grpc.use_local_subchannel_pool", 1))
    with grpc.insecure_channel(target, options=options) as made:
        yield made


@pytest.fixture
def client(running: Running) -> Iterator[grpc.Channel]:
    with channel(running.target) as made:
        yield made


def failure(call: Any, *args: Any, **kwargs: Any) -> grpc.RpcError:
    with pytest.raises(grpc.RpcError) as raised:
        call(*args, **kwargs)
    return raised.value


# ---- the four kinds of call


def test_unary_with_trailing_metadata(client: grpc.Channel) -> None:
    answer, call = client.unary_unary("/t/echo").with_call(b"hello")
    assert answer == b"hello"
    assert dict(call.trailing_metadata()) == {"who": "echo", "raw-bin": b"\x00\xff"}


def test_the_servicer_sees_metadata_peer_and_deadline(client: grpc.Channel) -> None:
    metadata = (("k1", "v"), ("k2-bin", b"\xfe\x00"), ("k1", "again"))
    answer, call = client.unary_unary("/t/about").with_call(b"", metadata=metadata, timeout=5)
    assert answer == b"ipv4 [\"k1='v'\", \"k1='again'\", \"k2-bin=b'\\\\xfe\\\\x00'\"] True"
    assert ("early", "yes") in tuple(call.initial_metadata())


def test_a_stream_of_answers(client: grpc.Channel) -> None:
    assert list(client.unary_stream("/t/count")(b"5")) == [b"0", b"1", b"2", b"3", b"4"]


def test_a_stream_of_requests(client: grpc.Channel) -> None:
    assert client.stream_unary("/t/total")(iter([b"a", b"", b"bcd" * 100_000])) == b"300001"


def test_streams_both_ways_take_turns(client: grpc.Channel) -> None:
    given = threading.Semaphore(1)

    def requests() -> Iterator[bytes]:
        for number in range(4):
            given.acquire()
            yield b"%d" % number

    got = []
    for answer in client.stream_stream("/t/double")(requests()):
        got.append(answer)
        given.release()
    assert got == [b"00", b"11", b"22", b"33"]


# ---- failures


def test_a_status_with_any_text_and_details(client: grpc.Channel) -> None:
    error = failure(client.unary_unary("/t/refuse"), b"")
    assert (error.code(), error.details()) == (grpc.StatusCode.FAILED_PRECONDITION, "grün 100%\n")
    assert dict(error.trailing_metadata()) == {"why-bin": b"\x01"}


def test_a_status_behind_messages(client: grpc.Channel) -> None:
    got: list[bytes] = []
    error = failure(lambda: got.extend(iter(client.unary_stream("/t/count")(b"3"))))
    assert (len(got), error.code(), error.details()) == (3, grpc.StatusCode.DATA_LOSS, "after three")


def test_a_bug_of_the_servicer_is_internal_and_not_shown(client: grpc.Channel) -> None:
    error = failure(client.unary_unary("/t/fail"), b"")
    assert error.code() is grpc.StatusCode.INTERNAL
    assert "secret" not in error.details()


def test_an_answer_that_is_no_message_is_internal(client: grpc.Channel) -> None:
    assert failure(client.unary_unary("/t/nothing"), b"").code() is grpc.StatusCode.INTERNAL


@pytest.mark.parametrize("size", [0, 5, 1001, 1 << 20, (9 << 20) + 13])
def test_an_answer_in_pieces_is_one_message(client: grpc.Channel, size: int) -> None:
    data = random.Random(size).randbytes(size)
    assert client.unary_unary("/t/pieces")(data) == data


@pytest.mark.parametrize("path", ["/t/none", "/none/echo", "/"])
def test_an_unknown_method_is_named(client: grpc.Channel, path: str) -> None:
    error = failure(client.unary_unary(path), b"")
    assert error.code() is grpc.StatusCode.UNIMPLEMENTED
    assert path in error.details()


def test_a_message_over_the_limit_is_refused_and_the_connection_stays(client: grpc.Channel) -> None:
    error = failure(client.unary_unary("/t/echo"), bytes(LIMIT + 1))
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert str(LIMIT) in error.details()
    assert client.unary_unary("/t/echo")(bytes(LIMIT)) == bytes(LIMIT)


# ---- compression


@pytest.mark.parametrize("how", [grpc.Compression.Gzip, grpc.Compression.Deflate])
def test_compressed_requests(client: grpc.Channel, how: grpc.Compression) -> None:
    data = b"abc" * 100_000
    assert client.unary_unary("/t/echo")(data, compression=how) == data


def test_a_compressed_message_that_unpacks_to_more_than_the_limit(client: grpc.Channel) -> None:
    error = failure(client.unary_unary("/t/echo"), bytes(LIMIT + 1), compression=grpc.Compression.Gzip)
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


# ---- deadlines, cancellation, lost clients


def test_the_servicer_is_cancelled_at_the_deadline(running: Running, client: grpc.Channel) -> None:
    error = failure(client.unary_unary("/t/wait"), b"", timeout=0.2)
    assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert running.served.cancelled.wait(10)


def test_the_servicer_is_cancelled_with_the_call(running: Running, client: grpc.Channel) -> None:
    call = client.unary_unary("/t/wait").future(b"")
    time.sleep(0.2)
    call.cancel()
    assert running.served.cancelled.wait(10)
    assert client.unary_unary("/t/echo")(b"still there") == b"still there"
    assert running.served.ended == [grpc.StatusCode.CANCELLED]


def test_the_servicer_is_cancelled_when_the_connection_is_lost(running: Running) -> None:
    with channel(running.target) as lost:
        call = lost.unary_unary("/t/wait").future(b"")
        time.sleep(0.2)
    assert running.served.cancelled.wait(10)
    assert call.done()


# ---- sizes and numbers


@pytest.mark.parametrize("size", [0, 1, 16_379, 16_380, 65_536, 1 << 20, (1 << 20) + 1, LIMIT])
def test_messages_of_any_size_as_a_connections_first(running: Running, size: int) -> None:
    data = bytes(range(256)) * (size // 256) + bytes(size % 256)
    with channel(running.target) as fresh:
        assert fresh.unary_unary("/t/echo")(data) == data


def test_many_calls_at_once_on_one_connection(client: grpc.Channel) -> None:
    calls = [client.unary_unary("/t/pause").future(b"%d" % number) for number in range(1000)]
    assert [call.result(30) for call in calls] == [b"%d" % number for number in range(1000)]


def test_many_connections_at_once(running: Running) -> None:
    def ask(number: int) -> bool:
        with channel(running.target) as one:
            return all(one.unary_unary("/t/echo")(b"%d" % number * size) for size in (1, 100_000))

    with ThreadPoolExecutor(16) as pool:
        assert all(pool.map(ask, range(64)))


def test_a_client_that_does_not_read_holds_the_servicer_back(running: Running, client: grpc.Channel) -> None:
    call = client.unary_stream("/t/count")(b"400")  # messages of a MiB
    assert len(next(iter(call))) == 1 << 20
    deadline = time.monotonic() + 10
    while (seen := running.served.sent) < 5 or _grows(running.served, seen):
        assert time.monotonic() < deadline
    assert running.served.sent < 200
    assert sum(1 for _ in call) == 399


def _grows(served: Served, seen: int) -> bool:
    time.sleep(0.3)
    return served.sent > seen


def test_a_servicer_that_does_not_read_holds_the_client_back(running: Running, client: grpc.Channel) -> None:
    given = 0

    def requests() -> Iterator[bytes]:
        nonlocal given
        for _ in range(300):
            given += 1
            yield bytes(1 << 20)

    call = client.stream_unary("/t/reluctant").future(requests())
    seen = -1
    while seen != given:
        seen = given
        time.sleep(0.5)
    assert 0 < given < 150
    running.served.go_on.set()
    assert call.result(60) == b"300"


# ---- the end


def test_calls_at_work_are_answered_before_the_server_stops(running: Running, client: grpc.Channel) -> None:
    call = client.unary_unary("/t/pause").future(b"last")
    time.sleep(0.1)
    began = time.monotonic()
    running.run(running.server.stop(20))
    assert call.result(10) == b"last"
    assert time.monotonic() - began < 15
    assert failure(client.unary_unary("/t/echo"), b"").code() is grpc.StatusCode.UNAVAILABLE


def test_calls_that_take_too_long_are_cut(running: Running, client: grpc.Channel) -> None:
    call = client.unary_unary("/t/wait").future(b"")
    time.sleep(0.2)
    running.run(running.server.stop(0.2))
    assert running.served.cancelled.wait(10)
    assert call.exception(10).code() is grpc.StatusCode.UNAVAILABLE


# ---- addresses


def test_addresses(tmp_path: Path) -> None:
    path = tmp_path / "s.sock"
    running = Running(f"unix:{path}", "localhost:0", "[::]:0")
    try:
        _, local, both = running.ports
        targets = [f"unix:{path}", f"127.0.0.1:{local}", f"127.0.0.1:{both}", f"[::1]:{both}"]
        for target in targets:
            with channel(target) as client:
                assert client.unary_unary("/t/echo")(b"x") == b"x"
    finally:
        running.close()
    assert not path.exists()


def test_a_path_that_is_in_use_stays_its_owners(tmp_path: Path) -> None:
    address = f"unix:{tmp_path / 's.sock'}"
    running = Running(address)
    try:
        with pytest.raises(OSError, match="in use"):
            Server((), LIMIT).add_insecure_port(address)
        with channel(address) as client:
            assert client.unary_unary("/t/echo")(b"x") == b"x"
    finally:
        running.close()


def test_a_path_left_behind_is_taken_over(tmp_path: Path) -> None:
    path = tmp_path / "s.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    running = Running(f"unix:{path}")
    running.close()


def test_a_port_in_use_is_refused(running: Running) -> None:
    with pytest.raises(OSError, match="in use"):
        Server((), LIMIT).add_insecure_port(running.target)
