"""Hundreds of generations in the same daemons, whose weights stay: what is left behind."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from protos.tensor_parallel.v1 import coordinator_pb2
from tests.service.daemons import Daemons
from tests.service.shard_client import Ranks

MLP = "tests.service.shard_models:mlp"
X = np.ones((4, 16), np.float32)
WARM = 20  # generations until pools have the threads that they need


def run(directory: Path, count: int = 200, backend: str = "gloo") -> dict[str, Any]:
    """Two daemons through ``count`` generations, a right answer in each. Growth is the worst daemon's."""
    arguments = ["--allow-factory", MLP, "--backend", backend, "--log-level", "warning"]
    with Daemons(2, directory, arguments=arguments) as daemons, Ranks(daemons.addresses) as ranks:
        ranks.load("mlp", MLP, options=coordinator_pb2.LoadOptions(verify=False))

        def generations(count: int) -> list[tuple[int, int, int]]:
            for turn in range(count):
                ranks.form()
                answer = ranks.execute("mlp", x=X)[0]
                assert answer.HasField("execute"), answer
                for channel in ranks.channels if turn % 2 else ():
                    channel.close()  # every other generation ends by a lost channel, the rest by the next fence
            return [_footprint(daemon.pid) for daemon in daemons]

        before, after = generations(WARM), generations(count)
        threads, descriptors, resident = (
            max(last[part] - first[part] for first, last in zip(before, after, strict=True)) for part in range(3)
        )
        return {
            "scene": f"{count} generations",
            "threads_grown": threads,
            "descriptors_grown": descriptors,
            "generations_grown_mib": round(resident / 2**20, 1),
            "loads": max(rank.status().loads for rank in ranks.ranks),
        }


def _footprint(pid: int) -> tuple[int, int, int]:
    """Threads, descriptors, resident bytes. The workers of the server's pool do not count: they are made when several
    calls overlap, which depends on what else the machine does, and their number has a limit."""
    resident = int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    threads = sum(name != "rpc" for name in _thread_names(pid))
    return threads, len(os.listdir(f"/proc/{pid}/fd")), resident


def _thread_names(pid: int) -> Iterator[str]:
    for thread in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            yield (thread / "comm").read_text().strip()
