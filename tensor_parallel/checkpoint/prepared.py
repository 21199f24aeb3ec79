"""Memory for weights, made ready while their model is planned.

The system gives a page when it is first written to: it clears it, and under a hypervisor that takes back what its
guests have freed, gets it from there, which takes ten times as long as reading a file that is cached (0.4 against 4
GB/s on the machine this was written on, where safetensors' reader, which reuses its memory, pays nothing). Planning
keeps one core busy for seconds; meanwhile a thread can write to pages, and reading finds them there.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
import threading
from collections.abc import Sequence
from types import TracebackType

import torch
from torch import Tensor

from tensor_parallel.checkpoint.memory import HUGE_PAGE_BYTES, advise_huge, available_bytes

_AT_ONCE = 16 << 20  # between looks at whether to stop; far fewer, and each would wait for the interpreter longer
_ALIGNMENT = 64  # what torch gives its own tensors
_MADV_DONTNEED = 4
_SMALLEST = 4 << 20  # what takes less than a millisecond is not worth a thread


class PreparedMemory:
    """``nbytes`` of host memory that a thread makes present from the moment this is entered until :meth:`stop`.

    ``size`` bytes, whole huge pages, lie from ``address`` on. Tensors are then cut from it with :meth:`take`; each
    keeps all of it alive, as a model's weights come and go together. What was not taken by the time of :meth:`release`
    is given back. With ``nbytes`` 0, or where the system refuses, there is nothing to take.
    """

    def __init__(self, nbytes: int) -> None:
        self.address = self.size = 0
        self.present = 0
        """Bytes that are there by now, and are this process's."""
        self._memory: mmap.mmap | None = None
        self._offset = self._used = 0
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        if nbytes < _SMALLEST or sys.platform != "linux":
            return
        size = -(-nbytes // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES
        try:
            memory = mmap.mmap(-1, size + HUGE_PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError:  # a limit on address space: whoever allocates next is told
            return
        address = torch.frombuffer(memory, dtype=torch.uint8).data_ptr()
        self._memory, self._offset = memory, -address % HUGE_PAGE_BYTES
        self.address, self.size = address + self._offset, size
        advise_huge(self.address, size)

    @classmethod
    def for_weights(
        cls, total_bytes: int, world_size: int, device: torch.device, *, besides: int = 0
    ) -> PreparedMemory:
        """One rank's share of a model of ``total_bytes``, less the ``besides`` that planning takes and gives back: both
        together then need no more than the weights will. None on a GPU, nor where this host, which may be that of all
        ranks, has no room for the whole model: whether it fits is for the plan to say."""
        available = available_bytes(device) if device.type == "cpu" else None
        if available is None or total_bytes > available:
            return cls(0)
        return cls(max(0, total_bytes // world_size - besides))

    def __enter__(self) -> PreparedMemory:
        if self._memory is not None:
            self._thread = threading.Thread(target=self._prepare, name="prepare-memory", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
        self.release()

    def stop(self) -> None:
        """Leave the rest to whoever writes there first."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def wait(self, seconds: float) -> None:
        """Until all is there, or so long."""
        if self._thread is not None:
            self._thread.join(seconds)

    def take(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor | None:
        """An uninitialised tensor with a storage of its own, or None when the rest is too small for it."""
        count = torch.Size(shape).numel()
        start = -(-self._used // _ALIGNMENT) * _ALIGNMENT
        if self._memory is None or count == 0 or start + count * dtype.itemsize > self.size:
            return None
        self._used = start + count * dtype.itemsize
        return torch.frombuffer(self._memory, dtype=dtype, count=count, offset=self._offset + start).view(list(shape))

    def release(self) -> None:
        """Give back what nobody has taken; nothing can be taken any more."""
        if self._memory is None:
            return
        kept = -(-self._used // mmap.PAGESIZE) * mmap.PAGESIZE
        if kept < self.size:
            rest = ctypes.c_void_p(self.address + kept), ctypes.c_size_t(self.size - kept)
            ctypes.CDLL(None).madvise(*rest, ctypes.c_int(_MADV_DONTNEED))
        self._memory = None

    def _prepare(self) -> None:
        """Writes, and not an advice to populate: that would keep every other thread from mapping memory meanwhile."""
        assert self._memory is not None
        memory = torch.frombuffer(self._memory, dtype=torch.uint8, count=self.size, offset=self._offset)
        for start in range(0, self.size, _AT_ONCE):
            if self._stop.is_set():
                return
            stop = min(start + _AT_ONCE, self.size)
            memory[start : stop : mmap.PAGESIZE].zero_()
            self.present = stop
