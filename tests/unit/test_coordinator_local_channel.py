import array
import asyncio
import os
import socket

import pytest

from coordinator.channels import Dispatch
from coordinator.commands import BatchInput, Execute, Failed, Probe
from coordinator.dtypes import DataType
from coordinator.errors import Unavailable
from coordinator.generation import Generation
from coordinator.local_channel import ATTACHED, INLINE, LocalChannel, LocalMemory, host_id
from coordinator.main import _loop_factory
from coordinator.types import TensorValue
from protos.tensor_parallel.v1 import shard_pb2 as pb
from shardd.identity import host_id as shardd_host_id


class Listener:
    def __init__(self):
        self.told = asyncio.Queue()

    def answered(self, rank, seq, answer):
        self.told.put_nowait(("answered", rank, seq, answer))

    def broken(self, rank, reason):
        self.told.put_nowait(("broken", rank, reason))

    def disconnected(self, rank, reason):
        self.told.put_nowait(("disconnected", rank, reason))

    async def next(self):
        return await asyncio.wait_for(self.told.get(), 10)


class Rank:
    """The daemon's side, driven by the test."""

    def __init__(self):
        self.path = f"@coordinator-test-{os.getpid()}-{id(self)}"
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.listener.bind("\0" + self.path[1:])
        self.listener.listen(1)
        self.segments = []

    async def accept(self, answer):
        loop = asyncio.get_running_loop()
        self.listener.setblocking(False)
        self.socket, _ = await loop.sock_accept(self.listener)
        self.socket.settimeout(10)
        assert await asyncio.to_thread(self.receive) == b"token"
        self.reply(answer)

    def receive(self):
        data, ancillary, _, _ = self.socket.recvmsg(1 << 20, 1024)
        for _, _, payload in ancillary:
            self.segments.extend(array.array("i", payload))
        return data

    async def command(self):
        return pb.ChannelRequest.FromString(await asyncio.to_thread(self.receive))

    def reply(self, answer, descriptors=()):
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))] if descriptors else []
        self.socket.sendmsg([answer.SerializeToString()], rights)

    def close(self):
        for descriptor in self.segments:
            os.close(descriptor)
        self.listener.close()
        if hasattr(self, "socket"):
            self.socket.close()


DONE = pb.ChannelResponse(generation=3, done=pb.Done())


def run(scenario, opening=DONE, loop_factory=_loop_factory):
    """On the loop that the coordinator uses, or another."""

    async def main():
        rank, listener = Rank(), Listener()
        memory = LocalMemory(1, reclaim=True)
        channel = LocalChannel(0, 3, memory, listener)
        try:
            accepting = asyncio.create_task(rank.accept(opening))
            await channel.open(rank.path, "token")
            await accepting
            await scenario(rank, channel, memory, listener)
        finally:
            channel.close()
            memory.arena.close()
            rank.close()

    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        runner.run(main())


def forward(memory, seq, data):
    value = TensorValue("x", DataType.UINT8, (len(data),), None)
    dispatch = Dispatch(3, seq, Execute("m", "1", [BatchInput(value, [data])], [], ["r"]))
    dispatch.placed, dispatch.lease = memory.place(3, seq, dispatch.command)
    return dispatch


def result(seq, *, offset=0, size=0, segment=0, data=None):
    answer = pb.ChannelResponse(generation=3, seq=seq)
    output = answer.execute.outputs.add(name="y", dtype=int(DataType.UINT8), shape=[size or len(data)])
    if data is None:
        answer.execute.arena_outputs.add(offset=offset, byte_size=size, segment=segment)
    else:
        output.data = data
    return answer


def test_both_sides_mean_the_same_host():
    assert host_id() == shardd_host_id()


def test_small_payloads_travel_in_the_message():
    async def scenario(rank, channel, memory, listener):
        channel.send(forward(memory, 0, b"abc"))
        command = await rank.command()
        assert (command.generation, command.seq) == (3, 0)
        assert command.execute.inputs[0].data == b"abc"
        assert not command.execute.arena_inputs
        assert not command.execute.HasField("arena_outputs")
        rank.reply(result(0, data=b"xyz"))
        _, _, seq, answer = await listener.next()
        assert (seq, answer.outputs[0].data) == (0, b"xyz")
        assert not rank.segments

    run(scenario)


def test_large_payloads_travel_in_the_arena_and_outputs_find_their_place_the_second_time():
    async def scenario(rank, channel, memory, listener):
        data = os.urandom(INLINE + 1)
        channel.send(forward(memory, 0, data))
        command = await rank.command()
        (ref,) = command.execute.arena_inputs
        assert os.pread(rank.segments[ref.segment], ref.byte_size, ref.offset) == data
        assert not command.execute.inputs[0].HasField("data")
        own = sealed(data[::-1])
        rank.reply(result(0, offset=0, size=len(data), segment=ATTACHED), [own])
        os.close(own)
        answer = (await listener.next())[3]
        assert bytes(answer.outputs[0].data) == data[::-1]

        channel.send(forward(memory, 1, data))
        place = (await rank.command()).execute.arena_outputs
        assert place.byte_size >= len(data)
        os.pwrite(rank.segments[place.segment], data, place.offset)
        rank.reply(result(1, offset=place.offset, size=len(data), segment=place.segment))
        answer = (await listener.next())[3]
        assert bytes(answer.outputs[0].data) == data

        del answer
        channel.send(forward(memory, 2, data))
        again = (await rank.command()).execute
        assert (again.arena_outputs, again.arena_inputs[0]) == (place, ref)  # both were free again
        assert len(rank.segments) == 2  # each segment is sent once

    run(scenario)


def sealed(data):
    import fcntl

    descriptor = os.memfd_create("test", os.MFD_ALLOW_SEALING)
    os.write(descriptor, data)
    fcntl.fcntl(descriptor, 1033, 2)
    return descriptor


def test_other_answers_are_passed_on():
    async def scenario(rank, channel, memory, listener):
        for seq in (0, 1):
            channel.send(Dispatch(3, seq, Probe()))
            assert (await rank.command()).HasField("probe")
        rank.reply(pb.ChannelResponse(generation=3, seq=0, done=pb.Done()))
        assert await listener.next() == ("answered", 0, 0, None)
        failure = pb.Failure(code=8, kind="OutOfMemory", message="none left")
        rank.reply(pb.ChannelResponse(generation=3, seq=1, failure=failure))
        assert await listener.next() == ("answered", 0, 1, Failed(8, "OutOfMemory", "none left", False))
        rank.reply(pb.ChannelResponse(generation=3, broken=pb.Broken(reason="enough")))
        assert await listener.next() == ("broken", 0, "enough")
        rank.socket.close()
        assert (await listener.next())[0] == "disconnected"

    run(scenario)


@pytest.mark.parametrize(
    "answer",
    [
        pb.ChannelResponse(generation=3, seq=7, done=pb.Done()),
        pb.ChannelResponse(generation=3, seq=0),
        pb.ChannelResponse(generation=2, seq=0, done=pb.Done()),
        result(0, offset=0, size=10, segment=0),
        result(0, offset=0, size=10, segment=ATTACHED),
    ],
)
def test_an_answer_that_makes_no_sense_ends_the_channel(answer):
    async def scenario(rank, channel, memory, listener):
        channel.send(forward(memory, 0, b"abc"))
        await rank.command()
        rank.reply(answer)
        kind, _, reason = await listener.next()
        assert kind == "disconnected"
        assert "no response" in reason

    run(scenario)


@pytest.mark.parametrize("loop_factory", [_loop_factory, lambda: asyncio.new_event_loop])
def test_a_rank_that_goes_with_commands_unread_is_missed_at_once_and_heard_out(loop_factory):
    """The kernel reports such an end as an error, after which uvloop no longer watches the socket."""

    async def scenario(rank, channel, memory, listener):
        for seq in range(3):
            channel.send(forward(memory, seq, b"abc"))
        await rank.command()
        rank.reply(result(0, data=b"xyz"))
        rank.socket.close()
        assert (await listener.next())[:3] == ("answered", 0, 0)
        kind, number, reason = await listener.next()
        assert (kind, number) == ("disconnected", 0)
        assert "reset" in reason

    run(scenario, loop_factory=loop_factory)


def test_more_commands_than_the_socket_takes_arrive_in_order():
    async def scenario(rank, channel, memory, listener):
        for seq in range(2000):
            channel.send(forward(memory, seq, b"x" * 4000))
        for seq in range(2000):
            assert (await rank.command()).seq == seq

    run(scenario)


def test_a_rank_that_is_lost_while_a_command_goes_out_ends_it_for_all():
    """The command brings new memory, which the end of the generation has closed when the second rank's turn comes."""

    async def main():
        ranks = [Rank(), Rank()]
        memory = LocalMemory(2, reclaim=True)
        generation = Generation(3, 2, lambda rank: None)
        channels = [LocalChannel(number, 3, memory, generation) for number in range(2)]
        generation.attach(channels, memory)
        try:
            for rank, channel in zip(ranks, channels, strict=True):
                accepting = asyncio.create_task(rank.accept(DONE))
                await channel.open(rank.path, "token")
                await accepting
            channels[0]._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)  # a long message cannot be sent
            data = bytes(INLINE + 1)
            value = TensorValue("x", DataType.UINT8, (len(data),), None)
            command = Execute("m", "1", [BatchInput(value, [data])], ["y" * 50_000], ["r"])
            with pytest.raises(Unavailable, match="rank 0 was lost: its socket failed: Message too long"):
                await generation.dispatch(command)
            assert generation.ended.result().rank == 0
            assert await asyncio.to_thread(ranks[1].receive) == b""
        finally:
            generation.close()
            for rank in ranks:
                rank.close()

    asyncio.run(main())


@pytest.mark.parametrize(
    "opening",
    [pb.ChannelResponse(broken=pb.Broken(reason="somebody else")), pb.ChannelResponse()],
)
def test_a_door_that_does_not_open_is_a_connection_error(opening):
    async def scenario(*_):
        raise AssertionError("it opened")

    with pytest.raises(ConnectionError):
        run(scenario, opening)


def test_a_socket_that_is_not_there_is_an_oserror():
    async def main():
        channel = LocalChannel(0, 1, LocalMemory(1, reclaim=True), Listener())
        with pytest.raises(OSError):
            await channel.open("@nobody-listens-here", "token")

    asyncio.run(main())
