"""Faults of the network between the coordinator and its daemons: cut, late, silent. All processes live on."""

from __future__ import annotations

import random
import tempfile
import time
from pathlib import Path
from typing import Any

from coordinator.client import Client
from tests.chaos.driver import wait_serving
from tests.chaos.load import Load, Reference
from tests.chaos.proxy import Network
from tests.chaos.timeline import Fault, Timeline, percentile
from tests.service.clusters import CoordinatorProcess
from tests.service.daemons import Daemons

FACTORY = "tests.chaos.models:deep_mlp"
KINDS = ("link cut", "link cut", "link delay", "link silence")


def run(ranks: int, faults: int, seed: int) -> tuple[dict[str, Any], Timeline]:
    """The figures of ``faults`` faults on links, under load, and what happened. Raises NeverRecovered."""
    chance, timeline = random.Random(seed), Timeline()
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch)
        environment = {"OMP_NUM_THREADS": "1"}
        arguments = ["--threads", "1", "--allow-factory", FACTORY]
        with (
            Daemons(ranks, directory, arguments=arguments, tcp=True, env=environment) as daemons,
            Network(daemons.addresses) as network,
        ):
            flags = ["--local-channel", "false", "--load", f"chaos={FACTORY}"]
            coordinator = CoordinatorProcess(network.addresses, directory, arguments=flags)
            try:
                target = coordinator.await_address()
                with Client(target) as observer:
                    before = wait_serving(observer, ranks)
                    with Load(target, Reference(), timeline):
                        for _ in range(faults):
                            time.sleep(chance.uniform(0.2, 0.6))
                            _strike(chance, network, observer, ranks, timeline)
                    after = wait_serving(observer, ranks)
            finally:
                coordinator.kill()
    touched = [
        new["rank"]
        for old, new in zip(before["ranks"], after["ranks"], strict=True)
        if (old["pid"], old["loads"]) != (new["pid"], new["loads"])
    ]
    return _figures(ranks, timeline, len(touched)), timeline


def _strike(chance: random.Random, network: Network, observer: Client, ranks: int, timeline: Timeline) -> None:
    wait_serving(observer, ranks)
    kind, rank = chance.choice(KINDS), chance.randrange(ranks)
    seconds = chance.uniform(0.1, 1.0) if kind != "link silence" else chance.uniform(1.0, 2.5)
    fault = Fault(kind, time.monotonic(), f"rank {rank}")
    timeline.faults.append(fault)
    if kind == "link cut":
        network.strike(rank, lambda link: link.cut(seconds))
    elif kind == "link delay":
        network.strike(rank, lambda link: link.delay(seconds, chance.uniform(0.01, 0.2)))
    else:
        network.strike(rank, lambda link: link.silence(seconds))
    wait_serving(observer, ranks)
    fault.serving_again = time.monotonic() - fault.at - seconds


def _figures(ranks: int, line: Timeline, touched: int) -> dict[str, Any]:
    again = [fault.serving_again for fault in line.faults if fault.serving_again is not None]
    cut = [f.serving_again for f in line.faults if f.kind == "link cut" and f.serving_again is not None]
    return {
        "scene": f"{ranks} links",
        **line.counted(),
        "cut_to_notice_p99": percentile(line.notices("link cut"), 0.99),
        "again_after_link_cut_p50": percentile(cut, 0.5),
        "again_after_link_fault_max": percentile(again, 1.0),
        "survivors_touched": touched,
    }
