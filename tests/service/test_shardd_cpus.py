"""The threads of a real daemon keep to the CPUs that it was told."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from protos.tensor_parallel.v1 import coordinator_pb2
from tests.service.daemons import Daemons
from tests.service.shard_client import Ranks
from tests.service.test_shardd_process import refused, run

MLP = "tests.service.shard_models:mlp"
ALLOWED = sorted(os.sched_getaffinity(0))


def affinities(pid: int) -> dict[int, set[int]]:
    """Of every thread of a process."""
    return {int(task.name): os.sched_getaffinity(int(task.name)) for task in Path(f"/proc/{pid}/task").iterdir()}


@pytest.mark.skipif(len(ALLOWED) < 2, reason="on one CPU everything is pinned")
def test_what_computes_keeps_to_its_cpus(tmp_path):
    cpu = ALLOWED[-1]
    flags = ["--allow-factory", MLP, "--cpus", str(cpu), "--threads", "2"]
    with Daemons(1, tmp_path, arguments=flags) as daemons, Ranks(daemons.addresses) as ranks:
        options = coordinator_pb2.LoadOptions(arguments_json='{"width": 1024, "hidden": 2048}')
        ranks.load("wide", MLP, options=options)
        ranks.form()
        reply = ranks.execute("wide", x=np.ones((256, 1024), np.float32))[0]
        assert reply.HasField("execute"), reply
        found = affinities(daemons[0].pid)
        pinned = [thread for thread, where in found.items() if where == {cpu}]
        assert len(pinned) == 2  # the executor, and the thread that helps it
        assert found[daemons[0].pid] == set(ALLOWED)  # what does not compute runs anywhere
        [event] = daemons[0].events("cpus")
        assert (event["pinned"], event["threads"]) == (str(cpu), 2)


def test_cpus_that_may_not_be_used_are_refused(tmp_path):
    flags = ["--rank", "0", "--world-size", "1", "--model-root", str(tmp_path), "--device", "cpu"]
    refused(run([*flags, "--cpus", "65000"]), "--cpus: 65000 may not be used here")
