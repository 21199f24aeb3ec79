"""Floors to read the service's figures against: torch in this process, and a bare gRPC server with the model inside."""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing as mp
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection

import numpy as np
import torch

from tests.benchmarks.models import identity, mlp

LIMITS = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]


def in_process(width: int, hidden: int, threads: int) -> Callable[[np.ndarray], np.ndarray]:
    """The unsharded model in this process on ``threads`` threads."""
    torch.set_num_threads(threads)
    model, _ = mlp(width, hidden)

    def call(x: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return model(torch.from_numpy(x)).numpy()

    return call


def elementwise(threads: int) -> Callable[[np.ndarray], np.ndarray]:
    """The model that gives back what it gets, in this process."""
    torch.set_num_threads(threads)
    model, _ = identity()

    def call(x: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return model(torch.from_numpy(x)).numpy()

    return call


def _serve(pipe: Connection, width: int, hidden: int, threads: int) -> None:
    import grpc

    def method(call: Callable[[np.ndarray], np.ndarray]) -> grpc.RpcMethodHandler:
        async def forward(request: bytes, context: grpc.aio.ServicerContext) -> bytes:
            return call(np.frombuffer(request, np.float32).reshape(-1, width)).tobytes()

        return grpc.unary_unary_rpc_method_handler(forward)

    methods = {"mlp": method(in_process(width, hidden, threads)), "identity": method(elementwise(threads))}

    async def run() -> None:
        server = grpc.aio.server(options=LIMITS)
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("bare", methods),))
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        pipe.send(port)
        await server.wait_for_termination()

    asyncio.run(run())


@contextlib.contextmanager
def bare_grpc(width: int, hidden: int, threads: int) -> Iterator[dict[str, Callable[[np.ndarray], np.ndarray]]]:
    """A client's functions for a one-hop grpc.aio server that holds the unsharded models and sends bare bytes."""
    import grpc

    ours, theirs = mp.Pipe()
    server = mp.get_context("spawn").Process(target=_serve, args=(theirs, width, hidden, threads), daemon=True)
    server.start()
    try:
        if not ours.poll(60):
            raise RuntimeError("the bare server did not come up")
        with grpc.insecure_channel(f"127.0.0.1:{ours.recv()}", options=LIMITS) as channel:

            def method(name: str) -> Callable[[np.ndarray], np.ndarray]:
                stub = channel.unary_unary(f"/bare/{name}")

                def call(x: np.ndarray) -> np.ndarray:
                    answer = stub(x.tobytes(), wait_for_ready=True, timeout=60)
                    return np.frombuffer(answer, np.float32).reshape(x.shape)

                return call

            yield {name: method(name) for name in ("mlp", "identity")}
    finally:
        server.kill()
        server.join()
