"""What the shapes of a model's inputs must meet together, beyond each one's own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from tensor_parallel.checkpoint.pt2_guards import Guard
from tensor_parallel.errors import InvalidInput


@dataclass(frozen=True)
class Constraints:
    """Known sizes and the symbols of free ones by input, the range of each symbol, and conditions that relate them."""

    shapes: Mapping[str, Sequence[int | str]] = field(default_factory=dict)
    ranges: Mapping[str, tuple[int, int | None]] = field(default_factory=dict)
    guards: Sequence[Guard] = ()

    def check(self, sizes: Mapping[str, Sequence[int]]) -> None:
        """Raises :class:`InvalidInput` naming the input whose shape breaks a constraint, and the dimension."""
        seen: dict[str, tuple[int, str]] = {}
        for name, shape in self.shapes.items():
            got = sizes.get(name)
            if got is None:
                continue
            if len(got) != len(shape):
                raise InvalidInput(f"input {name} has {len(got)} dimensions, the model takes {len(shape)}")
            for dim, (size, expected) in enumerate(zip(got, shape, strict=True)):
                self._check_size(name, dim, size, expected, seen)
        for guard in self.guards:
            if not guard.holds(sizes):
                raise InvalidInput(
                    f"the inputs' shapes do not meet the condition the program was exported under: {guard.text}"
                )

    def _check_size(
        self, name: str, dim: int, size: int, expected: int | str, seen: dict[str, tuple[int, str]]
    ) -> None:
        if isinstance(expected, int):
            if size != expected:
                raise InvalidInput(f"input {name} has size {size} in dimension {dim}, the model takes {expected}")
            return
        low, high = self.ranges.get(expected, (0, None))
        if size < low or (high is not None and size > high):
            allowed = f"from {low} to {high}" if high is not None else f"at least {low}"
            raise InvalidInput(f"input {name} has size {size} in dimension {dim}, the model takes {allowed}")
        other, where = seen.setdefault(expected, (size, f"dimension {dim} of {name}"))
        if other != size:
            raise InvalidInput(
                f"input {name} has size {size} in dimension {dim}, but {where} has {other}: they must be equal"
            )
