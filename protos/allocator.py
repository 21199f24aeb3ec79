"""Keeps freed memory for the next message, in glibc's allocator.

A buffer of megabytes is otherwise mapped for each message and given back after it, and the kernel clears every page of
it again: a third of the time that a 16 MiB tensor spends in a process. Here, because both daemons need it.
"""

from __future__ import annotations

import contextlib

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3  # malloc.h
MMAP_THRESHOLD = 32 << 20  # bytes; the most that glibc takes
TRIM_THRESHOLD = 256 << 20
TOP_PAD = 64 << 20  # address space; pages cost nothing until they are touched


def keep_freed_memory() -> None:
    """At most ``TRIM_THRESHOLD`` bytes at the end of the heap stay this process's. Elsewhere than on glibc: nothing."""
    with contextlib.suppress(ImportError, MemoryError, OSError, AttributeError):  # importing it may be refused memory
        import ctypes

        library = ctypes.CDLL(None)
        library.gnu_get_libc_version  # noqa: B018  (others have a mallopt that does nothing)
        library.mallopt(_MMAP_THRESHOLD, MMAP_THRESHOLD)
        library.mallopt(_TRIM_THRESHOLD, TRIM_THRESHOLD)
        library.mallopt(_TOP_PAD, TOP_PAD)
