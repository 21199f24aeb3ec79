"""Many generations in the same daemons leave nothing behind."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from protos.tensor_parallel.v1 import coordinator_pb2
from tests.service.daemons import Daemons
from tests.service.shard_client import Ranks

MLP = "tests.service.shard_models:mlp"
X = np.ones((4, 16), np.float32)


def footprint(pid: int) -> tuple[int, int, int]:
    """Threads, descriptors, resident bytes."""
    resident = int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return len(os.listdir(f"/proc/{pid}/task")), len(os.listdir(f"/proc/{pid}/fd")), resident


@pytest.mark.timeout(180)
@pytest.mark.parametrize(("backend", "count"), [("gloo", 200), ("shm", 50)])
def test_many_generations_leave_nothing_behind(tmp_path: Path, backend: str, count: int) -> None:
    arguments = ["--allow-factory", MLP, "--backend", backend, "--log-level", "warning"]
    with Daemons(2, tmp_path, arguments=arguments) as daemons, Ranks(daemons.addresses) as ranks:
        ranks.load("mlp", MLP, options=coordinator_pb2.LoadOptions(verify=False))

        def generations(count: int) -> list[tuple[int, int, int]]:
            for turn in range(count):
                ranks.form()
                answer = ranks.execute("mlp", x=X)[0]
                assert answer.HasField("execute"), answer
                for channel in ranks.channels if turn % 2 else ():
                    channel.close()  # every other generation ends by a lost channel, the rest by the next fence
            return [footprint(daemon.pid) for daemon in daemons]

        before = generations(20)  # threads of pools come as they are needed
        after = generations(count)
        for first, last in zip(before, after, strict=True):
            assert last[0] <= first[0] + 2
            assert last[1] <= first[1] + 4
            assert last[2] - first[2] < 10e6
        assert [rank.status().loads for rank in ranks.ranks] == [1, 1]
