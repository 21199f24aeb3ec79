"""GPU tensors over a backend for CPU tensors: copied to the host, and what comes back copied to the GPU.

For where NCCL cannot be: several ranks on one GPU, which it refuses, or GPUs that it does not know. Slow, and complete:
a collective returns once it has run, so that a lost peer is an error here and not a kernel that never ends.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from tensor_parallel.group import Backend


class StagedBackend:
    """``inner``'s collectives, of tensors of any device."""

    def __init__(self, inner: Backend) -> None:
        self.name, self.rank, self.world_size = inner.name, inner.rank, inner.world_size
        self._inner = inner

    def all_reduce_sum_(self, tensor: Tensor) -> Tensor:
        return tensor.copy_(self._inner.all_reduce_sum_(tensor.cpu()))

    def all_gather(self, tensor: Tensor, sizes: Sequence[int], dim: int) -> Tensor:
        return self._inner.all_gather(tensor.cpu(), sizes, dim).to(tensor.device)

    def reduce_scatter_sum(self, tensor: Tensor, sizes: Sequence[int], dim: int) -> Tensor:
        return self._inner.reduce_scatter_sum(tensor.cpu(), sizes, dim).to(tensor.device)

    def broadcast_(self, tensor: Tensor, src: int) -> Tensor:
        return tensor.copy_(self._inner.broadcast_(tensor.cpu(), src))

    def barrier(self) -> None:
        self._inner.barrier()

    def abort(self, reason: str) -> None:
        self._inner.abort(reason)

    def check(self) -> None:
        self._inner.check()

    def close(self) -> None:
        self._inner.close()
