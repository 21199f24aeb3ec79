"""A real gRPC server of the coordinator's protocol with scripted answers, for testing clients without a cluster.

Models: `double` (doubles each input), `echo` (returns its inputs as they came), anything else is NOT_FOUND. Errors in
``script`` are raised first, one a call; None lets a call through.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import grpc
import numpy as np

from protos.tensor_parallel.v1 import coordinator_pb2 as pb
from protos.tensor_parallel.v1 import coordinator_pb2_grpc as rpc

CHUNK = 1000


class Scripted(rpc.CoordinatorServicer):
    def __init__(self) -> None:
        self.script: list[tuple[grpc.StatusCode, str, int | None] | None] = []
        self.request_ids: list[str] = []
        self.loads: list[pb.LoadRequest] = []
        self.metadata: list[dict[str, str]] = []
        self.chunks = 0
        self.held = 0  # calls of `hang` that have come to their end
        self.models = [pb.ModelInfo(name="double", version="1", serving=True)]
        self.health = pb.HealthResponse(
            serving=True,
            generation=3,
            coordinator=pb.CoordinatorHealth(pid=1, state="READY"),
            ranks=[pb.RankHealth(rank=0, pid=2, state="READY", bytes_held=1 << 40)],
        )
        self.release = threading.Event()

    def _begin(self, context: grpc.ServicerContext) -> None:
        metadata = dict(context.invocation_metadata())
        self.metadata.append(metadata)
        self.request_ids.append(metadata.get("x-request-id", ""))
        if self.script and (scripted := self.script.pop(0)) is not None:
            code, message, hint = scripted
            trailing = (("x-request-id", metadata.get("x-request-id", "made-up")),)
            context.set_trailing_metadata((*trailing, ("retry-after-ms", str(hint))) if hint is not None else trailing)
            context.abort(code, message)

    def Forward(self, request, context):
        self._begin(context)
        return self._run(request, context)

    def _run(self, request, context):
        answer = pb.ForwardResponse(model=request.model, version="1", request_id=request.request_id)
        if request.model == "hang":
            self.release.wait(20)
            self.held += 1
        elif request.model not in ("double", "echo"):
            context.abort(grpc.StatusCode.NOT_FOUND, f"no model {request.model!r}")
        for tensor in request.inputs:
            out = answer.outputs.add()
            out.CopyFrom(tensor)
            if request.model == "double":
                out.name = "output"
                out.data = (np.frombuffer(tensor.data, np.float32) * 2).tobytes()
        return answer

    def ForwardStream(self, request_iterator, context):
        self._begin(context)
        begin = next(request_iterator).begin
        waiting = {tensor.name for tensor in begin.inputs if tensor.WhichOneof("content") is None}
        parts = {tensor.name: bytearray(tensor.data) for tensor in begin.inputs}
        while waiting:
            chunk = next(request_iterator).chunk
            self.chunks += 1
            assert chunk.offset == len(parts[chunk.tensor])
            parts[chunk.tensor] += chunk.data
            if chunk.last:
                waiting.discard(chunk.tensor)
        if begin.model == "bad":
            error = pb.Error(code=grpc.StatusCode.INVALID_ARGUMENT.value[0], message="bad in band")
            yield pb.ForwardStreamResponse(request_id=begin.request_id, error=error, last=True)
            return
        answer = pb.ForwardResponse(model=begin.model, request_id=begin.request_id)
        for tensor in begin.inputs:
            answer.outputs.add(name=tensor.name, dtype=tensor.dtype, shape=tensor.shape)
        yield pb.ForwardStreamResponse(request_id=begin.request_id, response=answer)
        for name, data in parts.items():
            for offset in range(0, len(data), CHUNK):
                piece = bytes(data[offset : offset + CHUNK])
                chunk = pb.TensorChunk(request_id=begin.request_id, tensor=name, offset=offset, data=piece)
                yield pb.ForwardStreamResponse(request_id=begin.request_id, chunk=chunk)
        if begin.model != "cut":
            yield pb.ForwardStreamResponse(request_id=begin.request_id, last=True)

    def Load(self, request, context):
        self._begin(context)
        self.loads.append(request)
        for done in (0, 50, 100):
            rank = pb.RankProgress(rank=0, bytes_done=done, bytes_total=100, stage="reading")
            yield pb.LoadProgress(stage=pb.LoadProgress.READING, name=request.name, version="1", ranks=[rank])
        model = pb.ModelInfo(name=request.name, version="1", path=request.path, serving=True, bytes_per_rank=[60, 40])
        model.collectives["all_reduces"] = 2
        yield pb.LoadProgress(stage=pb.LoadProgress.SERVING, name=request.name, version="1", model=model)

    def Unload(self, request, context):
        self._begin(context)
        return pb.UnloadResponse()

    def Health(self, request, context):
        self._begin(context)
        return self.health

    def ListModels(self, request, context):
        self._begin(context)
        return pb.ListModelsResponse(models=self.models)

    def Plan(self, request, context):
        self._begin(context)
        return pb.PlanResponse(report_json='{"mode": "graph"}', fits=True)


@contextmanager
def scripted_server() -> Iterator[tuple[str, Scripted]]:
    """(target, servicer) of a server on a port of the kernel's choice."""
    servicer = Scripted()
    options = (("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1))
    server = grpc.server(ThreadPoolExecutor(8), options=options)
    rpc.add_CoordinatorServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"127.0.0.1:{port}", servicer
    finally:
        servicer.release.set()
        server.stop(None).wait(5)
