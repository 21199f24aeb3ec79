"""The blocking client's own transport with real servers in processes of their own, threads, forks and signals."""

from __future__ import annotations

import contextlib
import gc
import os
import select
import signal
import subprocess
import sys
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import numpy as np
import pytest

from coordinator.client import Client, RequestError
from tests.service.client_server import scripted_server
from tests.service.raw_http2 import answer, raw_server

ROOT = Path(__file__).resolve().parents[2]
Code = grpc.StatusCode
SERVER = """
import sys, threading
from concurrent.futures import ThreadPoolExecutor
import grpc
from protos.tensor_parallel.v1 import coordinator_pb2_grpc as rpc
from tests.service.client_server import Scripted
server = grpc.server(ThreadPoolExecutor(4))
rpc.add_CoordinatorServicer_to_server(Scripted(), server)
port = server.add_insecure_port(sys.argv[1])
server.start()
print(port, flush=True)
server.wait_for_termination()
"""


class Server:
    """The scripted server as a process."""

    def __init__(self, address="127.0.0.1:0"):
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVER, address], cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
        assert select.select([self.process.stdout], [], [], 30)[0]
        port = self.process.stdout.readline().strip()
        self.target = address if address.startswith("unix:") else f"127.0.0.1:{port}"

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait(10)
        self.process.stdout.close()


def echo(client, timeout=10.0):
    return client.forward("echo", {"x": np.arange(3)}, timeout=timeout)["x"][2]


def in_thread(function):
    """Starts it; ``result()`` gives what came of it, in ten seconds."""
    pool = ThreadPoolExecutor(1)
    future = pool.submit(function)
    pool.shutdown(wait=False)
    return future


def test_a_stopped_server_costs_the_deadline_and_a_killed_one_nothing():
    with Server() as server, Client(server.target) as client:
        assert echo(client) == 2
        os.kill(server.process.pid, signal.SIGSTOP)
        try:
            for _ in range(2):  # by the connection that is there, and by a new one
                began = time.monotonic()
                with pytest.raises(RequestError) as caught:
                    echo(client, 0.3)
                assert caught.value.code() is Code.DEADLINE_EXCEEDED
                assert time.monotonic() - began < 5
        finally:
            os.kill(server.process.pid, signal.SIGCONT)
        assert echo(client) == 2
        running = in_thread(lambda: client.forward("hang", {}, timeout=30))
        while not running.running():
            time.sleep(0.01)
        assert client.health()["serving"]  # by a connection of its own
        server.process.kill()
        with pytest.raises(RequestError) as caught:
            running.result(10)
        assert caught.value.code() is Code.UNAVAILABLE
        began = time.monotonic()
        with pytest.raises(RequestError, match=server.target) as caught:
            echo(client)
        assert caught.value.code() is Code.UNAVAILABLE
        assert time.monotonic() - began < 5


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM])
def test_a_server_that_was_started_again_fails_no_call(end):
    with Server() as first, Client(first.target) as client:
        assert echo(client) == 2
        first.process.send_signal(end)
        first.process.wait(10)
        with Server(first.target):
            assert echo(client) == 2


def test_a_unix_socket(tmp_path):
    with Server(f"unix:{tmp_path}/socket") as server:
        for target in (server.target, f"unix://{tmp_path}/socket"):
            with Client(target) as client:
                assert echo(client) == 2


def test_outputs_are_read_only_views_of_what_arrived():
    with scripted_server() as (target, _), Client(target) as client:
        for size in (10, 1 << 24):
            out = client.forward("echo", {"x": np.zeros(size, np.uint8)})["x"]
            assert not out.flags.owndata
            with pytest.raises(ValueError, match="read-only"):
                out[0] = 1


def test_close_ends_what_runs_and_what_comes():
    def mute(peer):
        peer.gone()

    with scripted_server() as (target, servicer), raw_server(mute) as (silent, peers):
        for where in (target, silent):
            client = Client(where)
            running = in_thread(lambda client=client: client.forward("hang", {}, timeout=30))
            deadline = time.monotonic() + 10
            while not (servicer.request_ids and (where is target or peers)):
                assert time.monotonic() < deadline
                time.sleep(0.01)
            client.close()
            with pytest.raises(RequestError, match="closed") as caught:
                running.result(10)
            assert caught.value.code() is Code.CANCELLED
            assert len(caught.value.request_id) == 32
            for call in (
                lambda client=client: echo(client),
                client.models,
                lambda client=client: client.load("m", "p"),
            ):
                with pytest.raises(RequestError, match="closed") as caught:
                    call()
                assert caught.value.code() is Code.CANCELLED
            client.close()


def test_a_client_that_is_forgotten_closes_its_connections():
    def script(peer):
        peer.greet()
        peer.send(answer(peer.request()))
        peer.gone()

    with raw_server(script) as (target, peers), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        Client(target).forward("m", {})
        gc.collect()
        deadline = time.monotonic() + 10
        while peers[0].socket.fileno() >= 0:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    assert not [one for one in said if one.category is ResourceWarning]


def test_an_interrupt_drops_the_connection():
    with scripted_server() as (target, servicer), Client(target) as client:
        assert echo(client) == 2

        def interrupt():
            while len(servicer.request_ids) < 2:
                time.sleep(0.01)
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

        interrupting = in_thread(interrupt)
        with pytest.raises(KeyboardInterrupt):
            client.forward("hang", {}, timeout=20)
        interrupting.result(10)
        servicer.release.set()
        assert echo(client) == 2


def test_many_threads_each_get_their_own_answer():
    with scripted_server() as (target, _), Client(target) as client:

        def work(n):
            for i in range(50):
                assert client.forward("echo", {"x": np.full(n + 1, i)}, timeout=20)["x"].tolist() == [i] * (n + 1)

        with ThreadPoolExecutor(12) as pool:
            list(pool.map(work, range(12)))


def test_deadlines_are_kept_while_others_are_answered():
    with scripted_server() as (target, servicer), Client(target) as client:

        def late(_):
            with contextlib.suppress(RequestError):
                client.forward("hang", {}, timeout=0.2)
            return echo(client)

        with ThreadPoolExecutor(3) as pool:
            answers = pool.map(late, range(3))
            servicer.release.wait(0.5)
            servicer.release.set()
            assert list(answers) == [2, 2, 2]


def test_what_no_message_can_hold_is_told_so():
    with scripted_server() as (target, _), Client(target) as client:
        call = client._channel.unary_unary("/tensor_parallel.v1.Coordinator/Forward")
        with pytest.raises(grpc.RpcError) as caught:
            call(np.empty(1 << 32, np.uint8).data, timeout=10)
        assert caught.value.code() is Code.RESOURCE_EXHAUSTED
        assert echo(client) == 2


def test_no_deadline_may_be_said_in_two_ways():
    with scripted_server() as (target, _), Client(target, timeout=None) as client:
        assert client.forward("echo", {"x": np.ones(1)})["x"] == 1
        assert echo(client, float("inf")) == 2
        for nothing in (0, -1):
            with pytest.raises(RequestError) as caught:
                echo(client, nothing)
            assert caught.value.code() is Code.DEADLINE_EXCEEDED
