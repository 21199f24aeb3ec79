"""The blocking client against a server made of bytes: what each answer means, in whatever form it comes."""

from __future__ import annotations

import struct

import grpc
import numpy as np
import pytest
from httpunk import _httpunk as h2

from coordinator.client import Client
from protos.tensor_parallel.v1 import coordinator_pb2 as pb
from tests.service.raw_http2 import (
    ACK,
    CONTINUATION,
    DATA,
    END_HEADERS,
    END_STREAM,
    GOAWAY,
    GREETING,
    HEAD,
    HEADERS,
    OUTPUT,
    PADDED,
    PING,
    PREFACE,
    PUSH_PROMISE,
    RST_STREAM,
    SETTINGS,
    WINDOW_UPDATE,
    answer,
    block,
    body,
    code,
    failure,
    forward,
    frame,
    head,
    raw_server,
    says,
    trailers,
)

Code = grpc.StatusCode
GRPCIO = [("grpc.use_local_subchannel_pool", 1)]  # the user's own options leave the calls to grpcio


def page(status):
    fields = block((":status", str(status)), ("content-type", "text/html"))
    return says(lambda s: frame(HEADERS, END_HEADERS, s, fields) + frame(DATA, END_STREAM, s, b"<html>no</html>"))


def ends(*fields):
    return says(lambda s: head(s) + trailers(s, *fields))


@pytest.mark.parametrize("options", [None, GRPCIO], ids=["direct", "grpcio"])
@pytest.mark.parametrize(
    ("script", "expected"),
    [
        (page(400), Code.INTERNAL),
        (page(401), Code.UNAUTHENTICATED),
        (page(403), Code.PERMISSION_DENIED),
        (page(404), Code.UNIMPLEMENTED),
        (page(429), Code.UNAVAILABLE),
        (page(500), Code.UNKNOWN),
        (page(502), Code.UNAVAILABLE),
        (page(200), Code.UNKNOWN),
        (ends(("grpc-status", "5")), Code.NOT_FOUND),
        (ends(("grpc-status", "99")), Code.UNKNOWN),
        (ends(("other", "x")), Code.UNKNOWN),
        (says(lambda s: frame(HEADERS, END_HEADERS | END_STREAM, s, block(*HEAD))), Code.UNKNOWN),
        (says(lambda s: head(s) + body(s, flags=END_STREAM)), Code.UNKNOWN),
        (says(lambda s: head(s) + body(s, compressed=1) + trailers(s)), Code.INTERNAL),
        (says(lambda s: head(s) + trailers(s)), Code.INTERNAL),  # OK without a message
        (says(lambda s: head(s) + frame(DATA, 0, s, body(s)[9:-3]) + trailers(s)), Code.INTERNAL),
        (says(lambda s: head(s) + frame(DATA, 0, s, b"\0\0") + trailers(s)), Code.INTERNAL),
        (says(lambda s: frame(RST_STREAM, 0, s, code(0))), Code.INTERNAL),
        (says(lambda s: frame(RST_STREAM, 0, s, code(2))), Code.INTERNAL),
        (says(lambda s: frame(RST_STREAM, 0, s, code(7))), Code.UNAVAILABLE),
        (says(lambda s: frame(RST_STREAM, 0, s, code(8))), Code.UNAVAILABLE),  # not our own cancellation
        (says(lambda s: frame(RST_STREAM, 0, s, code(11))), Code.RESOURCE_EXHAUSTED),
        (says(lambda s: frame(RST_STREAM, 0, s, code(12))), Code.PERMISSION_DENIED),
        (says(lambda s: frame(GOAWAY, 0, 0, code(0) + code(0))), Code.UNAVAILABLE),
        (says(b"HTTP/1.1 400 Bad Request\r\n\r\n"), Code.INTERNAL),
        (lambda peer: peer.send(b"HTTP/1.1 400 Bad Request\r\n\r\n") or peer.gone(), Code.UNAVAILABLE),
        (lambda peer: None, Code.UNAVAILABLE),
        (lambda peer: peer.greet(), Code.UNAVAILABLE),
        (lambda peer: peer.greet() or peer.request(), Code.UNAVAILABLE),
        (lambda peer: peer.greet() or peer.send(head(peer.request())), Code.UNAVAILABLE),
    ],
)
def test_what_fails_has_the_code_that_grpcio_gives(script, expected, options):
    assert failure(script, options=options).code() is expected


@pytest.mark.parametrize("options", [None, GRPCIO], ids=["direct", "grpcio"])
def test_a_failure_keeps_what_the_server_says_of_it(options):
    fields = ("grpc-status", "8"), ("grpc-message", "caf%C3%A9 100%%"), ("retry-after-ms", "250"), ("x-request-id", "r")
    error = failure(says(lambda s: frame(HEADERS, END_HEADERS | END_STREAM, s, block(*HEAD, *fields))), options=options)
    assert (error.code(), error.details()) == (Code.RESOURCE_EXHAUSTED, "café 100%%")
    assert (error.request_id, error.retry_after) == ("r", 0.25)


def bomb(times):
    """A field of 4000 bytes that the table remembers, and refers to ``times`` more."""
    return b"\x40\x01x\x7f" + bytes((0x80 | (4000 - 127) & 127, (4000 - 127) >> 7)) + b"a" * 4000 + b"\xbe" * times


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        (ends(("grpc-status", "what")), Code.UNKNOWN),
        (ends(("grpc-status", "5"), ("a-bin", "!"), ("b", "c")), Code.NOT_FOUND),
        (says(lambda s: head(s) + body(s) + body(s) + trailers(s)), Code.INTERNAL),
        (says(lambda s: body(s) + trailers(s)), Code.INTERNAL),
        (says(lambda s: head(s) + head(s) + trailers(s)), Code.INTERNAL),
        (says(lambda s: answer(99)), Code.INTERNAL),
        (says(lambda s: answer(2)), Code.INTERNAL),
        (says(lambda s: head(s, flags=0) + body(s)), Code.INTERNAL),
        (says(lambda s: frame(HEADERS, END_HEADERS, s, b"\xff\xff")), Code.INTERNAL),
        (says(lambda s: frame(PUSH_PROMISE, END_HEADERS, s, code(2) + block((":path", "/")))), Code.INTERNAL),
        (says(lambda s: head(s) + frame(DATA, PADDED, s, b"\xffabc")), Code.INTERNAL),
        (says(lambda s: frame(WINDOW_UPDATE, 0, s, code(2**31 - 1))), Code.INTERNAL),
        (says(lambda s: frame(SETTINGS, 0, 0, struct.pack(">HI", 4, 2**31))), Code.INTERNAL),
        (says(lambda s: frame(99, 0, 0, bytes(1 << 17))), Code.INTERNAL),
        (says(lambda s: head(s, *[("x", "a" * 9000)] * 8) + trailers(s)), Code.RESOURCE_EXHAUSTED),
        (says(lambda s: head(s) + frame(HEADERS, END_HEADERS, s, bytes(1 << 17))), Code.RESOURCE_EXHAUSTED),
        (
            says(lambda s: frame(HEADERS, END_HEADERS | 0x20, s, code(s) + b"\0" + block(*HEAD))),
            Code.INTERNAL,
        ),  # on itself
        (says(lambda s: frame(HEADERS, END_HEADERS, s, block(*HEAD) + bomb(20))), Code.RESOURCE_EXHAUSTED),
        (says(lambda s: frame(HEADERS, END_HEADERS, s, block(*HEAD) + bomb(1000))), Code.RESOURCE_EXHAUSTED),
        (lambda peer: peer.send(answer(1)) or peer.gone(), Code.UNAVAILABLE),  # no SETTINGS first
    ],
)
def test_a_server_that_breaks_the_rules(script, expected):
    assert failure(script).code() is expected


def chopped(s):
    fields = block(*HEAD, ("x", "y" * 300))
    message = body(s)[9:]
    return (
        frame(HEADERS, END_HEADERS, s, block((":status", "103")))
        + frame(HEADERS, 0, s, fields[:5])
        + frame(CONTINUATION, 0, s, fields[5:7])
        + frame(CONTINUATION, END_HEADERS, s, fields[7:])
        + frame(DATA, 0, s)
        + b"".join(frame(DATA, PADDED, s, b"\3" + message[i : i + 1] + b"abc") for i in range(len(message)))
        + frame(77, 3, s, b"unknown")
        + frame(2, 0, s, bytes(5))  # PRIORITY
        + trailers(s)
    )


def test_an_answer_in_pieces_of_every_kind():
    def script(peer):
        peer.greet()
        peer.send(chopped(peer.request()))
        for byte in answer(peer.request()):
            peer.send(bytes((byte,)))
        peer.send(answer(peer.request()) + frame(PING, 0, 0, bytes(8)))  # which the next request finds
        peer.request()
        assert any(kind == PING and flags == ACK for kind, flags, _, _ in peer.seen)
        peer.send(answer(7))

    with raw_server(script) as (target, peers), Client(target) as client:
        for _ in range(4):
            np.testing.assert_array_equal(forward(client), OUTPUT)
    assert len(peers) == 1


def test_a_request_says_what_grpc_asks_for():
    found = []

    def script(peer):
        assert peer.read(len(PREFACE)) == PREFACE
        codec = h2.H2Codec("server")
        codec.feed_preface(PREFACE)
        peer.send(GREETING)
        for _ in range(2):
            stream = peer.request()
            for kind, flags, number, payload in peer.seen:
                if kind in (HEADERS, DATA):
                    found.extend(codec.receive(frame(kind, flags, number, payload)))
            peer.seen.clear()
            peer.send(answer(stream))

    with raw_server(script) as (target, _), Client(target, token="s3cret") as client:
        client.forward("m", {"x": np.ones(2)}, timeout=5, request_id="mine")
        client.forward("m", {"x": np.ones(2)}, timeout=5, request_id="mine")
    for first in (found[0], found[2]):
        fields = {name: value.decode() for name, value in first.headers.items()}
        assert (first.method, first.scheme, first.authority) == ("POST", "http", target)
        assert first.path == "/tensor_parallel.v1.Coordinator/Forward"
        assert 4_000_000 < int(fields.pop("grpc-timeout").removesuffix("u")) <= 5_000_000
        assert fields.pop("user-agent").startswith("grpc-python-")
        assert fields == {
            "te": "trailers",
            "content-type": "application/grpc",
            "grpc-accept-encoding": "identity",
            "x-request-id": "mine",
            "authorization": "Bearer s3cret",
        }
    assert [bool(part.end_stream) for part in found] == [False, True, False, True]


@pytest.mark.parametrize("window", [1, 7, 1000])
def test_a_server_that_allows_little_gets_all(window):
    x = np.random.default_rng(0).random(500 * window)
    got = bytearray()

    def script(peer):
        peer.greet(frame(SETTINGS, 0, 0, struct.pack(">HI", 4, window)))
        last = False
        while not last:
            kind, flags, stream, payload = peer.frame()
            if kind == DATA:
                last = bool(flags & END_STREAM)
                assert len(payload) <= window
                got.extend(payload)
                peer.send(frame(WINDOW_UPDATE, 0, stream, code(window)) + frame(WINDOW_UPDATE, 0, 0, code(window)))
        peer.send(answer(stream))

    with raw_server(script) as (target, _), Client(target) as client:
        np.testing.assert_array_equal(forward(client, x=x), OUTPUT)
    assert x.tobytes() in got


def test_a_server_with_a_small_table_of_headers_understands_each_request():
    codec = h2.H2Codec("server")
    found = []

    def script(peer):
        peer.greet(frame(SETTINGS, 0, 0, struct.pack(">HI", 1, 0)))
        codec.feed_preface(PREFACE)
        codec.set_recv_header_table_size(0)
        for _ in range(3):
            stream = peer.request()
            for kind, *rest in peer.seen:
                if kind == HEADERS:
                    found.extend(codec.receive(frame(kind, *rest)))
            peer.seen.clear()
            peer.send(answer(stream))

    with raw_server(script) as (target, _), Client(target) as client:
        for n in range(3):
            client.forward("m", {}, request_id=f"r{n}")
    assert [one.headers["x-request-id"] for one in found] == [b"r0", b"r1", b"r2"]


def test_a_request_waits_while_the_server_takes_none():
    def script(peer):
        peer.greet(frame(SETTINGS, 0, 0, struct.pack(">HI", 3, 0)))
        peer.until(SETTINGS)
        peer.send(frame(SETTINGS, 0, 0, struct.pack(">HI", 3, 1)))
        assert [kind for kind, *_ in peer.seen].count(HEADERS) == 0
        peer.send(answer(peer.request()))

    with raw_server(script) as (target, _), Client(target) as client:
        np.testing.assert_array_equal(forward(client), OUTPUT)


def test_windows_are_opened_again_for_answers_without_end(monkeypatch):
    monkeypatch.setattr("coordinator.client.transport.incoming._CREDIT", 1 << 20)
    y = np.random.default_rng(0).integers(0, 255, 3 << 20, np.uint8)
    response = pb.ForwardResponse()
    response.outputs.add(name="y", dtype="UINT8", shape=[len(y)], data=y.tobytes())
    message = struct.pack(">BI", 0, response.ByteSize()) + response.SerializeToString()
    granted = {}

    def script(peer):
        peer.greet()
        for stream in (1, 3):
            assert peer.request() == stream
            peer.send(head(stream))
            for start in range(0, len(message), 1 << 20):
                peer.send(frame(DATA, 0, stream, message[start : start + (1 << 20)]))
            peer.send(trailers(stream))
        peer.request()
        for kind, _, stream, payload in peer.seen:
            if kind == WINDOW_UPDATE:
                granted[stream] = granted.get(stream, 0) + int.from_bytes(payload)
        peer.send(answer(5))

    with raw_server(script) as (target, _), Client(target) as client:
        for _ in range(2):
            found = forward(client)
            np.testing.assert_array_equal(found, y)
            assert not found.flags.writeable
        forward(client)
    assert granted[1] == granted[3] == 3 << 20
    assert 6 << 20 <= granted[0] - (2**31 - 1 - 65_535) <= 2 * len(message)
