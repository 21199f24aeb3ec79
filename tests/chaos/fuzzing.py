"""``python -m tests.chaos fuzz``: hostile messages to every RPC of a coordinator and of a daemon; one table."""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import psutil
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

import protos.inference as inference
from coordinator.client import Client
from protos.tensor_parallel.v1 import coordinator_pb2, shard_pb2
from tests.benchmarks.cluster import up
from tests.benchmarks.report import Report
from tests.chaos.driver import wait_serving
from tests.chaos.fuzz import Fuzzer, methods, rounds
from tests.chaos.load import Reference
from tests.service.daemons import Daemons

FACTORY = "tests.chaos.models:deep_mlp"
GROWTH = 48 << 20  # bytes a process may grow while arenas, thread stacks and caches fill
WARM_ROUNDS = 4
CHECK_EVERY = 500

HEALTH = health_pb2.DESCRIPTOR.services_by_name["Health"]
COORDINATOR = (
    coordinator_pb2.DESCRIPTOR.services_by_name["Coordinator"],
    HEALTH,
    reflection_pb2.DESCRIPTOR.services_by_name["ServerReflection"],
    inference.service,
)
DAEMON = (shard_pb2.DESCRIPTOR.services_by_name["Shard"], HEALTH)


@dataclass
class Siege:
    """What came of it. ``bad`` are answers that no message may get, ``died`` tells whether a process was replaced."""

    counts: Counter[tuple[str, str]]
    bad: list[str]
    grown: int
    died: bool
    wrong: int

    @property
    def held(self) -> bool:
        return not self.bad and not self.died and not self.wrong and self.grown < GROWTH


@contextlib.contextmanager
def served() -> Iterator[str]:
    """The address of a coordinator that serves ``kept``, and ``chaos``, which a strike may rightly unload."""
    extra = ["--allow-factory", FACTORY, "--load", f"chaos={FACTORY}", "--load", f"kept={FACTORY}"]
    with up(2, extra=extra) as target:
        yield target


def at_coordinator(target: str, strikes: int, seed: int) -> Siege:
    """Strikes at every RPC on the coordinator's port, a right answer asked for in between."""
    reference = Reference(4)
    with grpc.insecure_channel(target) as channel, Client(target) as client:
        wrong = 0

        def pids() -> list[int]:
            health = wait_serving(client, 2)
            return [health["coordinator"]["pid"], *(rank["pid"] for rank in health["ranks"])]

        def right() -> bool:
            answer = client.forward("kept", {"x": reference.requests[0]}, timeout=10)
            return reference.right(0, next(iter(answer.values())))

        fuzzer, targets = Fuzzer(channel, seed), methods(COORDINATOR)
        list(rounds(fuzzer, targets, len(targets) * WARM_ROUNDS))  # fills caches, before memory is read
        before = resident(pids())
        for index, _ in enumerate(rounds(fuzzer, targets, strikes)):
            if index % CHECK_EVERY == 0:
                wrong += not right()
        wrong += not right()
        after = pids()
        died = after != list(before)
        grown = 0 if died else max(size - before[pid] for pid, size in resident(after).items())
    return Siege(fuzzer.counts, fuzzer.bad, grown, died, wrong)


def at_daemon(strikes: int, seed: int) -> Siege:
    """Strikes at every RPC of one daemon, as whoever can reach its port could send them."""
    with (
        tempfile.TemporaryDirectory() as scratch,
        Daemons(1, Path(scratch), arguments=["--allow-factory", FACTORY]) as daemons,
        grpc.insecure_channel(daemons[0].address) as channel,
    ):
        pid = daemons[0].pid
        _load(channel)  # imports all that a load needs, before memory is read
        fuzzer, targets = Fuzzer(channel, seed), methods(DAEMON)
        list(rounds(fuzzer, targets, len(targets) * WARM_ROUNDS))
        before = resident([pid])
        list(rounds(fuzzer, targets, strikes))
        if not daemons[0].alive:
            return Siege(fuzzer.counts, fuzzer.bad, 0, died=True, wrong=0)
        wrong = int(_status(channel).pid != pid)
        return Siege(fuzzer.counts, fuzzer.bad, resident([pid])[pid] - before[pid], died=False, wrong=wrong)


def _load(channel: grpc.Channel) -> None:
    request = shard_pb2.ShardLoadRequest(name="chaos", version="1", path=FACTORY)
    list(channel.unary_stream("/tensor_parallel.v1.Shard/Load")(request.SerializeToString(), timeout=60))


def _status(channel: grpc.Channel) -> shard_pb2.StatusResponse:
    call = channel.unary_unary("/tensor_parallel.v1.Shard/Status")
    return shard_pb2.StatusResponse.FromString(call(b"", timeout=10))


def resident(pids: Sequence[int]) -> dict[int, int]:
    return {pid: psutil.Process(pid).memory_info().rss for pid in pids}


def figures(strikes: int, seed: int) -> Iterator[tuple[dict[str, Any], Siege]]:
    """Three quarters of the strikes at a coordinator, the rest at a daemon; each with the row of its table."""
    share = strikes // 4
    with served() as target:
        first = at_coordinator(target, strikes - share, seed)
    for name, siege in (("fuzz coordinator", first), ("fuzz daemon", at_daemon(share, seed))):
        row = {
            "scene": name,
            "strikes": sum(siege.counts.values()),
            "internal": len(siege.bad),
            "died": int(siege.died),
            "wrong": siege.wrong,
            "grown_mib": round(siege.grown / 2**20, 1),
        }
        yield row, siege


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos fuzz", description=__doc__)
    parser.add_argument("--strikes", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args(arguments)
    report = Report("fuzz", f"python -m tests.chaos fuzz --strikes {args.strikes} --seed {args.seed}")
    held = True
    for row, siege in figures(args.strikes, args.seed):
        statuses = {status: sum(n for (_, s), n in siege.counts.items() if s == status) for _, status in siege.counts}
        report.add(**row, **statuses)
        report.notes += siege.bad[:10]
        held = held and siege.held
    print(report.transposed())
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
