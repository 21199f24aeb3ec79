"""Every backend's results, bit by bit, over real processes."""

from itertools import accumulate

import pytest
import torch
from torch import Tensor

from tensor_parallel.backends import form, shm
from tensor_parallel.backends.shm_library import load_library
from tensor_parallel.backends.shm_pure import usable
from tensor_parallel.errors import CollectiveMismatch, ConfigError
from tests.multiprocess.ranks import Place, on_ranks

needs_library = pytest.mark.skipif(load_library() is None, reason="the compiled part is not built on this machine")
needs_x86 = pytest.mark.skipif(not usable(), reason="the part in Python is for x86-64 only")
KINDS = [
    pytest.param("gloo"),
    pytest.param("shm", marks=needs_library),
    pytest.param("pure", marks=needs_x86),
]

NARROW_FLOATS = (torch.float16, torch.bfloat16, torch.float8_e4m3fn)
DTYPES = (
    torch.float32,
    torch.float64,
    *NARROW_FLOATS,
    torch.int8,
    torch.uint8,
    torch.int16,
    torch.uint16,
    torch.int32,
    torch.int64,
    torch.complex64,
)


def values(shape: tuple[int, ...], dtype: torch.dtype, rank: int) -> Tensor:
    """What ``rank`` contributes; any rank can compute it."""
    generator = torch.Generator().manual_seed(100 + rank)
    if dtype.is_complex:
        return torch.randn(shape, generator=generator, dtype=torch.complex128).to(dtype)
    if dtype.is_floating_point:
        return torch.randn(shape, generator=generator, dtype=torch.float64).mul(3).to(dtype)
    return torch.randint(0, 40, shape, generator=generator).to(dtype)


def summed(parts: list[Tensor]) -> Tensor:
    """The sum in rank order, narrow types in a wider one with a single rounding."""
    dtype = parts[0].dtype
    wide = torch.float32 if dtype in NARROW_FLOATS else torch.int64 if dtype == torch.uint16 else dtype
    total = parts[0].to(wide)
    for part in parts[1:]:
        total = total + part.to(wide)
    return total.to(dtype)


def same_bits(got: Tensor, wanted: Tensor) -> bool:
    raw = [tensor.contiguous().view(-1).view(torch.uint8) for tensor in (got, wanted)]
    return got.shape == wanted.shape and got.dtype == wanted.dtype and torch.equal(*raw)


def assert_sum(kind: str, got: Tensor, wanted: Tensor) -> None:
    """Shared memory promises the bits; TCP the value, rounded at each step of narrow types."""
    if kind != "gloo":
        assert same_bits(got, wanted), (got, wanted)
    elif wanted.dtype.itemsize > 1 or not wanted.dtype.is_floating_point:
        tolerance = {"rtol": 3e-2, "atol": 3e-1} if wanted.dtype in NARROW_FLOATS else {}
        torch.testing.assert_close(got, wanted, **tolerance)


def splits(length: int, world_size: int) -> list[list[int]]:
    even = [length // world_size + (rank < length % world_size) for rank in range(world_size)]
    return [even, [length] + [0] * (world_size - 1)]


def reduce_everything(place: Place, kind: str) -> None:
    backend = place.group(kind).backend
    for dtype in DTYPES:
        for shape in ((), (0,), (1,), (5,), (3, 7, 11), (70_001,)):
            parts = [values(shape, dtype, rank) for rank in range(place.world_size)]
            mine = parts[place.rank].clone()
            got = backend.all_reduce_sum_(mine)
            assert got.data_ptr() == mine.data_ptr()
            assert_sum(kind, got, summed(parts))


def gather_and_scatter_everything(place: Place, kind: str) -> None:
    backend = place.group(kind).backend
    for dtype in DTYPES:
        for shape, dim in (((3, 7, 5), 0), ((3, 7, 5), 1), ((3, 7, 5), 2), ((2, 3000), 1), ((3000, 2), 0), ((0, 4), 1)):
            for sizes in splits(shape[dim], place.world_size):
                start = list(accumulate(sizes, initial=0))[place.rank]
                parts = [values(shape, dtype, rank) for rank in range(place.world_size)]
                local = parts[0].narrow(dim, start, sizes[place.rank]).contiguous()
                assert same_bits(backend.all_gather(local, sizes, dim), parts[0])
                got = backend.reduce_scatter_sum(parts[place.rank].clone(), sizes, dim)
                assert_sum(kind, got, summed(parts).narrow(dim, start, sizes[place.rank]))


def broadcast_everything(place: Place, kind: str) -> None:
    backend = place.group(kind).backend
    for dtype in (*DTYPES, torch.bool):
        for source in range(place.world_size):
            tensor = values((1234,), dtype, place.rank)
            assert same_bits(backend.broadcast_(tensor, source), values((1234,), dtype, source))
    backend.barrier()


def through_small_buffers(place: Place, kind: str, seed_rounds: int) -> None:
    """Many chunks, and a random order of operations that every rank draws alike."""
    regular, shm.SLOT_BYTES = shm.SLOT_BYTES, 4096
    try:
        backend = place.form(kind, "small")
    finally:
        shm.SLOT_BYTES = regular
    generator = torch.Generator().manual_seed(7)
    for _ in range(seed_rounds):
        length = int(torch.randint(0, 9000, (), generator=generator))
        operation = int(torch.randint(0, 4, (), generator=generator))
        parts = [values((length,), torch.float32, rank) for rank in range(place.world_size)]
        sizes = splits(length, place.world_size)[0]
        start = list(accumulate(sizes, initial=0))[place.rank]
        mine = slice(start, start + sizes[place.rank])
        if operation == 0:
            assert same_bits(backend.all_reduce_sum_(parts[place.rank].clone()), summed(parts))
        elif operation == 1:
            assert same_bits(backend.all_gather(parts[1][mine].clone(), sizes, 0), parts[1])
        elif operation == 2:
            assert same_bits(backend.reduce_scatter_sum(parts[place.rank], sizes, 0), summed(parts)[mine])
        else:
            assert same_bits(backend.broadcast_(parts[place.rank].clone(), 1), parts[1])
    backend.close()


def bits_of_a_sum(place: Place, kind: str) -> bytes:
    tensor = torch.randn(50_003, generator=torch.Generator().manual_seed(place.rank)) * 1e3
    return bytes(place.group(kind).backend.all_reduce_sum_(tensor).numpy().tobytes())


def call_different_collectives(place: Place, kind: str) -> str:
    backend = place.form(kind, "mismatch")
    with pytest.raises(CollectiveMismatch) as caught:
        backend.all_reduce_sum_(torch.zeros(4 + place.rank))
    backend.close()
    return str(caught.value)


def refuse_bool(place: Place, kind: str) -> None:
    with pytest.raises(ValueError, match="bool"):
        place.group(kind).backend.all_reduce_sum_(torch.ones(3, dtype=torch.bool))


def automatic(place: Place) -> str:
    backend = place.form("auto", "automatic")
    backend.close()
    return backend.name


def automatic_when_one_rank_shares_no_memory(place: Place) -> str:
    original = form.load_library
    if place.rank == 1:
        form.load_library = lambda: None
    try:
        backend = place.form("auto", "mixed")
    finally:
        form.load_library = original
    backend.close()
    return backend.name


def shm_on_two_hosts(place: Place) -> None:
    from tensor_parallel.backends.shm_handshake import Host

    hosts = [Host(f"host{rank}", (0,)) for rank in range(place.world_size)]
    with pytest.raises(ConfigError, match="all ranks on one host"):
        shm.ShmBackend(place.store("apart"), place.rank, place.world_size, timeout=None, hosts=hosts)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("world_size", [2, 3])
def test_all_reduce_of_every_dtype_and_size(kind: str, world_size: int) -> None:
    on_ranks(world_size, reduce_everything, kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("world_size", [2, 3])
def test_all_gather_and_reduce_scatter_along_every_dim_with_even_uneven_and_empty_parts(
    kind: str, world_size: int
) -> None:
    on_ranks(world_size, gather_and_scatter_everything, kind)


@pytest.mark.parametrize("kind", KINDS)
def test_broadcast_from_every_rank(kind: str) -> None:
    on_ranks(3, broadcast_everything, kind)


@pytest.mark.parametrize("kind", KINDS[1:])
@pytest.mark.parametrize("world_size", [2, 4])
def test_shared_memory_in_many_chunks_and_any_order_of_operations(kind: str, world_size: int) -> None:
    on_ranks(world_size, through_small_buffers, kind, 60)


@pytest.mark.parametrize("kind", KINDS)
def test_a_sum_has_the_same_bits_on_every_rank(kind: str) -> None:
    bits = on_ranks(3, bits_of_a_sum, kind)
    assert bits[0] == bits[1] == bits[2]


@pytest.mark.parametrize("kind", KINDS[1:])
def test_ranks_in_different_collectives_are_told_so(kind: str) -> None:
    messages = on_ranks(2, call_different_collectives, kind)
    assert all("another shape" in message for message in messages)


@pytest.mark.parametrize("kind", KINDS)
def test_bool_cannot_be_summed(kind: str) -> None:
    on_ranks(2, refuse_bool, kind)


@needs_library
def test_auto_is_shared_memory_on_one_host() -> None:
    assert on_ranks(2, automatic) == ["shm", "shm"]


def test_auto_is_gloo_on_all_ranks_when_one_cannot_share_memory() -> None:
    assert on_ranks(3, automatic_when_one_rank_shares_no_memory) == ["gloo"] * 3


@needs_library
def test_shm_refuses_ranks_of_several_hosts() -> None:
    on_ranks(2, shm_on_two_hosts)
