"""What the blocking client holds in a process: connections of its own after a fork, and no threads."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc

from protos.tensor_parallel.v1 import coordinator_pb2_grpc as rpc
from tests.service.client_server import Scripted, scripted_server

ROOT = Path(__file__).resolve().parents[2]
FORKED = """
import os, sys
import numpy as np
from coordinator.client import Client

def ask(client, value):
    assert client.forward("echo", {"x": np.full(2, value)}, timeout=10)["x"][1] == value

with Client(sys.argv[1]) as client:
    ask(client, 1)
    child = os.fork()
    if not child:
        taken = [os.pipe() for _ in range(8)]  # the numbers of the parent's sockets, which are closed here
        ask(client, 2)
        client.close()
        os._exit(0)
    for _ in range(20):
        ask(client, 3)
    assert os.waitpid(child, 0)[1] == 0
    ask(client, 4)
    child = os.fork()
    if not child:
        client.close()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    ask(client, 5)
    assert len(client._channel._pool._idle) == 1
"""


def run(code, *arguments):
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=50
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_forked_child_has_connections_of_its_own():
    counted = []

    class Counting(Scripted):
        def Forward(self, request, context):
            counted.append(context.peer())
            return super().Forward(request, context)

    server = grpc.server(ThreadPoolExecutor(4))
    rpc.add_CoordinatorServicer_to_server(Counting(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        run(FORKED, f"127.0.0.1:{port}")
    finally:
        server.stop(None).wait(5)
    assert len(set(counted)) == 2  # the parent's one, before and after, and the child's
    assert len(counted) == 24


THREADS = """
import os, sys
import numpy as np
from coordinator.client import Client

with Client(sys.argv[1]) as client:
    for _ in range(3):
        client.forward("echo", {"x": np.zeros(1)})
    client.health(), client.models()
    print(len(os.listdir("/proc/self/task")))
    client.forward("echo", {"x": np.zeros(1)}, streamed=True)
    print(len(os.listdir("/proc/self/task")))
"""


def test_a_client_that_makes_no_streams_has_no_threads():
    with scripted_server() as (target, _):
        before, after = map(int, run(THREADS, target).split())
    assert before == 1
    assert after > 1
