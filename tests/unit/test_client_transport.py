"""The client's own transport, as far as it needs no network: which calls it takes, and how it reads an answer."""

from __future__ import annotations

import struct
import subprocess
import sys
import time
from pathlib import Path

import grpc
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.client import Tls
from coordinator.client.connection import Connection
from coordinator.client.transport import channel_to
from coordinator.client.transport.address import Address
from coordinator.client.transport.answer import Answer
from coordinator.client.transport.channel import Channel
from coordinator.client.transport.deadline import Deadline
from coordinator.client.transport.failures import CallFailed
from coordinator.http2.fields import message_field, message_of, seconds_of, timeout_field

ROOT = Path(__file__).resolve().parents[2]
HEAD = [(b"content-type", b"application/grpc")]


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("localhost:5000", ("localhost:5000", "localhost", 5000, "")),
        ("10.0.0.1:80", ("10.0.0.1:80", "10.0.0.1", 80, "")),
        ("[::1]:5000", ("[::1]:5000", "::1", 5000, "")),
        ("unix:run/socket", ("localhost", "", 0, "run/socket")),
        ("unix:///run/socket", ("localhost", "", 0, "/run/socket")),
    ],
)
def test_targets_that_are_reached_directly(target, expected):
    found = Address.of(target)
    assert (found.authority, found.host, found.port, found.path) == expected


@pytest.mark.parametrize(
    "target",
    [
        "localhost",
        "dns:///localhost:5000",
        "dns:5000",
        "ipv4:127.0.0.1:5000",
        "ipv6:[::1]:5000",
        "::1:5000",
        "a:0",
        "a:70000",
        "a:b",
        "unix-abstract:name",
        "unix://host/path",
        "unix:",
        "unix:a%20b",
        "[fe80::1%eth0]:5000",
    ],
)
def test_targets_that_are_left_to_grpcio(target):
    assert Address.of(target) is None


def kind_of(target="localhost:1", **settings):
    given = {"token": None, "tls": None, "retries": None, "timeout": None, "options": None} | settings
    channel = channel_to(Connection.of(target, **given))
    channel.close()
    return type(channel)


def test_what_the_user_sets_decides_who_carries_the_calls(monkeypatch):
    for name in ("grpc_proxy", "https_proxy", "http_proxy"):
        monkeypatch.delenv(name, raising=False)
    assert kind_of() is Channel
    assert kind_of("unix:/nowhere") is Channel
    assert kind_of("dns:///localhost:1") is grpc._channel.Channel
    assert kind_of(options=[("grpc.max_send_message_length", 5)]) is grpc._channel.Channel
    assert kind_of(tls=Tls()) is grpc._channel.Channel
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    assert kind_of("example.org:1") is grpc._channel.Channel
    assert kind_of() is Channel


def test_without_httpunk_calls_are_grpcios():
    code = (
        "import sys; sys.modules['httpunk'] = None\n"
        "from coordinator.client import Client\n"
        "with Client('127.0.0.1:1') as client: print(type(client._channel).__module__)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=30)
    assert done.stdout.strip() == "grpc._channel", done.stderr


def test_importing_the_client_does_not_import_what_only_a_call_needs():
    code = "import sys, coordinator.client; print('httpunk' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=30)
    assert done.stdout.strip() == "False", done.stderr


@given(st.floats(1e-9, 1e12))
def test_a_timeout_is_never_sent_as_less(seconds):
    sent = timeout_field(seconds).encode()
    assert len(sent) <= 9
    assert seconds_of(sent) >= min(seconds, 99_999_999) * (1 - 1e-12)
    assert seconds_of(sent) <= max(seconds * 1.001, seconds + 1e-6)


@given(st.text())
def test_a_status_message_comes_back_as_it_was(message):
    encodable = message.encode("utf-8", "replace").decode()
    assert message_of(message_field(encodable).encode()) == encodable


def test_a_deadline_is_shared_among_the_steps():
    assert Deadline(None).remaining() is None
    assert Deadline(None).part(3.0, 2).remaining() == pytest.approx(3, abs=0.5)
    whole = Deadline(8.0)
    assert whole.part(100.0, 2).remaining() == pytest.approx(4, abs=0.5)
    assert whole.part(1.0, 2).remaining() == pytest.approx(1, abs=0.5)
    assert whole.part(100.0, 1) is whole
    assert Deadline(1e12).milliseconds() < 2**31
    passed = Deadline(1e-9)
    time.sleep(1e-6)
    with pytest.raises(CallFailed) as caught:
        passed.part(1.0, 1)
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED


def answered(size, pieces, *, direct=0):
    """An answer whose message of ``size`` bytes came in ``pieces``; from ``direct`` on, it is put into its place."""
    message = np.random.default_rng(0).bytes(size)
    whole = memoryview(struct.pack(">BI", 0, size) + message)
    answer = Answer()
    answer.fields(200, HEAD, False)
    for start in range(0, len(whole), pieces):
        piece = whole[start : start + pieces]
        if direct and start >= direct:
            answer.room()[: len(piece)] = piece
            answer.filled(len(piece))
        else:
            answer.feed(piece)
    answer.fields(None, [(b"grpc-status", b"0")], True)
    return answer.message(), message


@pytest.mark.parametrize("size", [0, 1, 100, 65535, 65536, 1 << 20])
@pytest.mark.parametrize("pieces", [1 << 30, 70_001, 3])
def test_a_message_in_pieces_is_whole_and_read_only(size, pieces):
    found, message = answered(min(size, pieces * 1000), pieces)
    assert found == message
    assert found.readonly


def test_the_rest_of_a_message_may_be_put_into_its_place():
    found, message = answered(1 << 20, 10_000, direct=10_000)
    assert found == message


def test_an_answer_larger_than_memory_is_told_so(monkeypatch):
    def empty(*_):
        raise MemoryError

    answer = Answer()
    answer.fields(200, HEAD, False)
    monkeypatch.setattr(np, "empty", empty)
    with pytest.raises(CallFailed, match="4294967295 bytes") as caught:
        answer.feed(memoryview(struct.pack(">BI", 0, 0xFFFFFFFF)))
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
