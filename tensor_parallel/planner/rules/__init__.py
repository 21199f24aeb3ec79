"""One rule per family of operations: given operands' placements, the result's placement and the local computation."""

from tensor_parallel.planner.rules import (
    attention,
    contraction,
    convolution,
    factories,
    indexing,
    movement,
    normalization,
    partial,
    pieces,
    pointwise,
    reduction,
    reshape,
)
from tensor_parallel.planner.rules.registry import PARTIAL_RULES, RULES

__all__ = [
    "PARTIAL_RULES",
    "RULES",
    "attention",
    "contraction",
    "convolution",
    "factories",
    "indexing",
    "movement",
    "normalization",
    "partial",
    "pieces",
    "pointwise",
    "reduction",
    "reshape",
]
