"""The blocking client against a server made of bytes that holds it up, cuts it off, or says anything at all."""

from __future__ import annotations

import contextlib
import itertools
import struct
import time

import grpc
import numpy as np
import pytest

from coordinator.client import Client, RequestError
from tests.service.raw_http2 import (
    ACK,
    DATA,
    GREETING,
    OUTPUT,
    PING,
    PREFACE,
    SETTINGS,
    WINDOW_UPDATE,
    answer,
    answers,
    body,
    code,
    failure,
    forward,
    frame,
    head,
    raw_server,
    says,
)

Code = grpc.StatusCode


def floods(data, greeting=GREETING):
    def script(peer):
        peer.greet(greeting)
        stream = peer.request()
        chunk = (data(stream) if callable(data) else data) * 500
        while True:
            peer.send(chunk)

    return script


@pytest.mark.parametrize(
    "script",
    [
        lambda peer: peer.gone(),  # reads, and says nothing
        lambda peer: time.sleep(1.5),  # does not even read
        lambda peer: peer.greet() or peer.gone(),
        says(lambda s: head(s) + body(s)[:20]),
        floods(lambda s: frame(2, 0, s, bytes(5))),
        floods(frame(88, 0, 0)),
        floods(frame(SETTINGS, ACK, 0)),
        floods(lambda s: frame(WINDOW_UPDATE, 0, 0, code(1))),
    ],
    ids=["mute", "deaf", "no answer", "half an answer", "PRIORITY", "unknown", "ACK", "WINDOW_UPDATE"],
)
def test_a_deadline_ends_the_call(script):
    began = time.monotonic()
    assert failure(script, timeout=0.5).code() is Code.DEADLINE_EXCEEDED
    assert 0.45 < time.monotonic() - began < 5


def test_a_deadline_ends_a_call_that_is_being_sent():
    for greeting in (GREETING, frame(SETTINGS, 0, 0, struct.pack(">HI", 4, 2**31 - 1))):

        def script(peer, greeting=greeting):
            peer.greet(greeting)
            if greeting is not GREETING:
                peer.send(frame(WINDOW_UPDATE, 0, 0, code(2**30)))
            time.sleep(1.0)

        with raw_server(script) as (target, _), Client(target) as client:
            with pytest.raises(RequestError) as caught:
                forward(client, 0.3, np.zeros(8 << 20))
            assert caught.value.code() is Code.DEADLINE_EXCEEDED


@pytest.mark.parametrize("data", [frame(PING, 0, 0, bytes(8)), frame(SETTINGS, 0, 0)], ids=["PING", "SETTINGS"])
def test_a_server_that_asks_without_end_is_left(data):
    assert failure(floods(data), timeout=3).code() in (Code.INTERNAL, Code.DEADLINE_EXCEEDED)


def test_empty_pieces_without_end_are_left_at_the_deadline():
    def script(peer):
        peer.greet()
        stream = peer.request()
        peer.send(head(stream))
        while True:
            peer.send(frame(DATA, 0, stream) * 500)

    assert failure(script, timeout=0.5).code() is Code.DEADLINE_EXCEEDED


def test_a_connection_is_not_used_again_past_a_deadline():
    def slow(peer):
        peer.greet()
        peer.request()
        peer.gone()

    with raw_server(slow, answers) as (target, peers), Client(target) as client:
        with pytest.raises(RequestError):
            forward(client, 0.1)
        np.testing.assert_array_equal(forward(client), OUTPUT)
    assert len(peers) == 2


def attempt(script, timeout):
    """The outcome of one call, which is nothing but an answer or a RequestError in time."""
    with raw_server(script) as (target, _), Client(target) as client:
        began = time.monotonic()
        with contextlib.suppress(RequestError):
            return forward(client, timeout)
        assert time.monotonic() - began < timeout + 2
        return None


def test_an_answer_cut_at_every_byte_is_unavailable():
    whole = answer(1)
    cuts = itertools.count()

    def script(peer):
        cut = next(cuts)
        peer.greet()
        peer.request()
        peer.send(whole[:cut])

    with raw_server(script) as (target, peers), Client(target) as client:
        for _ in range(len(whole)):
            with pytest.raises(RequestError) as caught:
                forward(client)
            assert caught.value.code() is Code.UNAVAILABLE
        np.testing.assert_array_equal(forward(client), OUTPUT)
    assert len(peers) == len(whole) + 1


@pytest.mark.parametrize("seed", range(4))
def test_an_answer_with_a_wrong_byte_is_an_answer_or_an_error(seed):
    random = np.random.default_rng(seed)
    whole = GREETING + answer(1)
    places = itertools.count()

    def script(peer):
        wrong = bytearray(whole)
        wrong[next(places) % len(whole)] ^= int(random.integers(1, 256))
        assert peer.read(len(PREFACE)) == PREFACE
        peer.send(bytes(wrong[: len(GREETING)]))
        peer.request()
        peer.send(bytes(wrong[len(GREETING) :]))

    with raw_server(script) as (target, _), Client(target) as client:
        for _ in range(len(whole)):
            with contextlib.suppress(RequestError):
                client.forward("m", {}, timeout=0.5)


@pytest.mark.parametrize("seed", range(30))
def test_noise_is_an_error(seed):
    random = np.random.default_rng(seed)

    def frames():
        for _ in range(200):
            kind, flags, stream = (int(random.integers(0, most)) for most in (12, 48, 3))
            yield frame(kind, flags, stream, random.bytes(int(random.integers(0, 40))))

    noise = random.bytes(20_000) if seed % 2 else b"".join(frames())

    def script(peer):
        if seed % 3:
            peer.greet()
            peer.request()
        peer.send(noise)

    assert attempt(script, 2.0) is None
