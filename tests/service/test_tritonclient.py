"""The conformance checks of the real Triton client against the service without ranks: protocol alone."""

import contextlib

import pytest
import tritonclient.grpc as triton

from coordinator import errors
from tests.service.conformance import CHECKS, Env, fails, pair
from tests.service.fake_core import FakeServer


@pytest.fixture(scope="module")
def server():
    with FakeServer() as running:
        yield running


@pytest.fixture
def env(server):
    @contextlib.contextmanager
    def held():
        server.call(server.core.hold.clear)
        try:
            yield
        finally:
            server.call(server.core.hold.set)

    made = Env(server.target, held=held)
    yield made
    made.close()


def test_there_are_enough_checks():
    assert len(CHECKS) >= 45
    assert len({check.__name__ for check in CHECKS}) == len(CHECKS)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_conformance(env, check):
    check(env)


def test_a_model_that_is_not_loaded_yet_is_unavailable(env, server):
    info, _ = server.core.loaded["simple"]
    info.serving = False
    try:
        with fails("UNAVAILABLE"):
            env.client.infer("simple", pair())
        assert env.client.is_model_ready("simple") is False
        counted = server.core.metrics.requests.labels("unknown", "UNAVAILABLE")._value.get()
        assert counted == 1, "the metrics say what the client was told"
    finally:
        info.serving = True


def test_unavailable_carries_a_retry_hint(env, server):
    server.core.failure = errors.Unavailable("rank 1 was lost", retry_after_ms=700)
    try:
        with pytest.raises(triton.InferenceServerException) as caught:
            env.client.infer("simple", pair())
        assert (caught.value.status(), caught.value.message()) == ("StatusCode.UNAVAILABLE", "rank 1 was lost")
    finally:
        server.core.failure = None


def test_a_bug_of_ours_is_internal_and_tells_nothing(env, server):
    server.core.failure = RuntimeError("secret detail")
    try:
        with fails("INTERNAL") as caught:
            env.client.infer("simple", pair())
        assert "secret" not in caught.value.message()
    finally:
        server.core.failure = None


def test_the_core_sees_what_the_client_asked_for(env, server):
    traceparent = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
    env.client.infer("simple", pair(), priority=3, timeout=5_000_000, headers={"traceparent": traceparent})
    request = server.core.seen[-1]
    assert request.priority == 3
    assert request.trace_context == {"traceparent": traceparent}
    assert 0 < request.deadline - server.call(server._loop.time) <= 5


def test_large_inputs_reach_the_core_uncopied(env, server):
    env.client.infer("simple", pair(1000))
    values = server.core.seen[-1].inputs
    assert all(isinstance(value.data, memoryview) for value in values)
    assert values[0].data.obj is values[1].data.obj


def test_loading_takes_the_path_from_the_configuration(env, server):
    config = '{"parameters": {"path": {"string_value": "llama"}}, "max_batch_size": 8, "instance_group": []}'
    env.client.load_model("simple", config=config)
    request = server.core.seen[-1]
    assert (request.name, request.path, request.options.batching.max_batch_size) == ("simple", "llama", 8)
