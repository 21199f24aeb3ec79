"""The tables from operation name to rule, and the decorators that fill them.

``RULES`` handle divided operands (any pending sums have been reduced). ``PARTIAL_RULES`` are tried first when an
operand is a
pending sum, for operations that commute with summation.
"""

from __future__ import annotations

from collections.abc import Callable

from tensor_parallel.planner.engine import Rule

RULES: dict[str, Rule] = {}
PARTIAL_RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a rule for operations by schema name, whatever their overload."""

    def register(function: Rule) -> Rule:
        for name in names:
            assert name not in RULES, f"two rules for {name}"
            RULES[name] = function
        return function

    return register


def partial_rule(*names: str) -> Callable[[Rule], Rule]:
    def register(function: Rule) -> Rule:
        for name in names:
            assert name not in PARTIAL_RULES, f"two partial rules for {name}"
            PARTIAL_RULES[name] = function
        return function

    return register
