"""Which CPUs the executor may run on, and with it the threads that compute for it.

A rank that the kernel moves between cores loses its caches, and makes its peers wait in the next sum; and two ranks on
one core take turns. So each rank of a host gets cores of its own, where there are enough for all that computes and one
more for what does not: the coordinator, gRPC's threads, the system. Where there are not, pinning would do harm, and
nothing is pinned.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from shardd.config import parse_cpus
from shardd.environment import available_cores
from shardd.errors import StartError

SPARE = 1
"""Cores left to everything else."""
SYSTEM = Path("/sys/devices/system")


class CpuError(StartError):
    """The CPUs asked for may not be used; the message is one line for the operator."""


@dataclass(frozen=True)
class Core:
    """A physical core: the memory node it is near to, and those of its CPUs (hardware threads) that may be used."""

    node: int
    cpus: tuple[int, ...]


@dataclass(frozen=True)
class Placement:
    """``cpus`` of the executor; none: those of the process. ``why`` is for the log."""

    cpus: tuple[int, ...]
    why: str


def place(
    setting: str | tuple[int, ...], *, on_cpu: bool, local_rank: int, local_ranks: int, threads: int
) -> Placement:
    """What ``--cpus`` means here. ``on_cpu``: this rank computes on the CPU, with ``threads`` threads; it is number
    ``local_rank`` of the ``local_ranks`` of this host (0: not known). Raises :class:`CpuError`.
    """
    allowed = os.sched_getaffinity(0)
    if isinstance(setting, tuple):
        if missing := set(setting) - allowed:
            raise CpuError(f"--cpus: {listed(missing)} may not be used here; {listed(allowed)} may")
        return Placement(setting, "as told")
    if setting == "none" or not on_cpu:
        return Placement((), "as told" if setting == "none" else "a GPU computes")
    if not local_ranks:
        return Placement((), "the number of ranks on this host was not told")
    cores = usable_cores(allowed)
    count = min(len(cores), available_cores())
    if count < local_ranks * threads + SPARE:
        return Placement((), f"{count} cores are too few for {local_ranks} x {threads} threads and {SPARE} more")
    mine = share(cores, local_ranks, threads)[local_rank]
    return Placement(tuple(sorted(cpu for core in mine for cpu in core.cpus)), "a share of the cores")


def share(cores: Sequence[Core], ranks: int, threads: int) -> list[Sequence[Core]]:
    """``threads`` neighbouring cores for each rank, in order; of one memory node where there are enough of them."""
    blocks: list[Sequence[Core]] = []
    start = 0
    while len(blocks) < ranks and start + threads <= len(cores):
        block = cores[start : start + threads]
        if len({core.node for core in block}) > 1 and threads <= sum(core.node == block[-1].node for core in cores):
            start = next(i for i, core in enumerate(cores) if core.node == block[-1].node)  # its node has room
            continue
        blocks.append(block)
        start += threads
    if len(blocks) < ranks:  # going round the borders took too much
        return [cores[rank * threads : (rank + 1) * threads] for rank in range(ranks)]
    return blocks


def usable_cores(allowed: Collection[int], system: Path = SYSTEM) -> list[Core]:
    """The physical cores of ``allowed`` CPUs, by memory node and then by number. Where the kernel does not tell, every
    CPU is a core and all are near to each other."""
    nodes = {cpu: int(path.parent.name[4:]) for path in system.glob("node/node[0-9]*/cpulist") for cpu in _cpus(path)}
    found: dict[tuple[int, ...], Core] = {}
    for cpu in sorted(allowed):
        siblings = tuple(_cpus(system / f"cpu/cpu{cpu}/topology/thread_siblings_list")) or (cpu,)
        found.setdefault(siblings, Core(nodes.get(cpu, 0), tuple(other for other in siblings if other in allowed)))
    return sorted(found.values(), key=lambda core: (core.node, core.cpus))


def _cpus(path: Path) -> list[int]:
    try:
        return parse_cpus(path.read_text(encoding="ascii").strip())
    except (OSError, ValueError):
        return []


def listed(cpus: Collection[int]) -> str:
    """CPUs as a list of ranges: the inverse of ``parse_cpus``."""
    runs: list[list[int]] = []
    for cpu in sorted(cpus):
        if runs and runs[-1][1] == cpu - 1:
            runs[-1][1] = cpu
        else:
            runs.append([cpu, cpu])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
