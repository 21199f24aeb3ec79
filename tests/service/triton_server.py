"""The real Triton with the models of the conformance checks: `tritonserver` of the `nvidia-pytriton` wheel, no GPU.

It needs a virtual environment of its own with numpy 1 (`make bench-triton` makes `.venv-triton`).
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import tritonclient.grpc as triton

from tests.service.daemons import wait_for
from tests.service.fake_core import DTYPES

SIMPLE = """
import triton_python_backend_utils as pb

class TritonPythonModel:
    def execute(self, requests):
        return [self.one(request) for request in requests]

    def one(self, request):
        a, b = (pb.get_input_tensor_by_name(request, f"INPUT{n}").as_numpy() for n in range(2))
        made = {"OUTPUT0": a + b, "OUTPUT1": a - b}
        wanted = request.requested_output_names()  # in no particular order
        return pb.InferenceResponse([pb.Tensor(name, value) for name, value in made.items() if name in wanted])
"""

IDENTITY = """
import triton_python_backend_utils as pb

class TritonPythonModel:
    def execute(self, requests):
        given = [pb.get_input_tensor_by_name(request, "x") for request in requests]
        return [pb.InferenceResponse([pb.Tensor.from_dlpack("output", x.to_dlpack())]) for x in given]
"""


def home_of(venv: Path) -> Path | None:
    """pytriton's folder in ``venv``, None without the wheel."""
    return next(iter(sorted(venv.glob("lib/python*/site-packages/pytriton"))), None)


def _tensors(kind: str, names: list[str], dtype: str, dims: str) -> str:
    listed = ", ".join(f'{{ name: "{name}" data_type: TYPE_{dtype} dims: {dims} }}' for name in names)
    return f"{kind} [{listed}]\n"


def _write(models: Path, name: str, tensors: str, code: str) -> None:
    version = models / name / "1"
    version.mkdir(parents=True)
    head = f'name: "{name}"\nbackend: "python"\nmax_batch_size: 0\ninstance_group [{{ count: 1 kind: KIND_CPU }}]\n'
    (version.parent / "config.pbtxt").write_text(head + tensors)
    (version / "model.py").write_text(code)


def _repository(models: Path) -> None:
    ins, outs = ["INPUT0", "INPUT1"], ["OUTPUT0", "OUTPUT1"]
    dims = "[-1, 16]"
    _write(models, "simple", _tensors("input", ins, "INT32", dims) + _tensors("output", outs, "INT32", dims), SIMPLE)
    for dtype in DTYPES:
        tensors = _tensors("input", ["x"], dtype, "[-1, -1]") + _tensors("output", ["output"], dtype, "[-1, -1]")
        _write(models, f"identity_{dtype.lower()}", tensors, IDENTITY)


@contextlib.contextmanager
def serving(home: Path, scratch: Path) -> Iterator[str]:
    """Yields ``host:port``; the process and its shared memory are gone afterwards."""
    _repository(scratch / "models")
    backends = scratch / "backends"
    shutil.copytree(home / "tritonserver" / "backends", backends)
    stub = home / "tritonserver" / "python_backend_stubs" / f"{sys.version_info.major}.{sys.version_info.minor}"
    shutil.copy2(stub / "triton_python_backend_stub", backends / "python")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    libraries = f"{home.parent / 'nvidia_pytriton.libs'}:{Path(sys.base_prefix) / 'lib'}"
    path = f"{home.parents[3] / 'bin'}:{os.environ['PATH']}"
    command = [str(home / "tritonserver" / "bin" / "tritonserver"), "--model-repository", str(scratch / "models")]
    command += ["--backend-directory", str(backends), "--allow-http", "false", "--allow-metrics", "false"]
    command += ["--grpc-address", "127.0.0.1", "--grpc-port", str(port)]
    command += ["--model-control-mode", "explicit", "--load-model", "*", "--exit-timeout-secs", "3"]
    before = set(os.listdir("/dev/shm"))
    with (scratch / "log").open("w") as log:
        environment = os.environ | {"LD_LIBRARY_PATH": libraries, "PATH": path, "PYTHONNOUSERSITE": "1"}
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    try:
        with triton.InferenceServerClient(f"127.0.0.1:{port}") as client:
            wait_for(lambda: _ready(server, client), "tritonserver to be ready", 60, every=0.2)
        yield f"127.0.0.1:{port}"
    finally:
        server.terminate()
        try:
            server.wait(30)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait(10)
        for name in set(os.listdir("/dev/shm")) - before:
            if name.startswith("triton_python_backend_shm"):
                Path("/dev/shm", name).unlink(missing_ok=True)


def _ready(server: subprocess.Popen[bytes], client: triton.InferenceServerClient) -> bool:
    assert server.poll() is None, "tritonserver has exited"
    with contextlib.suppress(triton.InferenceServerException):
        return client.is_server_ready() and client.is_model_ready("simple")
    return False
