"""The blocking and the async client over real sockets, against a server whose every answer is scripted."""

from __future__ import annotations

import asyncio
import doctest
import threading

import grpc
import numpy as np
import pytest

import coordinator.client
from coordinator.client import AsyncClient, Client, RequestError, RetryPolicy, stream, sync
from tests.service.client_server import scripted_server

QUICK = RetryPolicy(attempts=4, initial=0.01, maximum=0.02)
UNAVAILABLE, EXHAUSTED = grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED


@pytest.fixture
def server():
    with scripted_server() as found:
        yield found


class Either:
    """One client's methods, whichever of the two it is."""

    def __init__(self, kind):
        self._kind = kind

    def __call__(self, target, method, *args, **kwargs):
        settings = kwargs.pop("client", {})
        if self._kind is Client:
            with Client(target, **settings) as client:
                return getattr(client, method)(*args, **kwargs)

        async def run():
            async with AsyncClient(target, **settings) as client:
                return await getattr(client, method)(*args, **kwargs)

        return asyncio.run(run())


@pytest.fixture(params=[Client, AsyncClient], ids=["sync", "async"])
def call(request):
    return Either(request.param)


def test_forward_returns_the_outputs_by_name(server, call):
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    out = call(server[0], "forward", "double", {"x": x}, request_id="mine")
    np.testing.assert_array_equal(out["output"], 2 * x)
    assert server[1].request_ids == ["mine"]


def test_forward_carries_the_token_and_makes_an_id(server, call):
    call(server[0], "forward", "echo", {"x": np.ones(1)}, client={"token": "s3cret"})
    assert server[1].metadata[0]["authorization"] == "Bearer s3cret"
    assert len(server[1].request_ids[0]) == 32


def test_a_failure_has_code_details_id_and_hint(server, call):
    server[1].script = [(UNAVAILABLE, "rank 1 was lost", 250)]
    with pytest.raises(RequestError) as caught:
        call(server[0], "forward", "echo", {"x": np.ones(1)}, request_id="r7")
    error = caught.value
    assert (error.code(), error.details()) == (UNAVAILABLE, "rank 1 was lost")
    assert (error.request_id, error.retry_after) == ("r7", 0.25)
    assert error.__cause__ is None


def test_an_unknown_model_is_not_retried(server, call):
    with pytest.raises(RequestError, match="no model 'nope'") as caught:
        call(server[0], "forward", "nope", {}, client={"retries": QUICK})
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    assert len(server[1].request_ids) == 1


@pytest.mark.parametrize("streamed", [False, True])
def test_retries_hide_a_lost_rank_and_a_full_queue(server, call, streamed):
    server[1].script = [(UNAVAILABLE, "lost", 10), (EXHAUSTED, "queue full", 10), (UNAVAILABLE, "forming", None)]
    out = call(server[0], "forward", "echo", {"x": np.arange(3)}, client={"retries": QUICK}, streamed=streamed)
    np.testing.assert_array_equal(out["x"], np.arange(3))
    assert len(set(server[1].request_ids)) == 1
    assert len(server[1].request_ids) == 4


def test_a_stream_refused_while_it_is_written_keeps_its_status(server, monkeypatch):
    """grpc.aio reports a failed write as INTERNAL in place of what the server said; it shows once in some dozens."""
    monkeypatch.setattr(stream, "CHUNK_BYTES", 1024)
    x = np.zeros(64 * 1024, np.uint8)
    times = 150

    async def refused():
        async with AsyncClient(server[0]) as client:
            for _ in range(times):
                with pytest.raises(RequestError) as caught:
                    await client.forward("echo", {"x": x}, streamed=True)
                yield caught.value

    async def run():
        return [(error.code(), error.details(), error.retry_after) async for error in refused()]

    server[1].script = [(EXHAUSTED, "queue full", 10)] * times
    assert set(asyncio.run(run())) == {(EXHAUSTED, "queue full", 0.01)}


def test_retries_end_with_the_last_error(server, call):
    server[1].script = [(UNAVAILABLE, f"lost {n}", None) for n in range(9)]
    with pytest.raises(RequestError, match="lost 3"):
        call(server[0], "models", client={"retries": QUICK})


def test_out_of_memory_has_no_hint_and_is_not_retried(server, call):
    server[1].script = [(EXHAUSTED, "rank 0 is out of memory", None)]
    with pytest.raises(RequestError, match="out of memory"):
        call(server[0], "forward", "echo", {}, client={"retries": QUICK})


def test_a_hint_beyond_the_deadline_fails_at_once(server, call):
    server[1].script = [(UNAVAILABLE, "forming", 60_000)]
    with pytest.raises(RequestError, match="forming"):
        call(server[0], "forward", "echo", {}, client={"retries": True}, timeout=5)
    assert len(server[1].request_ids) == 1


def test_a_deadline_is_kept(server, call):
    with pytest.raises(RequestError) as caught:
        call(server[0], "forward", "hang", {}, timeout=0.2)
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED


def test_nobody_there_is_unavailable(call):
    with pytest.raises(RequestError) as caught:
        call("127.0.0.1:1", "health", timeout=5)
    assert caught.value.code() is UNAVAILABLE


def test_retries_wait_for_a_coordinator_that_comes_back(call):
    """A restarted coordinator has the same port; the caller sees one slow answer, and no error."""
    with scripted_server() as (target, _):
        pass
    answers = []
    caller = threading.Thread(
        target=lambda: answers.append(call(target, "forward", "echo", {"x": np.ones(1)}, client={"retries": True}))
    )
    caller.start()
    from concurrent.futures import ThreadPoolExecutor

    from protos.tensor_parallel.v1 import coordinator_pb2_grpc as rpc
    from tests.service.client_server import Scripted

    server = grpc.server(ThreadPoolExecutor(2))
    rpc.add_CoordinatorServicer_to_server(Scripted(), server)
    server.add_insecure_port(target)
    server.start()
    caller.join(30)
    server.stop(None).wait(5)
    assert answers[0]["x"] == 1


@pytest.mark.parametrize("size", [0, 10, 5000])
def test_streaming_sends_and_receives_in_pieces(server, call, size, monkeypatch):
    monkeypatch.setattr(stream, "CHUNK_BYTES", 1024)
    x = np.random.default_rng(size).random(size)
    out = call(server[0], "forward", "echo", {"x": x, "y": np.int8(3)}, streamed=True)
    np.testing.assert_array_equal(out["x"], x)
    assert out["y"] == 3
    assert server[1].chunks == -(-8 * size // 1024) if size > 128 else server[1].chunks == 0


def test_streaming_is_chosen_by_size(server, call, monkeypatch):
    monkeypatch.setattr("coordinator.client.calls.STREAM_ABOVE", 100)
    with pytest.raises(RequestError, match="bad in band") as caught:  # only the stream knows this model
        call(server[0], "forward", "bad", {"x": np.zeros(101, np.int8)})
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_a_stream_that_ends_early_is_an_error(server, call):
    with pytest.raises(RequestError, match="ended early"):
        call(server[0], "forward", "cut", {"x": np.zeros(1)}, streamed=True)


def test_sixteen_mebibytes_both_ways(server, call):
    x = np.random.default_rng(0).integers(0, 255, 1 << 24, np.uint8)
    np.testing.assert_array_equal(call(server[0], "forward", "echo", {"x": x})["x"], x)


def test_load_reports_progress_and_returns_the_model(server, call):
    seen = []
    model = call(server[0], "load", "m", "models/m", progress=seen.append, dtype="bfloat16", max_delay=0.001)
    assert [report["ranks"][0]["bytes_done"] for report in seen[:-1]] == [0, 50, 100]
    assert [report["stage"] for report in seen] == ["READING"] * 3 + ["SERVING"]
    assert model["bytes_per_rank"] == [60, 40]
    assert server[1].loads[0].options.dtype == "bfloat16"


def test_an_error_of_the_callers_own_callback_reaches_him(server, call):
    def fails(_):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        call(server[0], "load", "m", "p", progress=fails)


def test_the_other_calls(server, call):
    health = call(server[0], "health")
    assert (health["serving"], health["generation"], health["coordinator"]["state"]) == (True, 3, "READY")
    assert health["ranks"][0]["bytes_held"] == 1 << 40
    assert {
        "rank",
        "pid",
        "host",
        "device",
        "state",
        "loads",
        "generation",
        "bytes_held",
        "peak_bytes",
        "last_error",
    } <= set(health["ranks"][0])
    assert [model["name"] for model in call(server[0], "models")] == ["double"]
    assert call(server[0], "plan", "p", ranks=2) == {"mode": "graph", "fits": True}
    assert call(server[0], "unload", "double") is None


def test_health_is_never_retried(server, call):
    server[1].script = [(UNAVAILABLE, "no", None)]
    with pytest.raises(RequestError):
        call(server[0], "health", client={"retries": True})


def test_a_closed_client_says_so(server):
    client = Client(server[0])
    client.close()
    with pytest.raises(RequestError, match=r"[Cc]losed"):
        client.health()

    async def run():
        client = AsyncClient(server[0])
        await client.close()
        await client.health()

    with pytest.raises(RequestError, match="closed"):
        asyncio.run(run())


def test_threads_share_a_client(server):
    with Client(server[0]) as client:
        outs = [None] * 8

        def work(n):
            for _ in range(20):
                outs[n] = client.forward("double", {"x": np.full(3, n, np.float32)})["output"]

        threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
    assert [out[0] for out in outs] == [2.0 * n for n in range(8)]


def test_cancelling_an_async_call_ends_it(server):
    async def run():
        async with AsyncClient(server[0]) as client:
            task = asyncio.create_task(client.forward("hang", {}))
            while not server[1].request_ids:  # noqa: ASYNC110 - the server is in another thread
                await asyncio.sleep(0.005)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    asyncio.run(run())
    assert server[1].held == 0  # it was not waited for


@pytest.mark.parametrize("module", [coordinator.client, sync])
def test_the_documentation_examples_run(server, module):
    finder = doctest.DocTestFinder(exclude_empty=True)
    runner = doctest.DocTestRunner()
    for test in finder.find(module, globs={"target": server[0], "Client": Client}):
        runner.run(test)
    assert runner.tries > 0
    assert runner.failures == 0
