"""The local channel of real daemons: the arena, what is refused, and what of it outlives a generation (nothing)."""

from __future__ import annotations

import mmap
import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest
import torch

from protos.tensor_parallel.v1 import coordinator_pb2, shard_pb2, tensor_pb2
from tests.service import shard_models
from tests.service.daemons import Daemons, wait_for
from tests.service.shard_client import LocalChannel, Ranks, StreamChannel, sealed_memory, wire

MLP, MOODY = "tests.service.shard_models:mlp", "tests.service.shard_models:moody"
SIZE = 4 << 20
X = np.random.default_rng(0).standard_normal((64, 16)).astype(np.float32)


class LocalRanks(Ranks):
    """Ranks whose channels are local ones."""

    def form(self) -> list[str]:
        backends = super().form_without_channels()
        descriptor = sealed_memory(SIZE)
        self.inputs = mmap.mmap(descriptor, SIZE)
        self.channels = [LocalChannel(rank, self.generation, descriptor, SIZE) for rank in self.ranks]
        os.close(descriptor)
        return backends

    def command(self, x: np.ndarray, *, room: int = SIZE, model: str = "mlp", offset: int = 0) -> dict:
        self.inputs[offset : offset + x.nbytes] = x.tobytes()
        place = shard_pb2.ArenaRef(offset=offset, byte_size=x.nbytes, segment=0)
        return {
            "execute": shard_pb2.ExecuteModel(
                model=model,
                version="1",
                inputs=[wire("x", x, data=False)],
                arena_inputs=[place],
                arena_outputs=shard_pb2.ArenaRef(offset=0, byte_size=room, segment=1),
            )
        }


@pytest.fixture(scope="module")
def daemons(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemons]:
    arguments = ["--allow-factory", MLP, "--allow-factory", MOODY]
    with Daemons(2, tmp_path_factory.mktemp("local"), arguments=arguments) as started:
        yield started


@pytest.fixture
def ranks(daemons: Daemons) -> Iterator[LocalRanks]:
    with LocalRanks(daemons.addresses) as made:
        options = coordinator_pb2.LoadOptions(verify=False)
        made.load("mlp", MLP, options=options)
        made.load("moody", MOODY, options=options)
        made.form()
        yield made


def expected(x: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return shard_models.mlp()[0](torch.from_numpy(x)).numpy()


def assert_serves(ranks: LocalRanks) -> None:
    answer, _ = ranks.run(**ranks.command(X))
    np.testing.assert_allclose(ranks.channels[0].array(answer), expected(X), atol=1e-5)


def failure(ranks: LocalRanks, **command) -> str:
    """The message of a command that fails alike on both ranks, and ends nothing."""
    first, second = ranks.run(**command)
    assert first.failure.code == second.failure.code == grpc.StatusCode.INVALID_ARGUMENT.value[0], first
    return first.failure.message


def test_tensors_pass_through_the_arena(ranks: LocalRanks) -> None:
    for offset in (0, 4096, SIZE - X.nbytes):
        first, second = ranks.run(**ranks.command(X, offset=offset))
        [place] = first.execute.arena_outputs
        assert (place.segment, place.byte_size) == (1, X.nbytes)
        assert not first.execute.outputs[0].data
        np.testing.assert_allclose(ranks.channels[0].array(first), expected(X), atol=1e-5)
        assert not second.execute.outputs


@pytest.mark.parametrize(("rows", "where"), [(64, "message"), (2000, "attached")])
def test_outputs_without_room_travel_with_the_answer(ranks: LocalRanks, rows: int, where: str) -> None:
    x = np.resize(X, (rows, 16))
    answer, _ = ranks.run(**ranks.command(x, room=64))
    np.testing.assert_allclose(ranks.channels[0].array(answer), expected(x), atol=1e-5)
    assert bool(answer.execute.outputs[0].data) == (where == "message")


def test_small_inputs_may_be_inline(ranks: LocalRanks) -> None:
    command = shard_pb2.ExecuteModel(model="mlp", version="1", inputs=[wire("x", X)])
    answer, _ = ranks.run(execute=command)
    np.testing.assert_allclose(ranks.channels[0].array(answer), expected(X), atol=1e-5)


def test_further_segments_may_be_attached(ranks: LocalRanks) -> None:
    descriptor = sealed_memory(X.nbytes)
    os.pwrite(descriptor, X.tobytes(), 0)
    command = ranks.command(X)["execute"]
    command.arena_inputs[0].segment = 2
    message = shard_pb2.ChannelRequest(generation=ranks.generation, seq=ranks.seq, execute=command)
    ranks.seq += 1
    for channel in ranks.channels:
        socket.send_fds(channel.socket, [message.SerializeToString()], [descriptor])
    os.close(descriptor)
    answer, _ = ranks.receive()
    np.testing.assert_allclose(ranks.channels[0].array(answer), expected(X), atol=1e-5)


@pytest.mark.parametrize(
    ("place", "words"),
    [
        ({"offset": 0, "byte_size": 4096, "segment": 7}, "not in the arena"),
        ({"offset": SIZE - 64, "byte_size": 4096, "segment": 0}, "not in the arena"),
        ({"offset": 2**63, "byte_size": 4096, "segment": 0}, "not in the arena"),
        ({"offset": 0, "byte_size": 64, "segment": 0}, "needs 4096 bytes"),
        ({"offset": 2, "byte_size": 4096, "segment": 0}, "multiple"),
    ],
)
def test_places_outside_the_arena_are_refused(ranks: LocalRanks, place: dict, words: str) -> None:
    command = ranks.command(X)["execute"]
    command.arena_inputs[0].CopyFrom(shard_pb2.ArenaRef(**place))
    assert words in failure(ranks, execute=command)
    assert_serves(ranks)


def test_places_and_inputs_must_match(ranks: LocalRanks) -> None:
    command = ranks.command(X)["execute"]
    command.arena_inputs.add(offset=0, byte_size=4)
    assert "2 places" in failure(ranks, execute=command)
    missing = tensor_pb2.Tensor(name="x", dtype=tensor_pb2.FLOAT32, shape=[64, 16])
    assert "0 came" in failure(ranks, execute=shard_pb2.ExecuteModel(model="mlp", version="1", inputs=[missing]))


def test_an_output_region_outside_the_arena_is_refused_and_not_written(ranks: LocalRanks) -> None:
    command = ranks.command(X)["execute"]
    command.arena_outputs.CopyFrom(shard_pb2.ArenaRef(offset=SIZE - 64, byte_size=SIZE, segment=1))
    first, second = ranks.run(execute=command)
    assert "not in the arena" in first.failure.message
    assert second.HasField("failure") or second.HasField("execute")  # rank 1 has nothing to write
    ranks.form()
    assert_serves(ranks)


def test_a_stranger_without_the_token_is_turned_away(ranks: LocalRanks) -> None:
    ranks.form_without_channels()
    request = shard_pb2.OpenLocalChannelRequest(generation=ranks.generation, owner="tester")
    opened = ranks[0].stub.OpenLocalChannel(request, timeout=10)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as stranger:
        stranger.settimeout(10)
        stranger.connect("\0" + opened.socket_path[1:])
        stranger.send(b"0" * len(opened.token))
        answer = shard_pb2.ChannelResponse.FromString(stranger.recv(4096))
        assert "somebody else" in answer.broken.reason
        assert stranger.recv(4096) == b""
    ranks.form()
    assert_serves(ranks)


@pytest.mark.parametrize("memory", ["unsealed", "file", "empty"])
def test_memory_that_could_vanish_is_refused(ranks: LocalRanks, memory: str, tmp_path: Path) -> None:
    ranks.form_without_channels()
    request = shard_pb2.OpenLocalChannelRequest(generation=ranks.generation, owner="tester")
    opened = ranks[0].stub.OpenLocalChannel(request, timeout=10)
    if memory == "file":
        (tmp_path / "f").write_bytes(b"0" * 4096)
        descriptor = os.open(tmp_path / "f", os.O_RDWR)
    else:
        descriptor = sealed_memory(0 if memory == "empty" else 4096, seals=2 if memory == "empty" else 0)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as caller:
        caller.settimeout(10)
        caller.connect("\0" + opened.socket_path[1:])
        socket.send_fds(caller, [opened.token.encode()], [descriptor])
        os.close(descriptor)
        answer = shard_pb2.ChannelResponse.FromString(caller.recv(4096))
        assert "arena" in answer.broken.reason
    ranks.form()
    assert_serves(ranks)


def test_a_stream_may_take_the_place_of_a_local_channel_that_was_not_used(ranks: LocalRanks) -> None:
    ranks.form_without_channels()
    for rank in ranks.ranks:
        request = shard_pb2.OpenLocalChannelRequest(generation=ranks.generation, owner="tester")
        assert rank.stub.OpenLocalChannel(request, timeout=10).token
    ranks.channels = [StreamChannel(rank.stub, ranks.generation, "tester") for rank in ranks.ranks]
    assert Ranks.execute(ranks, "mlp", x=X)[0].HasField("execute")


def test_only_the_owner_of_the_ready_generation_may_open(ranks: LocalRanks) -> None:
    for generation, owner, code in (
        (ranks.generation - 1, "tester", grpc.StatusCode.FAILED_PRECONDITION),
        (ranks.generation, "somebody", grpc.StatusCode.ABORTED),
    ):
        request = shard_pb2.OpenLocalChannelRequest(generation=generation, owner=owner)
        with pytest.raises(grpc.RpcError) as refused:
            ranks[0].stub.OpenLocalChannel(request, timeout=10)
        assert refused.value.code() is code


@pytest.mark.parametrize("message", [b"\xff\xff\xff", b"x" * 200_000], ids=["garbage", "too long"])
def test_garbage_ends_the_generation_and_no_more(ranks: LocalRanks, message: bytes) -> None:
    channel = ranks.channels[0].socket
    channel.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
    channel.send(message)
    wait_for(lambda: ranks[0].status().state == "BROKEN", "the generation to end")
    ranks.form()
    assert_serves(ranks)


def test_a_killed_peer_is_told_on_the_local_channel(daemons: Daemons, ranks: LocalRanks) -> None:
    x = X.copy()
    x[0, 0] = shard_models.DIE_ONE
    ranks.send(**ranks.command(x, model="moody"))
    answer = ranks.channels[0].receive()
    assert answer.failure.collective
    assert ranks.channels[0].receive().HasField("broken")
    assert ranks.channels[0].receive() is None
    assert ranks.channels[1].receive() is None
    daemons.restart(1)
    for name, path in (("mlp", MLP), ("moody", MOODY)):
        ranks[1].load(name, path, options=coordinator_pb2.LoadOptions(verify=False))
    ranks.form()
    assert_serves(ranks)


def test_a_hung_up_coordinator_ends_the_generation(ranks: LocalRanks) -> None:
    for channel in ranks.channels:
        channel.close()
    wait_for(lambda: [rank.status().state for rank in ranks.ranks] == ["BROKEN"] * 2, "both ranks to notice")
    ranks.form()
    assert_serves(ranks)


def test_a_stopped_rank_cannot_write_where_the_next_generation_reads(daemons: Daemons, ranks: LocalRanks) -> None:
    old = ranks.channels[1]
    daemons[1].suspend()
    try:
        ranks.send(**ranks.command(X))
        wait_for(lambda: ranks[0].status().busy_milliseconds > 50, "rank 0 to wait for rank 1")
        assert ranks[0].fence(ranks.generation + 1).accepted
    finally:
        daemons[1].signal(signal.SIGCONT)
    ranks.form()
    fresh = ranks.channels[1].outputs
    for _ in range(5):
        assert_serves(ranks)
    assert fresh[:64] == bytes(64)  # rank 1 sends no replicated output, and nothing of the old generation came here
    assert old.outputs[:64] == bytes(64)


def test_mappings_and_descriptors_go_with_their_generation(daemons: Daemons, ranks: LocalRanks) -> None:
    def held(pid: int) -> tuple[int, int]:
        maps = Path(f"/proc/{pid}/maps").read_text().count("memfd:test")
        return maps, len(os.listdir(f"/proc/{pid}/fd"))

    assert_serves(ranks)
    before = [held(daemon.pid) for daemon in daemons]
    assert [maps for maps, _ in before] == [2, 2]
    for _ in range(10):
        ranks.form()
        assert_serves(ranks)
    for (_, files), daemon in zip(before, daemons, strict=True):
        maps, now = held(daemon.pid)
        assert maps == 2
        assert now <= files + 1
    ranks.generation += 1
    assert all(answer.accepted for answer in ranks.all(lambda rank: rank.fence(ranks.generation)))
    assert [held(daemon.pid)[0] for daemon in daemons] == [0, 0]
