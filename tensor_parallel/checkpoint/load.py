"""Reading everything one rank holds: only its slices, by several threads, in the order of the files, straight into
place.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tensor_parallel.checkpoint.digest import combined_digest, content_digest
from tensor_parallel.checkpoint.expression import Compute
from tensor_parallel.checkpoint.lazy import LazyTensor
from tensor_parallel.checkpoint.memory import empty_weight
from tensor_parallel.checkpoint.prepared import PreparedMemory
from tensor_parallel.checkpoint.source import Source, shard_boxes
from tensor_parallel.checkpoint.transfer import Read, Staging, evaluate, run, split
from tensor_parallel.errors import CheckpointError, DoesNotFit, LoadCancelled
from tensor_parallel.planner.shard import Shard

BATCH_BYTES = 16 << 20
POLL_SECONDS = 0.05

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Loaded:
    """What a rank holds: its part of each tensor by name (tied names share one), its size, and a digest of its
    content.
    """

    tensors: dict[str, Tensor]
    nbytes: int
    digest: str


@dataclass
class _Held:
    """One distinct tensor of the rank, under all its names, while it is filled."""

    names: list[str]
    tensor: Tensor
    pending: int = 0
    content: str = ""


@dataclass
class _Work:
    """Some reads of neighbouring bytes, or one computed tensor."""

    items: list[tuple[_Held, Read | Compute]] = field(default_factory=list)
    nbytes: int = 0


def load_shards(
    source: Source,
    shards: Mapping[str, Shard],
    rank: int,
    *,
    device: torch.device,
    progress: Progress | None = None,
    cancelled: Callable[[], bool] | None = None,
    threads: int | None = None,
    memory: PreparedMemory | None = None,
) -> Loaded:
    """Read this rank's part of every tensor in ``shards`` onto ``device``.

    Memory beyond the result: one staging buffer of 8 MiB per thread, or, for a tensor that has to be computed from
    stored ones, those. ``progress(bytes_done, bytes_total)`` is called from this thread, of bytes held. ``threads``
    defaults to the number of cores, from 2 to 4. Tensors are cut from ``memory`` as far as it goes. Raises
    :class:`CheckpointError` naming a tensor that cannot be read, :class:`LoadCancelled`, and :class:`DoesNotFit` when
    memory does not suffice; in each case everything read is freed.
    """
    threads = threads or max(2, min(4, os.cpu_count() or 2))
    held = _allocate(source, shards, rank, device, memory or PreparedMemory(0))
    total = sum(_nbytes(one.tensor) for one in held)
    with _Pool(threads) as pool:
        works = _schedule(_items(source, held, shards, rank))
        pool.run(works, total, progress or (lambda done, total: None), cancelled or (lambda: False))
        pool.hash(held)
    contents = {name: (one.tensor.dtype, one.tensor.shape, one.content) for one in held for name in one.names}
    return Loaded({name: one.tensor for one in held for name in one.names}, total, combined_digest(contents))


def _allocate(
    source: Source, shards: Mapping[str, Shard], rank: int, device: torch.device, memory: PreparedMemory
) -> list[_Held]:
    memory.stop()
    values = source.tensors()
    distinct: dict[tuple[int, Shard], _Held] = {}
    for name, shard in shards.items():
        value = values.get(name)
        if value is None:
            raise CheckpointError(f"the plan holds tensor {name}, of which {source.path.name} knows nothing")
        key = (id(value), shard)
        if key in distinct:
            distinct[key].names.append(name)
            continue
        try:
            shape = shard.local_shape(value.shape, rank)
            prepared = memory.take(shape, value.dtype)
            tensor = empty_weight(shape, value.dtype, device) if prepared is None else prepared
        except (RuntimeError, MemoryError) as error:  # torch's host allocator raises a bare RuntimeError
            raise DoesNotFit(f"no memory for rank {rank}'s part of {name} on {device}: {error}") from error
        distinct[key] = _Held([name], tensor)
    memory.release()
    return list(distinct.values())


def _items(
    source: Source, held: Iterable[_Held], shards: Mapping[str, Shard], rank: int
) -> Iterator[tuple[_Held, Read | Compute]]:
    values = source.tensors()
    for one in held:
        shard, value = shards[one.names[0]], values[one.names[0]]
        if not isinstance(value, LazyTensor):
            one.tensor.copy_(shard.take(value, rank))
            continue
        position = 0
        for box in shard_boxes(value.node, shard, rank):
            out = one.tensor
            if shard.dim is not None:
                length = box[shard.dim][1] - box[shard.dim][0]
                out = out.narrow(shard.dim, position, length)
                position += length
            for job in value.node.jobs(box, out):
                for item in [job] if isinstance(job, Compute) else split(job):
                    one.pending += 1
                    yield one, item


def _schedule(items: Iterable[tuple[_Held, Read | Compute]]) -> list[_Work]:
    """Batches of reads in file order, then what has to be computed."""
    reads: list[tuple[_Held, Read]] = []
    works: list[_Work] = []
    for one, item in items:
        if isinstance(item, Read):
            reads.append((one, item))
        else:
            works.append(_Work([(one, item)], item.out.numel() * item.out.element_size()))
    ordered: list[_Work] = []
    for one, read in sorted(reads, key=lambda entry: entry[1].position):
        if not ordered or ordered[-1].nbytes + read.nbytes > BATCH_BYTES:
            ordered.append(_Work())
        ordered[-1].items.append((one, read))
        ordered[-1].nbytes += read.nbytes
    return ordered + works


class _Pool:
    """Worker threads with a staging buffer each. Any failure stops them all before their next read."""

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._executor = ThreadPoolExecutor(threads, thread_name_prefix="checkpoint")
        self._local = threading.local()
        self._lock = threading.Lock()
        self._stop = threading.Event()

    def __enter__(self) -> _Pool:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._executor.shutdown(wait=True, cancel_futures=True)

    def run(self, works: list[_Work], total: int, progress: Progress, cancelled: Callable[[], bool]) -> None:
        done = total - sum(work.nbytes for work in works)  # what needed no reading is there already
        progress(done, total)
        remaining = iter(works)
        running: dict[Future[None], int] = {}
        while True:
            if cancelled():
                raise LoadCancelled("the load was cancelled")
            for work in remaining:
                running[self._executor.submit(self._perform, work)] = work.nbytes
                if len(running) > 2 * self._threads:  # bounded: a cancelled load has little left to forget
                    break
            if not running:
                return
            finished, _ = wait(running, POLL_SECONDS, FIRST_COMPLETED)
            for future in finished:
                done += running.pop(future)
                future.result()
            if finished:
                progress(done, total)

    def hash(self, held: Iterable[_Held]) -> None:
        """Wait for what the workers have not hashed on the way: tensors that needed no reading."""
        for one, content in [
            (one, self._executor.submit(content_digest, one.tensor)) for one in held if not one.content
        ]:
            one.content = content.result()

    def _perform(self, work: _Work) -> None:
        if not hasattr(self._local, "staging"):
            self._local.staging = Staging()
        for one, item in work.items:
            if self._stop.is_set():
                return
            self._perform_one(one, item)
            with self._lock:
                one.pending -= 1
                last = one.pending == 0
            if last:  # its bytes are still warm
                one.content = content_digest(one.tensor)

    def _perform_one(self, one: _Held, item: Read | Compute) -> None:
        try:
            if isinstance(item, Compute):
                evaluate(item)
            else:
                run(item, self._local.staging)
        except CheckpointError as error:
            raise CheckpointError(f"tensor {one.names[0]}: {error}") from error
        except (torch.OutOfMemoryError, MemoryError) as error:
            raise DoesNotFit(f"no memory left while reading {one.names[0]}: {error}") from error


def _nbytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
