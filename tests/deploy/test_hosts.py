"""Ranks on different hosts: right answers over a slow, lossy segment, and a cable that is cut and healed.

Hosts are network namespaces with addresses and /dev/shm of their own, 20 ms apart. The coordinator is on a third, the
client on this one.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from coordinator.client import Client, RequestError
from tests.deploy import hosts
from tests.deploy.hosts import Host, Hosts
from tests.deploy.model import FILE, NAME, Model
from tests.deploy.waiting import served, until

pytestmark = pytest.mark.timeout(150)


class Cluster:
    def __init__(self, members: list[Host], directory: Path) -> None:
        self.model = Model(directory)
        front, *self.ranks = members
        for rank, host in enumerate(self.ranks):
            flags = ["--rank", str(rank), "--world-size", str(len(self.ranks)), "--device", "cpu"]
            flags += [
                "--listen",
                f"{host.address}:7000",
                "--interface",
                hosts.INTERFACE,
                "--model-root",
                str(directory),
            ]
            host.run(sys.executable, "-m", "shardd", *flags, log=directory / f"rank{rank}.log")
        shards = ",".join(f"{host.address}:7000" for host in self.ranks)
        flags = ["--listen", f"{front.address}:50051", "--shard", shards, "--load", f"{NAME}={FILE}"]
        front.run(sys.executable, "-m", "coordinator", *flags, log=directory / "coordinator.log")
        self.client = Client(front.reach(50051))

    def served(self) -> float:
        return served(self.client, self.model)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    hosts.skip_unless_possible()
    with Hosts(3, delay=0.02, loss=0.002) as members:
        made = Cluster(members, tmp_path_factory.mktemp("hosts"))
        made.served()
        yield made


def test_answers_are_right_between_hosts(cluster: Cluster) -> None:
    times = []
    for _ in range(10):
        begun = time.monotonic()
        cluster.model.check(cluster.client.forward(NAME, cluster.model.inputs, timeout=20))
        times.append(time.monotonic() - begun)
    print(f"forward over two hosts 20 ms apart: median {sorted(times)[5] * 1e3:.0f} ms")
    assert min(times) >= 0.08  # coordinator to rank and back, and the ranks among themselves: it went over the segment
    ranks = cluster.client.health()["ranks"]
    assert [rank["state"] for rank in ranks] == ["READY", "READY"]


@pytest.mark.parametrize("rank", [0, 1])  # rank 0 has the store at which the others meet
def test_a_cut_cable_is_told_and_heals(cluster: Cluster, rank: int) -> None:
    cluster.served()
    before = cluster.client.health()
    with ThreadPoolExecutor(1) as pool:
        told = pool.submit(_until_told, cluster)
        begun = time.monotonic()
        cluster.ranks[rank].cut()
        error = told.result(60)
        print(f"rank {rank}'s cable cut to clients told: {time.monotonic() - begun:.2f} s (promised: 3)")
    assert error.code().name == "UNAVAILABLE"
    health = until(lambda: (h := cluster.client.health(timeout=5)) and not h["serving"] and h, "health to tell")
    assert f"rank {rank}" in health["reason"]
    cluster.ranks[rank].heal()
    print(f"rank {rank}'s cable healed to serving again: {cluster.served():.1f} s")
    after = cluster.client.health()
    assert [r["pid"] for r in after["ranks"]] == [r["pid"] for r in before["ranks"]]
    assert [r["loads"] for r in after["ranks"]] == [r["loads"] for r in before["ranks"]]  # weights were kept
    assert after["generation"] > before["generation"]


def _until_told(cluster: Cluster) -> RequestError:
    """The error of the first forward that fails; its own deadline is later than what is promised."""
    while True:
        try:
            cluster.model.check(cluster.client.forward(NAME, cluster.model.inputs, timeout=30))
        except RequestError as error:
            return error
