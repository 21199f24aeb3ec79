"""The blocking client against a server made of bytes: when connections are made, used again, and left."""

from __future__ import annotations

import struct
import threading
import time

import grpc
import numpy as np
import pytest

from coordinator.client import Client, RequestError
from tests.service.raw_http2 import (
    END_HEADERS,
    END_STREAM,
    GOAWAY,
    HEAD,
    HEADERS,
    OUTPUT,
    PING,
    RST_STREAM,
    SETTINGS,
    answer,
    answers,
    block,
    code,
    forward,
    frame,
    raw_server,
    says,
)

Code = grpc.StatusCode


def test_calls_one_after_the_other_share_a_connection():
    with raw_server(answers) as (target, peers), Client(target) as client:
        for _ in range(5):
            forward(client)
        assert len(peers) == 1
        together = threading.Barrier(3)
        threads = [threading.Thread(target=lambda: (together.wait(10), forward(client))) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(10)
        for _ in range(5):
            forward(client)
        assert len(peers) <= 3


def test_only_so_many_connections_are_kept(monkeypatch):
    monkeypatch.setattr("coordinator.client.transport.pool.MOST_IDLE", 1)
    all_here = threading.Barrier(3)

    def script(peer):
        peer.greet()
        stream = peer.request()
        all_here.wait(10)
        peer.send(answer(stream))
        peer.gone()

    with raw_server(script, script, script, answers) as (target, peers), Client(target) as client:
        threads = [threading.Thread(target=forward, args=(client,)) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(10)
        assert left(peers, 1)


def test_old_idle_connections_are_let_go(monkeypatch):
    monkeypatch.setattr("coordinator.client.transport.pool.IDLE_SECONDS", 0.0)
    both_here = threading.Barrier(2)

    def script(peer):
        peer.greet()
        stream = peer.request()
        both_here.wait(10)
        peer.send(answer(stream))
        while True:
            peer.send(answer(peer.request()))

    with raw_server(script) as (target, peers), Client(target) as client:
        threads = [threading.Thread(target=forward, args=(client,)) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(10)
        forward(client)
        assert left(peers, 1)


def left(peers, count):
    """Whether no more than ``count`` connections are open, soon."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        found = sum(peer.socket.fileno() >= 0 for peer in peers)
        if found <= count:
            return found == count
        time.sleep(0.01)
    return False


def once(peer, *then):
    peer.greet()
    peer.send(answer(peer.request()) + b"".join(then))


@pytest.mark.parametrize(
    "ending",
    [
        once,
        lambda peer: once(peer, frame(GOAWAY, 0, 0, code(1) + code(0))) or peer.gone(),
        lambda peer: once(peer, b"garbage, and a lot of it") or peer.gone(),
        lambda peer: once(peer, frame(PING, 0, 0, bytes(8)) * 200_000) or peer.gone(),
    ],
    ids=["closed", "GOAWAY", "garbage", "flood"],
)
def test_a_connection_that_ended_while_idle_fails_no_call(ending):
    with raw_server(ending, answers) as (target, peers), Client(target) as client:
        forward(client)
        time.sleep(0.2)  # the end is under way, and nothing tells when it is here
        np.testing.assert_array_equal(forward(client), OUTPUT)
    assert len(peers) == 2


@pytest.mark.parametrize(
    "refusal",
    [lambda s: frame(RST_STREAM, 0, s, code(7)), lambda s: frame(GOAWAY, 0, 0, code(max(0, s - 2)) + code(0))],
)
def test_a_request_that_was_not_begun_is_sent_again_once(refusal):
    def script(peer):
        once(peer)
        peer.send(refusal(peer.request()))
        peer.gone()

    with raw_server(script, answers) as (target, peers), Client(target) as client:
        forward(client)
        np.testing.assert_array_equal(forward(client), OUTPUT)
        assert len(peers) == 2
    with raw_server(script, says(refusal)) as (target, peers), Client(target) as client:
        forward(client)
        with pytest.raises(RequestError) as caught:
            forward(client)
        assert caught.value.code() is Code.UNAVAILABLE
        assert len(peers) == 2


def test_a_request_that_may_have_run_is_not_sent_again():
    def script(peer):
        once(peer)
        peer.request()

    with raw_server(script, answers) as (target, peers), Client(target) as client:
        forward(client)
        with pytest.raises(RequestError, match="lost") as caught:
            forward(client)
        assert caught.value.code() is Code.UNAVAILABLE
        assert len(peers) == 1


def test_a_call_goes_on_while_the_server_leaves():
    def script(peer):
        peer.greet()
        peer.send(frame(GOAWAY, 0, 0, code(2**31 - 1) + code(0)) + frame(PING, 0, 0, b"12345678"))
        stream = peer.request()
        peer.send(frame(GOAWAY, 0, 0, code(stream) + code(0)) + answer(stream))
        peer.gone()

    with raw_server(script, answers) as (target, peers), Client(target) as client:
        forward(client)
        forward(client)
    assert len(peers) == 2


def test_a_server_that_leaves_while_a_request_waits_gets_none():
    def script(peer):
        peer.greet(frame(SETTINGS, 0, 0, struct.pack(">HI", 3, 0)))
        peer.until(SETTINGS)
        peer.send(frame(GOAWAY, 0, 0, code(0) + code(0)))
        peer.gone()

    with raw_server(script, answers) as (target, peers), Client(target) as client:
        np.testing.assert_array_equal(forward(client), OUTPUT)
    assert len(peers) == 2


def test_why_the_server_left_is_told():
    def script(peer):
        peer.greet()
        peer.send(frame(GOAWAY, 0, 0, code(peer.request()) + code(11) + b"too_many_pings"))

    with raw_server(script) as (target, _), Client(target) as client:
        with pytest.raises(RequestError, match="too_many_pings") as caught:
            forward(client)
    assert caught.value.code() is Code.UNAVAILABLE


def test_an_answer_before_the_end_of_the_request_is_taken():
    refused = (("grpc-status", "8"), ("grpc-message", "too large"))

    def script(peer):
        peer.greet()
        stream = peer.until(HEADERS)[2]
        peer.send(frame(HEADERS, END_HEADERS | END_STREAM, stream, block(*HEAD, *refused)))
        peer.send(frame(RST_STREAM, 0, stream, code(0)))
        peer.gone()

    with raw_server(script, answers) as (target, peers), Client(target) as client:
        with pytest.raises(RequestError, match="too large") as caught:
            forward(client, x=np.zeros(1 << 20))
        assert caught.value.code() is Code.RESOURCE_EXHAUSTED
        np.testing.assert_array_equal(forward(client), OUTPUT)
    assert len(peers) == 2
