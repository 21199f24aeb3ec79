"""The weight as the first factor: the same product, whatever the rows, the layout and the threads."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch.nn import functional

from tensor_parallel.group import Group
from tensor_parallel.planner import cpu_linear
from tensor_parallel.planner.codegen import generate
from tensor_parallel.planner.cpu_linear import FEWEST, MOST, linear, linear_features_first
from tensor_parallel.planner.program import Program, Ref, Step

ROWS = (0, 1, FEWEST - 1, FEWEST, 17, MOST[2], MOST[2] + 1, 100, MOST[1], MOST[1] + 1)


@pytest.fixture(params=(1, 2))
def threads(request) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture
def products(monkeypatch) -> list[int]:
    """The rows of the products that were made weight first."""
    made: list[int] = []
    original = cpu_linear._weight_first

    def counted(x, weight):
        product = original(x, weight)
        made.append(product.shape[1])
        return product

    monkeypatch.setattr(cpu_linear, "_weight_first", counted)
    return made


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("function", [linear, linear_features_first])
def test_any_number_of_rows(threads, products, function, bias):
    weight, bias = torch.randn(1280, 1024), torch.randn(1280) if bias else None
    for rows in ROWS:
        x = torch.randn(rows, 1024)
        found = function(x, weight, bias)
        torch.testing.assert_close(found, functional.linear(x, weight, bias), rtol=1e-5, atol=1e-4)
        if function is linear:
            assert found.is_contiguous()
    assert products == ([r for r in ROWS if FEWEST <= r <= MOST[threads]] if torch.backends.mkl.is_available() else [])


@pytest.mark.parametrize("function", [linear, linear_features_first])
def test_any_shape_layout_and_type(function):
    weight, bias = torch.randn(1280, 1024), torch.randn(1280)
    for x in (
        torch.randn(2, 5, 3, 1024),
        torch.randn(1024),
        torch.randn(1024, 20).t(),
        torch.randn(4, 1024, 8).transpose(1, 2),
        torch.randn(32, 2048)[:, ::2],
        torch.randn(1, 1024).expand(16, 1024),
    ):
        for kind in (torch.float32, torch.float64, torch.bfloat16):
            arguments = x.to(kind), weight.to(kind), bias.to(kind)
            found, wanted = function(*arguments), functional.linear(*arguments)
            assert found.dtype == kind
            torch.testing.assert_close(found, wanted, rtol=1e-5 if kind != torch.bfloat16 else 2e-2, atol=1e-4)


def test_a_layout_by_features_goes_from_one_product_to_the_next():
    """Nothing is transposed in between: the second product sees the first one's memory."""
    x, first, second = torch.randn(2, 8, 1024), torch.randn(1536, 1024), torch.randn(1024, 1536)
    hidden = linear_features_first(x, first)
    assert hidden.shape == (2, 8, 1536)
    flat = torch.relu(hidden).reshape(-1, 1536).t()
    assert flat.is_contiguous() == torch.backends.mkl.is_available()
    wanted = functional.linear(torch.relu(functional.linear(x, first)), second)
    torch.testing.assert_close(linear(torch.relu(hidden), second), wanted, rtol=1e-4, atol=1e-3)


aten = torch.ops.aten
LINEAR, RELU, SILU, MUL, ADD = (
    aten.linear.default,
    aten.relu.default,
    aten.silu.default,
    aten.mul.Tensor,
    aten.add.Tensor,
)
# Values: 0 the input, 1 a square weight, then each step's. Then the steps that may lay their product out by features.
LAYOUTS = {
    "a chain": ([(LINEAR, 0, 1), (RELU, 2), (LINEAR, 3, 1)], [4], {2}),
    "gated": ([(LINEAR, 0, 1), (SILU, 2), (LINEAR, 0, 1), (MUL, 3, 4), (LINEAR, 5, 1)], [6], {2, 4}),
    "gated by the input": ([(LINEAR, 0, 1), (MUL, 2, 0), (LINEAR, 3, 1)], [4], set()),
    "used twice": ([(LINEAR, 0, 1), (RELU, 2), (ADD, 3, 2), (LINEAR, 4, 1)], [5], set()),
    "squared": ([(LINEAR, 0, 1), (MUL, 2, 2), (LINEAR, 3, 1)], [4], set()),
    "an output too": ([(LINEAR, 0, 1), (RELU, 2), (LINEAR, 3, 1)], [4, 3], set()),
    "a residual": ([(LINEAR, 0, 1), (RELU, 2), (ADD, 0, 3)], [4], set()),
    "the weight of another": ([(LINEAR, 0, 1), (LINEAR, 0, 2)], [3], set()),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_only_products_that_feed_a_product_are_laid_out_by_features(name):
    made, outputs, free = LAYOUTS[name]
    steps = [Step(fn, tuple(Ref(a) for a in args), {}, 2 + i, "") for i, (fn, *args) in enumerate(made)]
    program = Program(2, [0], {"weight": 1}, {}, steps, [Ref(n) for n in outputs], {}, 2 + len(steps))
    x, weight = torch.randn(1024, 1024), torch.randn(1024, 1024) / 32
    x = x if name == "the weight of another" else x[:16]
    found = {}
    for recording in (True, False):
        forward, source = generate(program, 0, Group(0, 1), torch.device("cpu"), "test", record_entries=recording)
        lines = [line for line in source.splitlines() if "= linear_features_first_" in line]
        assert {int(line.split("=")[0].strip().removeprefix("v")) for line in lines} == (set() if recording else free)
        found[recording] = forward([x], [weight], [])[0]
    for one, other in zip(found[True], found[False], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
