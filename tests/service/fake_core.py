"""A coordinator core without ranks, behind a real aio server: for protocol tests that need no cluster.

It checks requests as the real one does, and computes with numpy.
"""

import asyncio
import contextlib
import mmap
import os
import threading
import time

import grpc
import numpy as np

from coordinator import errors
from coordinator.dtypes import DataType, from_inference_name
from coordinator.inference_service import inference_handler
from coordinator.metrics import Metrics
from coordinator.types import InferResult, ModelStatistics, RegionRef, TensorValue, Timings
from protos.tensor_parallel.v1 import coordinator_pb2 as pb

DTYPES = ("FP64", "FP32", "FP16", "BF16", "INT64", "INT32", "INT8", "UINT8", "BOOL")


def simple(INPUT0, INPUT1):
    """Triton's own example model."""
    return {"OUTPUT0": INPUT0 + INPUT1, "OUTPUT1": INPUT0 - INPUT1}


def identity(x):
    return {"output": x}


def model_info(name, inputs, outputs, version="1", **fields):
    info = pb.ModelInfo(name=name, version=version, serving=True, plan_mode="graph", bytes_per_rank=[64, 64], **fields)
    for described, specs in ((info.inputs, inputs), (info.outputs, outputs)):
        for tensor, (dtype, shape) in specs.items():
            described.add(name=tensor, dtype=int(from_inference_name(dtype)), shape=shape)
    return info


def standard_models():
    pair = ("INT32", [-1, 16])
    models = {
        "simple": (
            model_info("simple", {"INPUT0": pair, "INPUT1": pair}, {"OUTPUT0": pair, "OUTPUT1": pair}),
            simple,
        )
    }
    for dtype in DTYPES:
        name = f"identity_{dtype.lower()}"
        models[name] = model_info(name, {"x": (dtype, [-1, -1])}, {"output": (dtype, [-1, -1])}), identity
    return models


class FakeCore:
    """``hold`` is an event that requests wait for; ``failure``, when set, is what every forward raises."""

    def __init__(self, models=None):
        self.loaded = standard_models() if models is None else models
        self.unloaded = {}
        self.shared = {}
        self.seen = []
        self.metrics = Metrics()
        self.failure = None
        self.hold = asyncio.Event()
        self.hold.set()
        self.totals = {name: ModelStatistics() for name in self.loaded}

    async def forward(self, request):
        self.seen.append(request)
        info, function = self._known(request.model, request.version)
        if not info.serving:
            raise errors.FailedPrecondition(f"model {request.model!r} is not loaded yet")
        if self.failure is not None:
            raise self.failure
        self._check(info, request)
        loop = asyncio.get_running_loop()
        try:
            timeout = None if request.deadline is None else request.deadline - loop.time()
            await asyncio.wait_for(self.hold.wait(), timeout)
        except TimeoutError:
            raise errors.DeadlineExceeded("the deadline passed while the request waited") from None
        outputs = function(**{value.name: self._array(value) for value in request.inputs})
        wanted = request.outputs or list(outputs)
        values = [self._value(info, name, outputs[name], request.output_regions.get(name)) for name in wanted]
        self._count(request)
        timings = Timings(queue=0.001, dispatch=0.002, forward=0.001, total=0.003, rows=1)
        return InferResult(request.model, info.version, values, timings, request.request_id)

    def _known(self, name, version):
        if name not in self.loaded or version not in ("", self.loaded[name][0].version):
            raise errors.NotFound(f"Request for unknown model: {name!r} {version} is not found")
        return self.loaded[name]

    def _check(self, info, request):
        specs = {spec.name: spec for spec in info.inputs}
        names = [value.name for value in request.inputs]
        if sorted(names) != sorted(specs):
            raise errors.InvalidArgument(f"model {info.name!r} takes {sorted(specs)}, not {names}")
        for value in request.inputs:
            spec = specs[value.name]
            if int(value.dtype) != spec.dtype:
                raise errors.InvalidArgument(f"input {value.name!r} has the wrong data-type")
            pairs = zip(spec.shape, value.shape, strict=False)
            if len(spec.shape) != len(value.shape) or any(s not in (-1, g) for s, g in pairs):
                raise errors.InvalidArgument(f"unexpected shape for input {value.name!r}")
        unknown = set(request.outputs) - {spec.name for spec in info.outputs}
        if unknown:
            raise errors.InvalidArgument(f"unexpected inference output {unknown}")

    def _count(self, request):
        totals = self.totals[request.model]
        totals.requests_ok += 1
        totals.executions += 1
        totals.rows += request.inputs[0].shape[0]
        totals.batches[1] = totals.batches.get(1, 0) + 1
        totals.last_request_unix_ms = int(time.time() * 1000)

    def _map(self, region, size):
        if region.region not in self.shared:
            raise errors.InvalidArgument(f"Unable to find shared memory region: {region.region!r}")
        mapped, _, part = self.shared[region.region]
        if region.offset + region.byte_size > part.byte_size or size > region.byte_size:
            raise errors.InvalidArgument("Invalid offset or size for shared memory region")
        begin = part.offset + region.offset
        return memoryview(mapped)[begin : begin + size]

    def _array(self, value):
        data = self._map(value.region, value.byte_size) if value.region else value.data
        return np.frombuffer(data, value.dtype.storage_dtype).reshape(value.shape)

    def _value(self, info, name, array, region):
        dtype = DataType(next(spec.dtype for spec in info.outputs if spec.name == name))
        value = TensorValue(name, dtype, array.shape, None, region)
        if region is None:
            value.data = memoryview(np.ascontiguousarray(array)).cast("B") if array.size else b""
        else:
            self._map(region, array.nbytes)[:] = array.tobytes()
        return value

    async def load(self, request, request_id=""):
        self.seen.append(request)
        if request.name in self.unloaded:
            self.loaded[request.name] = self.unloaded.pop(request.name)
        elif request.name not in self.loaded:
            raise errors.InvalidArgument(f"no path is known for model {request.name!r}")
        yield pb.LoadProgress(stage=pb.LoadProgress.SERVING, name=request.name)

    async def unload(self, name):
        self._known(name, "")
        self.unloaded[name] = self.loaded.pop(name)

    def models(self):
        return [info for info, _ in self.loaded.values()]

    def model(self, name, version=""):
        return self._known(name, version)[0]

    def health(self):
        models = [pb.ModelHealth(name=info.name, serving=info.serving) for info in self.models()]
        return pb.HealthResponse(serving=True, models=models, ranks=[pb.RankHealth(rank=0, device="cpu")])

    def is_serving(self, name):
        return True if name in ("", "coordinator") else self.loaded[name][0].serving

    def statistics(self, name, version=""):
        info, _ = self._known(name, version)
        return {info.version: self.totals[name]}

    async def register_region(self, name, key, offset, byte_size):
        try:
            descriptor = os.open(f"/dev/shm/{key.strip('/')}", os.O_RDWR)
        except OSError as error:
            raise errors.InvalidArgument(f"Unable to open shared memory region: {name!r}") from error
        try:
            mapped = mmap.mmap(descriptor, 0)
        finally:
            os.close(descriptor)
        self.shared[name] = (mapped, key, RegionRef(name, offset, byte_size))

    async def unregister_region(self, name):
        for gone in [name] if name else list(self.shared):
            del self.shared[gone]

    def regions(self):
        return {name: (key, part) for name, (_, key, part) in self.shared.items()}


class FakeServer:
    """``core`` behind a real aio server on a thread of its own; ``call`` runs a function on its loop."""

    def __init__(self, make_core=FakeCore, handlers=()):
        self._handlers = handlers
        self._make_core = make_core
        self._ready = threading.Event()
        self._failure = None
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self):
        self._thread.start()
        assert self._ready.wait(20)
        if self._failure is not None:
            raise self._failure
        return self

    def __exit__(self, *_):
        asyncio.run_coroutine_threadsafe(self._server.stop(None), self._loop).result(20)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(20)

    def call(self, function, *args):
        async def run():
            return function(*args)

        return asyncio.run_coroutine_threadsafe(run(), self._loop).result(20)

    def _run(self):
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_until_complete(self._start())
        except BaseException as error:
            self._failure = error
            return
        finally:
            self._ready.set()
        with contextlib.suppress(asyncio.CancelledError):
            self._loop.run_forever()
        self._loop.close()

    async def _start(self):
        self.core = self._make_core()
        unlimited = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
        self._server = grpc.aio.server(options=unlimited)
        self._server.add_generic_rpc_handlers((inference_handler(self.core),))
        for add in self._handlers:
            add(self._server, self.core)
        self.target = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        await self._server.start()
