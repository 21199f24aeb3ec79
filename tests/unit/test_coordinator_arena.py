import fcntl
import gc
import mmap
import os
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator import arena as arenas
from coordinator.arena import Arena, Lease
from coordinator.errors import ResourceExhausted


def free_bytes(arena):
    return {segment.number: segment.free for segment in arena.segments}


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 5000), st.booleans(), st.integers(0, 9)), max_size=60))
def test_places_never_overlap_and_all_come_back(steps):
    arena = Arena(2)
    held = []
    for size, shared, victim in steps:
        place = arena.take(size, shared=shared)
        for other in held:
            if other.segment is place.segment:
                assert place.offset + place.size <= other.offset or other.offset + other.size <= place.offset
        assert place.size >= size
        assert place.offset % arenas.ALIGNMENT == 0
        held.append(place)
        if victim < len(held):
            arena.give_back(held.pop(victim))
    for place in held:
        arena.give_back(place)
    assert free_bytes(arena) == {segment.number: [(0, segment.size)] for segment in arena.segments}
    arena.close()


def test_inputs_are_shared_and_outputs_each_ranks_own():
    arena = Arena(3)
    inputs, outputs = arena.take(100, shared=True).segment, arena.take(100, shared=False).segment
    assert len(set(inputs.descriptors)) == 1
    assert len(set(outputs.descriptors)) == 3
    assert len(inputs.descriptors) == len(outputs.memory) == 3
    arena.close()


def test_no_segment_can_be_shrunk():
    arena = Arena(1)
    (descriptor,) = arena.take(10, shared=True).segment.descriptors
    seals = fcntl.fcntl(descriptor, 1034)
    assert seals & 2
    with pytest.raises(PermissionError):
        os.ftruncate(descriptor, 10)
    arena.close()


def test_a_larger_place_gets_a_larger_segment(monkeypatch):
    monkeypatch.setattr(arenas, "FIRST_SIZE", 4096)
    arena = Arena(1)
    arena.take(4000, shared=True)
    big = arena.take(10_000, shared=True)
    assert (big.segment.number, big.segment.size) == (1, 16384)
    monkeypatch.setattr(arenas, "MAX_SEGMENTS", 2)
    with pytest.raises(ResourceExhausted, match="used up"):
        arena.take(100_000, shared=True)
    with pytest.raises(ResourceExhausted, match="no memory"):
        Arena(1).take(1 << 62, shared=True)
    arena.close()


def test_a_lease_lives_as_long_as_anything_refers_to_it():
    arena = Arena(2)
    lease = Lease(arena)
    place = lease.put([b"abc", memoryview(b"def")], 6)
    assert place.segment.memory[1][place.offset : place.offset + 6] == b"abcdef"
    out = lease.expect(128)
    out.segment.memory[1][out.offset : out.offset + 5] = b"hello"
    view = lease.view(1, out.offset, 5)
    part = view[1:3]
    del lease, view
    gc.collect()
    assert bytes(part) == b"el"
    assert arena.take(64, shared=False).offset != out.offset
    del part
    assert arena.take(64, shared=False).offset == out.offset
    assert arena.take(64, shared=True).offset == place.offset
    arena.close()


def test_what_a_rank_says_of_its_place_is_checked():
    lease = Lease(Arena(1))
    with pytest.raises(ValueError, match="not where they were expected"):
        lease.view(0, 0, 1)
    place = lease.expect(64)
    for offset, size in [(place.offset - 64, 64), (place.offset, place.size + 1), (place.offset + place.size, 1)]:
        with pytest.raises(ValueError):
            lease.view(0, offset, size)


def test_large_places_give_their_pages_back(monkeypatch):
    monkeypatch.setattr(arenas, "RECLAIM", 1 << 20)
    arena = Arena(1)
    lease = Lease(arena)
    place = lease.put([b"x" * (8 << 20)], 8 << 20)
    descriptor, segment = place.segment.descriptors[0], place.segment
    assert os.fstat(descriptor).st_blocks * 512 >= 8 << 20
    del lease, place
    assert os.fstat(descriptor).st_blocks * 512 <= 2 * mmap.PAGESIZE
    assert segment.free == [(0, segment.size)]
    arena.close()


def test_views_outlive_the_arena():
    arena = Arena(1)
    lease = Lease(arena)
    place = lease.expect(64)
    view = lease.view(0, place.offset, 64)
    before = len(os.listdir("/proc/self/fd"))
    arena.close()
    assert len(os.listdir("/proc/self/fd")) == before - 1
    del arena, lease
    assert bytes(view) == bytes(64)


def test_an_input_written_in_place_is_adopted_and_kept():
    arena = Arena(2)
    room = Lease(arena).room(4096)
    room[:] = b"7" * 4096
    lease = Lease(arena)
    place = lease.adopt(room)
    assert bytes(place.segment.memory[0][place.offset : place.offset + 4096]) == b"7" * 4096
    segment = place.segment
    del room, place
    assert segment.free != [(0, segment.size)]
    del lease
    assert segment.free == [(0, segment.size)]


def test_what_is_no_whole_room_of_this_arena_is_not_adopted():
    arena = Arena(1)
    lease = Lease(arena)
    room = Lease(arena).room(4096)
    assert lease.adopt(room[:2048]) is None
    assert lease.adopt(Lease(Arena(1)).room(64)) is None
    assert lease.adopt(lease.view(0, lease.expect(64).offset, 64)) is None
    assert lease.adopt(b"x") is None


def test_a_place_dropped_on_another_thread_is_free_for_the_next_taker():
    arena = Arena(1)
    rooms = [Lease(arena).room(64)]
    segment = arena.segments[0]
    thread = threading.Thread(target=rooms.clear)
    thread.start()
    thread.join()
    assert segment.free == [(64, segment.size - 64)]
    assert arena.take(segment.size, shared=True).segment is segment
