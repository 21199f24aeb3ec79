"""Which device this rank computes on, that it is the one it was told, and that nobody else has it."""

from __future__ import annotations

import errno
import resource
import socket
from dataclasses import dataclass

import torch

from shardd.config import Config
from shardd.environment import host_memory
from shardd.errors import StartError


class DeviceError(StartError):
    """The device asked for is not there, is another one, or is taken; the message is one line for the operator."""


@dataclass(frozen=True)
class Device:
    """``name`` is for people: ``cpu``, or ``cuda:0 (GPU-<uuid>)``. ``memory`` in bytes. ``claim`` holds the GPU."""

    torch: torch.device
    name: str
    memory: int
    claim: socket.socket | None = None

    def peak_bytes(self) -> int:
        """Most memory ever held: on a GPU what torch allocated there, on the CPU the process's resident set."""
        if self.torch.type == "cuda":
            return torch.cuda.max_memory_allocated(self.torch)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def works(self) -> bool:
        """Whether the device still computes: a CUDA context does not survive every kernel."""
        if self.torch.type != "cuda":
            return True
        try:
            torch.cuda.synchronize(self.torch)
            return int(torch.arange(4, device=self.torch).sum()) == 6
        except RuntimeError:
            return False


def choose_device(config: Config) -> Device:
    """The device that ``config`` names, claimed. Raises :class:`DeviceError`."""
    if config.device == "cpu" or (config.device == "auto" and not torch.cuda.is_available()):
        if config.gpu_uuid:
            raise DeviceError(f"--gpu-uuid: {config.gpu_uuid!r} is wanted, but no GPU is used")
        return Device(torch.device("cpu"), "cpu", host_memory())
    if not torch.cuda.is_available():
        raise DeviceError(f"--device: {config.device!r} is not there: torch {torch.__version__} sees no GPU")
    device = torch.device(config.device if ":" in config.device else f"cuda:{config.rank % torch.cuda.device_count()}")
    if device.index >= torch.cuda.device_count():
        raise DeviceError(f"--device: {config.device!r} is not there: {torch.cuda.device_count()} GPUs are visible")
    properties = torch.cuda.get_device_properties(device)
    uuid = normalise(str(properties.uuid))
    if config.gpu_uuid and normalise(config.gpu_uuid) != uuid:
        raise DeviceError(f"--gpu-uuid: {config.gpu_uuid!r} is wanted, but {device} is {uuid}")
    claim = None if config.allow_shared_gpu else claim_gpu(uuid)
    torch.cuda.set_device(device)
    return Device(device, f"{device} ({uuid})", properties.total_memory, claim)


def normalise(uuid: str) -> str:
    """``GPU-`` and the lower-case UUID, as nvidia-smi prints it; also of a part of a GPU (``MIG-``), which CUDA tells
    without saying that it is one."""
    return "GPU-" + uuid.lower().removeprefix("gpu-").removeprefix("mig-")


def claim_gpu(uuid: str) -> socket.socket:
    """Hold GPU ``uuid`` for as long as this process lives. Raises :class:`DeviceError` when another daemon has it.

    An abstract socket is the lock: the kernel frees it with the process, and daemons of one host share its namespace.
    """
    lock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
    try:
        lock.bind(f"\0shardd.gpu.{uuid}")
    except OSError as error:
        lock.close()
        if error.errno != errno.EADDRINUSE:
            raise
        raise DeviceError(
            f"{uuid} is used by another daemon; give each its own GPU (CUDA_VISIBLE_DEVICES) or pass --allow-shared-gpu"
        ) from None
    return lock
