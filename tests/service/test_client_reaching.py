"""The blocking client on its way to a server: addresses that refuse, drop or hang, and names with several."""

from __future__ import annotations

import contextlib
import socket
import threading
import time

import grpc
import numpy as np
import pytest

from coordinator.client import Client, RequestError
from tests.service.raw_http2 import OUTPUT, answers, forward, raw_server

Code = grpc.StatusCode


def test_refused_is_unavailable_at_once_and_names_the_address():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        target = f"127.0.0.1:{taken.getsockname()[1]}"
    for where in (target, "unix:/nowhere/at/all", "unix:/" + "x" * 300):
        began = time.monotonic()
        with Client(where) as client, pytest.raises(RequestError) as caught:
            forward(client, 20)
        assert caught.value.code() is Code.UNAVAILABLE
        assert where in caught.value.details()
        assert time.monotonic() - began < 5


def test_the_addresses_of_a_name_are_tried_in_order(monkeypatch):
    real = socket.getaddrinfo
    with (
        raw_server(lambda peer: peer.send(b"HTTP/1.1 400 Bad Request\r\n\r\n") or peer.gone()) as (wrong, _),
        raw_server(answers) as (
            target,
            peers,
        ),
    ):
        with socket.create_server(("127.0.0.1", 0)) as taken:
            closed = taken.getsockname()[1]
        ports = [closed, int(wrong.split(":")[1]), int(target.split(":")[1])]

        def look_up(host, port, *rest, **more):
            if host != "coordinator.example":
                return real(host, port, *rest, **more)
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", one)) for one in ports]

        monkeypatch.setattr(socket, "getaddrinfo", look_up)
        with Client("coordinator.example:1") as client:
            np.testing.assert_array_equal(forward(client, 20), OUTPUT)
            forward(client)
            ports.pop()
            for peer in peers:
                peer.socket.shutdown(socket.SHUT_RDWR)
            with pytest.raises(RequestError, match=r"coordinator\.example:1 \(127\.0\.0\.1\)") as caught:
                forward(client, 5)
            assert caught.value.code() is Code.UNAVAILABLE


def test_a_look_up_is_bounded_and_may_fail(monkeypatch):
    with Client("no-such-host.invalid:1") as client, pytest.raises(RequestError, match=r"no-such-host\.invalid") as one:
        forward(client, 20)
    assert one.value.code() is Code.UNAVAILABLE
    released = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: released.wait(20) and [])
    with Client("hangs.invalid:1") as client, pytest.raises(RequestError) as two:
        forward(client, 0.2)
    released.set()
    assert two.value.code() is Code.DEADLINE_EXCEEDED


def test_an_address_that_drops_everything_leaves_time_for_the_next(monkeypatch):
    with raw_server(lambda peer: peer.gone()) as (mute, _), raw_server(answers) as (target, _):
        places = [("127.0.0.1", int(one.split(":")[1])) for one in (mute, target)]
        found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", place) for place in places]
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
        with Client("coordinator.example:1") as client:
            np.testing.assert_array_equal(forward(client, 1.0), OUTPUT)


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_UNIX])
def test_a_server_too_busy_to_accept_costs_the_deadline_and_no_close(family, tmp_path):
    """Linux leaves further connections unanswered once the backlog is full."""
    place = ("127.0.0.1", 0) if family == socket.AF_INET else f"{tmp_path}/socket"
    with socket.socket(family) as busy, contextlib.ExitStack() as stack:
        busy.bind(place)
        busy.listen(0)
        for _ in range(4):
            filling = stack.enter_context(socket.socket(family))
            filling.setblocking(False)
            filling.connect_ex(busy.getsockname())
        target = f"unix:{place}" if family == socket.AF_UNIX else f"127.0.0.1:{busy.getsockname()[1]}"
        client = stack.enter_context(Client(target))
        with pytest.raises(RequestError) as caught:
            forward(client, 0.3)
        assert caught.value.code() is Code.DEADLINE_EXCEEDED
        closing = threading.Timer(0.2, client.close)
        closing.start()
        began = time.monotonic()
        with pytest.raises(RequestError) as caught:
            forward(client, 20)
        assert caught.value.code() is Code.CANCELLED
        assert time.monotonic() - began < 10
