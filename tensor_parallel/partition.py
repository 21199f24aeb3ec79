"""How one dimension is divided among ranks: as evenly as possible, the first ranks take the remainder, never padded."""

from itertools import accumulate

from tensor_parallel.errors import ConfigError


def split_sizes(size: int, world_size: int) -> tuple[int, ...]:
    """How many of ``size`` elements each rank holds: ``split_sizes(10, 4) == (3, 3, 2, 2)``, as ``tensor_split``."""
    share, remainder = divmod(size, world_size)
    return tuple(share + (rank < remainder) for rank in range(world_size))


def split_offsets(sizes: tuple[int, ...]) -> tuple[int, ...]:
    """Where each rank's part starts: ``split_offsets((3, 3, 2, 2)) == (0, 3, 6, 8)``."""
    return tuple(accumulate(sizes[:-1], initial=0))


def split_range(size: int, world_size: int, rank: int) -> tuple[int, int]:
    """``(start, stop)`` of ``rank``'s part of a dimension of ``size`` elements."""
    share, remainder = divmod(size, world_size)
    start = rank * share + min(rank, remainder)
    return start, start + share + (rank < remainder)


def check_rank(rank: int, world_size: int) -> None:
    """Raise :class:`ConfigError` unless ``rank`` is a place in a group of ``world_size``."""
    if world_size < 1:
        raise ConfigError(f"world_size must be at least 1, got {world_size}")
    if not 0 <= rank < world_size:
        raise ConfigError(f"rank must be in [0, {world_size}) for world_size {world_size}, got {rank}")
