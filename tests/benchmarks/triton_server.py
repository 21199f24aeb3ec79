"""The real Triton beside us: ``tritonserver`` and its python backend from the ``nvidia-pytriton`` wheel, without a GPU.

Needs a virtual environment of its own (``make bench-triton`` makes ``.venv-triton``): the wheel's python stub reads
arrays by the layout of numpy 1, and with numpy 2 every output is silently empty.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

CONFIG = """
name: "%(name)s"
backend: "python"
max_batch_size: 0
input [{ name: "x" data_type: TYPE_FP32 dims: [-1, %(width)d] }]
output [{ name: "output" data_type: TYPE_FP32 dims: [-1, %(width)d] }]
instance_group [{ count: 1 kind: KIND_CPU }]
"""

MODEL = """
import torch
import triton_python_backend_utils as pb

class TritonPythonModel:
    def initialize(self, args):
        torch.set_num_threads(%(threads)d)
        torch.manual_seed(0)
        self.model = torch.nn.Sequential(
            torch.nn.Linear(%(width)d, %(hidden)d), torch.nn.ReLU(), torch.nn.Linear(%(hidden)d, %(width)d)).eval()
        if "%(name)s" == "identity":
            self.model = lambda x: x + 0

    def execute(self, requests):
        answers = []
        with torch.inference_mode():
            for request in requests:
                x = torch.from_numpy(pb.get_input_tensor_by_name(request, "x").as_numpy())
                answers.append(pb.InferenceResponse([pb.Tensor("output", self.model(x).numpy())]))
        return answers
"""


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def _environment(venv: Path, package: Path) -> dict[str, str]:
    prefix = Path(sys.base_prefix) / "lib"
    libraries = [package.parent / "nvidia_pytriton.libs", prefix]
    return os.environ | {
        "LD_LIBRARY_PATH": ":".join(map(str, libraries)),
        "PATH": f"{venv / 'bin'}:{os.environ['PATH']}",
        "PYTHONNOUSERSITE": "1",
    }


@contextlib.contextmanager
def serving_mlp(venv: Path, *, width: int, hidden: int, threads: int, deadline: float = 60.0) -> Iterator[str]:
    """Serves ``Linear - ReLU - Linear`` as ``mlp``, and ``identity``; yields ``host:port``, and all is gone afterwards.

    Raises FileNotFoundError without the wheel, RuntimeError when the server does not come up.
    """
    packages = sorted(venv.glob("lib/python*/site-packages/pytriton"))
    if not packages:
        raise FileNotFoundError(f"no nvidia-pytriton in {venv}; run: make bench-triton")
    home = packages[0] / "tritonserver"
    shm_before = set(os.listdir("/dev/shm"))
    with tempfile.TemporaryDirectory() as scratch:
        values = {"width": width, "hidden": hidden, "threads": threads}
        repository = Path(scratch, "models")
        for name in ("mlp", "identity"):
            version = repository / name / "1"
            version.mkdir(parents=True)
            (version.parent / "config.pbtxt").write_text(CONFIG % (values | {"name": name}))
            (version / "model.py").write_text(MODEL % (values | {"name": name}))
        backends = Path(scratch, "backends")
        shutil.copytree(home / "backends", backends)
        stub = home / "python_backend_stubs" / f"{sys.version_info.major}.{sys.version_info.minor}"
        shutil.copy2(stub / "triton_python_backend_stub", backends / "python")
        port = _free_port()
        command = [str(home / "bin" / "tritonserver"), "--model-repository", str(repository)]
        command += ["--backend-directory", str(backends), "--allow-http", "false", "--allow-metrics", "false"]
        command += ["--grpc-address", "127.0.0.1", "--grpc-port", str(port)]
        log = Path(scratch, "log")
        with log.open("w") as stream:
            server = subprocess.Popen(
                command, env=_environment(venv, packages[0]), stdout=stream, stderr=stream, start_new_session=True
            )
        try:
            _wait_until_ready(server, port, log, deadline)
            yield f"127.0.0.1:{port}"
        finally:
            server.terminate()
            try:
                server.wait(20)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()
            for name in set(os.listdir("/dev/shm")) - shm_before:
                if name.startswith("triton_python_backend_shm"):
                    Path("/dev/shm", name).unlink(missing_ok=True)


def _wait_until_ready(server: subprocess.Popen[bytes], port: int, log: Path, deadline: float) -> None:
    import tritonclient.grpc as triton

    end = time.monotonic() + deadline
    with triton.InferenceServerClient(f"127.0.0.1:{port}") as client:
        while time.monotonic() < end and server.poll() is None:
            with contextlib.suppress(triton.InferenceServerException):
                if client.is_model_ready("mlp") and client.is_model_ready("identity"):
                    return
            time.sleep(0.2)
    raise RuntimeError(f"tritonserver did not come up:\n{log.read_text()[-2000:]}")
