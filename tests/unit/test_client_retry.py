"""Retry decisions, errors, connection settings and what importing the client costs."""

from __future__ import annotations

import pickle
import subprocess
import sys

import grpc
import pytest

from coordinator.client import Client, InvalidInputError, RequestError, RetryPolicy, Tls
from coordinator.retry import Attempts

UNAVAILABLE, EXHAUSTED = grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def attempts(retries, timeout=10.0):
    clock = Clock()
    return Attempts(RetryPolicy.of(retries), timeout, clock), clock


def test_no_retries_unless_asked_for():
    for none in (None, 0, False):
        assert attempts(none)[0].pause_after(RequestError(UNAVAILABLE, "")) is None


def test_a_number_is_retries_after_the_first_call():
    tries, _ = attempts(2)
    assert [tries.pause_after(RequestError(UNAVAILABLE, "")) is None for _ in range(3)] == [False, False, True]


def test_true_goes_on_until_the_deadline():
    tries, clock = attempts(True, timeout=5.0)
    made = 0
    while (pause := tries.pause_after(RequestError(UNAVAILABLE, ""))) is not None:
        clock.now += pause
        made += 1
    assert made >= 4
    assert tries.remaining() == pytest.approx(5.0 - (clock.now - 100))
    assert clock.now < 105


def test_pauses_grow_to_their_cap_and_never_undercut_the_hint():
    policy = RetryPolicy(initial=0.1, multiplier=2, maximum=1, jitter=0)
    assert [policy.pause(n) for n in (0, 1, 2, 3, 4, 10_000)] == [0.1, 0.2, 0.4, 0.8, 1, 1]
    tries = Attempts(policy, None)
    assert tries.pause_after(RequestError(UNAVAILABLE, "", retry_after=3)) == 3
    assert tries.remaining() is None


@pytest.mark.parametrize(
    ("error", "again"),
    [
        (RequestError(UNAVAILABLE, ""), True),
        (RequestError(EXHAUSTED, "queue full", retry_after=0.1), True),
        (RequestError(EXHAUSTED, "out of device memory"), False),
        (RequestError(grpc.StatusCode.INVALID_ARGUMENT, "", retry_after=0.1), False),
        (RequestError(grpc.StatusCode.DEADLINE_EXCEEDED, ""), False),
        (RequestError(grpc.StatusCode.INTERNAL, ""), False),
    ],
    ids=str,
)
def test_only_what_waiting_can_cure_is_retried(error, again):
    assert (attempts(5)[0].pause_after(error) is not None) is again


@pytest.mark.parametrize("bad", [-1, "three", 1.5])
def test_nonsense_retries_are_refused(bad):
    with pytest.raises(ValueError, match="retries"):
        RetryPolicy.of(bad)


@pytest.mark.parametrize(
    "bad", [{"attempts": 0}, {"initial": 0}, {"maximum": 0.01}, {"jitter": 1}, {"multiplier": 0.5}]
)
def test_nonsense_policies_are_refused(bad):
    with pytest.raises(ValueError):
        RetryPolicy(**bad)


def test_errors_read_well_and_survive_pickling():
    error = RequestError(UNAVAILABLE, "rank 1 was lost", request_id="abc", retry_after=0.5)
    assert str(error) == "UNAVAILABLE: rank 1 was lost (request abc)"
    again = pickle.loads(pickle.dumps(error))  # noqa: S301 - our own
    assert (again.code(), again.details(), again.request_id, again.retry_after) == (
        UNAVAILABLE,
        "rank 1 was lost",
        "abc",
        0.5,
    )
    assert isinstance(error, grpc.RpcError)
    assert isinstance(pickle.loads(pickle.dumps(InvalidInputError("no", "r"))), InvalidInputError)  # noqa: S301


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"target": ""}, "HOST:PORT"),
        ({"target": "a b:1"}, "HOST:PORT"),
        ({"tls": "/no/such/file"}, "'/no/such/file'"),
        ({"tls": Tls(cert=b"x")}, "both the certificate and its key"),
    ],
    ids=str,
)
def test_bad_settings_are_refused_at_once(arguments, says):
    with pytest.raises(InvalidInputError, match=says):
        Client(**({"target": "127.0.0.1:1"} | arguments))


def test_importing_the_client_needs_neither_torch_nor_the_server():
    program = (
        "import sys, coordinator.client;"
        "print([m for m in ('torch', 'structlog', 'prometheus_client', 'rich', 'click', 'ml_dtypes',"
        " 'coordinator.core', 'coordinator.service') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30, check=True)
    assert result.stdout.strip() == "[]"
