"""The stream to one rank against a real server: what it answers, and every way in which it can end."""

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import grpc
import pytest

from coordinator.channels import EXECUTE, Dispatch, StreamChannel
from coordinator.commands import BatchInput, Execute, Executed, Failed, Probe
from coordinator.types import DataType, TensorValue
from protos.tensor_parallel.v1 import shard_pb2 as pb

GENERATION = 7
BIG = Execute(
    "m", "1", [BatchInput(TensorValue("x", DataType.UINT8, (8 << 20,), None), [bytes(8 << 20)])], [], ["id"], {}
)


class Listener:
    def __init__(self):
        self.heard = []
        self.something = asyncio.Event()

    def answered(self, rank, seq, answer):
        self.note("answered", rank, seq, answer)

    def broken(self, rank, reason):
        self.note("broken", rank, reason)

    def disconnected(self, rank, reason):
        self.note("disconnected", rank, reason)

    def note(self, *what):
        self.heard.append(what)
        self.something.set()

    async def next(self):
        async with asyncio.timeout(20):
            while not self.heard:
                self.something.clear()
                await self.something.wait()
        return self.heard.pop(0)


@contextmanager
def rank(behave):
    """A server whose Execute is ``behave(requests, context)``, in bytes; yields its address."""
    handler = grpc.stream_stream_rpc_method_handler(behave)
    _, service, method = EXECUTE.split("/")
    server = grpc.server(
        ThreadPoolExecutor(4), handlers=[grpc.method_handlers_generic_handler(service, {method: handler})]
    )
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(None).wait(10)


def converse(behave, talk):
    """``talk(channel, listener)`` with a StreamChannel to such a server."""

    async def run():
        with rank(behave) as address:
            async with grpc.aio.insecure_channel(address) as connection:
                listener = Listener()
                channel = StreamChannel(3, GENERATION, "me", connection, listener)
                try:
                    await talk(channel, listener)
                finally:
                    channel.close()

    asyncio.run(run())


def response(**fields):
    return pb.ChannelResponse(**({"generation": GENERATION, "seq": 0} | fields)).SerializeToString()


def test_it_opens_then_carries_commands_and_answers_in_order():
    seen = []

    def behave(requests, _context):
        for raw in requests:
            request = pb.ChannelRequest.FromString(raw)
            seen.append((request.WhichOneof("command"), request.generation, request.seq))
            if request.HasField("probe"):
                yield response(seq=request.seq, generation=GENERATION - 1, done=pb.Done())  # of another: not ours
                yield response(seq=request.seq, done=pb.Done())
            elif request.HasField("execute"):
                yield response(seq=request.seq, execute=pb.ExecuteResult(forward_seconds=0.5))
                failure = pb.Failure(code=3, kind="ValueError", message="no", collective=False)
                yield response(seq=request.seq + 1, failure=failure)
                yield response(broken=pb.Broken(reason="a peer has gone"))

    async def talk(channel, listener):
        channel.send(Dispatch(GENERATION, 0, Probe()))
        channel.send(Dispatch(GENERATION, 1, BIG))
        assert await listener.next() == ("answered", 3, 0, None)
        kind, *_, seq, answer = await listener.next()
        assert (kind, seq) == ("answered", 1)
        assert isinstance(answer, Executed)
        assert answer.forward == 0.5
        *_, seq, answer = await listener.next()
        assert (seq, answer) == (2, Failed(3, "ValueError", "no", False))
        assert await listener.next() == ("broken", 3, "a peer has gone")

    converse(behave, talk)
    kinds = [kind for kind, _, _ in seen]
    assert kinds[:2] == ["open", "probe"]
    assert set(kinds[2:-1]) == {"part"}
    assert kinds[-1] == "execute"
    assert {generation for _, generation, _ in seen} == {GENERATION}


@pytest.mark.parametrize("times", range(5))
def test_a_refusal_while_much_is_being_written_keeps_its_reason(times):
    """gRPC's own account of it would be `INTERNAL: Internal error from Core`."""

    def behave(requests, context):
        next(requests)
        context.abort(grpc.StatusCode.ABORTED, "owned by another coordinator")
        yield b""

    async def talk(channel, listener):
        for seq in range(20):
            channel.send(Dispatch(GENERATION, seq, BIG))
        kind, number, reason = await listener.next()
        assert (kind, number) == ("disconnected", 3)
        assert reason in ("owned by another coordinator", "the server ended the call before it had read the request")

    converse(behave, talk)


@pytest.mark.parametrize("much", [False, True])
def test_a_rank_that_ends_in_order_is_a_symptom_and_not_a_loss(much):
    """Its peer died and it closed its channel: it must not be named as the one that was lost."""
    ended = threading.Event()

    def behave(requests, _context):
        next(requests)
        yield response(broken=pb.Broken(reason="rank 1 has gone"))
        ended.set()

    async def talk(channel, listener):
        for seq in range(20 if much else 0):
            channel.send(Dispatch(GENERATION, seq, BIG))
        assert await listener.next() == ("broken", 3, "rank 1 has gone")
        assert await asyncio.to_thread(ended.wait, 10)
        kind, *_ = await listener.next()
        assert kind == "broken"

    converse(behave, talk)


@pytest.mark.parametrize("nonsense", [b"\xff\xff\xff", response()], ids=["no message", "empty"])
def test_nonsense_loses_the_rank(nonsense):
    def behave(requests, _context):
        next(requests)
        yield nonsense
        next(requests, None)

    async def talk(channel, listener):
        kind, _, reason = await listener.next()
        assert kind == "disconnected"
        assert "no response" in reason

    converse(behave, talk)


def test_closing_it_tells_nobody():
    came, gone = threading.Event(), threading.Event()

    def behave(requests, context):
        context.add_callback(gone.set)
        next(requests)
        came.set()
        gone.wait(20)
        yield b""

    async def talk(channel, listener):
        channel.send(Dispatch(GENERATION, 0, Probe()))
        assert await asyncio.to_thread(came.wait, 20)
        channel.close()
        assert await asyncio.to_thread(gone.wait, 20)
        assert listener.heard == []

    converse(behave, talk)


def test_nobody_at_the_address_is_a_loss():
    async def run():
        async with grpc.aio.insecure_channel("127.0.0.1:1") as connection:
            listener = Listener()
            channel = StreamChannel(0, GENERATION, "me", connection, listener)
            kind, _, reason = await listener.next()
            channel.close()
            assert kind == "disconnected"
            assert "failed to connect" in reason

    asyncio.run(run())
