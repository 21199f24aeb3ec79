"""Which cores a rank gets, on machines of many shapes."""

from __future__ import annotations

from pathlib import Path

import pytest

from shardd import cpus
from shardd.config import ConfigError, parse_cpus, read_config
from shardd.cpus import Core, CpuError, listed, place, share, usable_cores


def machine(root: Path, nodes: list[str], siblings: list[str]) -> Path:
    """What the kernel shows of memory nodes and of cores, as lists of CPUs."""
    for number, members in enumerate(nodes):
        (root / f"node/node{number}").mkdir(parents=True)
        (root / f"node/node{number}/cpulist").write_text(members + "\n")
    for core in siblings:
        for cpu in parse_cpus(core):
            folder = root / f"cpu/cpu{cpu}/topology"
            folder.mkdir(parents=True)
            (folder / "thread_siblings_list").write_text(core + "\n")
    return root


def flat(count: int, nodes: int = 1) -> list[Core]:
    return [Core(number * nodes // count, (number,)) for number in range(count)]


def numbers(blocks: list) -> list[list[int]]:
    return [[core.cpus[0] for core in block] for block in blocks]


@pytest.mark.parametrize(
    ("text", "found", "again"),
    [("3", [3], "3"), ("0-2,8", [0, 1, 2, 8], "0-2,8"), (" 4 , 0-1,1", [0, 1, 4], "0-1,4"), ("2-1", [], "")],
)
def test_lists_of_cpus(text, found, again):
    assert parse_cpus(text) == found
    assert listed(found) == again


@pytest.mark.parametrize("text", ["", "a", "1-", "-1", "0-7;9", "1.5", "999999"])
def test_what_is_no_list_is_refused(text, tmp_path):
    with pytest.raises(ConfigError, match="--cpus"):
        read_config(["--rank", "0", "--world-size", "1", "--model-root", str(tmp_path), f"--cpus={text}"], {})


def test_a_local_rank_outside_its_host_is_refused(tmp_path):
    flags = ["--rank", "2", "--world-size", "4", "--model-root", str(tmp_path), "--local-rank", "2"]
    with pytest.raises(ConfigError, match="--local-rank: 2 must be less than --local-ranks 2"):
        read_config([*flags, "--local-ranks", "2"], {})


def test_hardware_threads_of_a_core_stay_together(tmp_path):
    """CPUs 0-3 and their second threads 4-7, as most machines number them; odd CPUs belong to the second node."""
    system = machine(tmp_path, ["0,2,4,6", "1,3,5,7"], ["0,4", "1,5", "2,6", "3,7"])
    cores = usable_cores(range(8), system)
    assert cores == [Core(0, (0, 4)), Core(0, (2, 6)), Core(1, (1, 5)), Core(1, (3, 7))]


def test_only_allowed_cpus_count(tmp_path):
    system = machine(tmp_path, ["0-3", "4-7"], ["0-1", "2-3", "4-5", "6-7"])
    assert usable_cores({1, 4, 5}, system) == [Core(0, (1,)), Core(1, (4, 5))]


def test_where_the_kernel_does_not_tell_every_cpu_is_a_core(tmp_path):
    assert usable_cores({2, 5}, tmp_path) == [Core(0, (2,)), Core(0, (5,))]


@pytest.mark.parametrize(
    ("cores", "nodes", "ranks", "threads", "found"),
    [
        (9, 1, 2, 4, [[0, 1, 2, 3], [4, 5, 6, 7]]),
        (16, 2, 2, 3, [[0, 1, 2], [3, 4, 5]]),
        (16, 2, 3, 3, [[0, 1, 2], [3, 4, 5], [8, 9, 10]]),  # not 6 and 7 of one node with 8 of the other
        (12, 2, 3, 4, [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]),  # keeping to the nodes, one would get none
        (8, 2, 1, 6, [[0, 1, 2, 3, 4, 5]]),  # larger than a node
    ],
)
def test_shares_are_apart_and_of_one_node_where_possible(cores, nodes, ranks, threads, found):
    assert numbers(share(flat(cores, nodes), ranks, threads)) == found


@pytest.fixture
def host(monkeypatch):
    """Makes this a host of so many CPUs, of which a control group may allow less."""

    def make(count: int, quota: int | None = None) -> None:
        monkeypatch.setattr(cpus.os, "sched_getaffinity", lambda _: set(range(count)))
        monkeypatch.setattr(cpus, "available_cores", lambda: quota or count)
        monkeypatch.setattr(cpus, "usable_cores", lambda allowed: [Core(0, (cpu,)) for cpu in sorted(allowed)])

    return make


def placed(setting="auto", **other) -> tuple[int, ...]:
    facts = {"on_cpu": True, "local_rank": 1, "local_ranks": 2, "threads": 2} | other
    return place(setting, **facts).cpus


def test_a_rank_gets_cores_of_its_own_if_one_is_left_for_the_rest(host):
    host(5)
    assert placed() == (2, 3)
    host(4)
    assert placed() == ()
    assert placed(threads=1) == (1,)


def test_a_quota_of_less_than_the_cores_pins_nothing(host):
    host(64, quota=4)
    assert placed() == ()


def test_what_pins_nothing(host):
    host(64)
    assert placed("none") == ()
    assert placed(on_cpu=False) == ()
    assert placed(local_ranks=0, local_rank=0) == ()
    assert placed() == (2, 3)


def test_a_list_is_taken_as_it_is_if_it_may_be_used(host):
    host(2)
    assert placed((0,), local_ranks=0, local_rank=0) == (0,)
    with pytest.raises(CpuError, match=r"--cpus: 2,7-8 may not be used here; 0-1 may"):
        placed((1, 2, 7, 8))
