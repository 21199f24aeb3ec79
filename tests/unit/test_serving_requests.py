"""Requests are refused by name before any rank starts on them; what may be left out is filled in."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tensor_parallel.checkpoint.constraints import Constraints
from tensor_parallel.errors import InvalidInput
from tensor_parallel.planner import InputSpec
from tensor_parallel.requests import RequestChecker
from tensor_parallel.serving import ServingOptions

CHECKER = RequestChecker(
    [
        InputSpec("input_ids", torch.int64, (-1, -1), (0, 99)),
        InputSpec("attention_mask", torch.int64, (-1, -1)),
        InputSpec("pixels", torch.float32, (-1, 3, 8)),
    ],
    Constraints(
        {"input_ids": ("batch", "length"), "attention_mask": ("batch", "length"), "pixels": ("images", 3, 8)},
        {"length": (1, 16)},
    ),
    {"attention_mask": ("input_ids", 1), "token_type_ids": ("input_ids", 0)},
)


def request(**changes: Tensor | None) -> dict[str, Tensor]:
    inputs: dict[str, Tensor | None] = {
        "input_ids": torch.tensor([[1, 2, 99], [0, 5, 6]]),
        "attention_mask": torch.ones(2, 3, dtype=torch.int64),
        "pixels": torch.zeros(4, 3, 8),
    }
    return {name: value for name, value in (inputs | changes).items() if value is not None}


def test_a_valid_request_passes() -> None:
    CHECKER.check(request())
    CHECKER.check(request(input_ids=torch.ones(1, 16).long(), attention_mask=torch.ones(1, 16).long()))


def test_an_optional_input_is_filled_in() -> None:
    assert CHECKER.optional == {"attention_mask"}  # of what the model takes
    CHECKER.check(request(attention_mask=None))
    full = CHECKER.complete(request(attention_mask=None))
    assert list(full) == ["input_ids", "attention_mask", "pixels"]
    assert torch.equal(full["attention_mask"], torch.ones(2, 3, dtype=torch.int64))


BAD: dict[str, tuple[str, dict[str, Any]]] = {
    "unknown": (
        "unknown input ids; the model takes input_ids, attention_mask .optional., pixels",
        {"ids": torch.ones(1)},
    ),
    "missing": ("input pixels is missing", {"pixels": None}),
    "missing what an optional one copies": ("input input_ids is missing", {"input_ids": None, "attention_mask": None}),
    "dtype": ("input input_ids has dtype int32, the model takes int64", {"input_ids": torch.ones(2, 3).int()}),
    "rank": (r"input pixels has shape \(3, 8\), the model takes \[any, 3, 8\]", {"pixels": torch.zeros(3, 8)}),
    "size": (r"input pixels has shape \(1, 3, 9\)", {"pixels": torch.zeros(1, 3, 9)}),
    "no rows": ("input pixels is empty", {"pixels": torch.zeros(0, 3, 8)}),
    "id too large": ("input input_ids holds 100, outside 0 to 99", {"input_ids": torch.full((2, 3), 100)}),
    "negative id": ("input input_ids holds -1, outside 0 to 99", {"input_ids": torch.full((2, 3), -1)}),
    "lengths differ": ("attention_mask has size 4 in dimension 1", {"attention_mask": torch.ones(2, 4).long()}),
    "too long": (
        "from 1 to 16",
        {"input_ids": torch.ones(2, 17).long(), "attention_mask": torch.ones(2, 17).long()},
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_a_bad_request_is_refused_by_name(what: str) -> None:
    reason, changes = BAD[what]
    with pytest.raises(InvalidInput, match=reason):
        CHECKER.check(request(**changes))


def test_an_empty_request_is_refused() -> None:
    with pytest.raises(InvalidInput, match="empty"):
        CHECKER.check({})


def test_serving_options_are_checked() -> None:
    assert ServingOptions.parse({}) == ServingOptions(verify=True, threads=None)
    assert ServingOptions.parse({"verify": False, "threads": 3}) == ServingOptions(verify=False, threads=3)
    for bad in ({"verfy": True}, {"verify": 1}, {"threads": 0}, {"threads": True}):
        with pytest.raises(InvalidInput):
            ServingOptions.parse(bad)


def test_values_are_looked_at_in_every_request_of_a_known_shape() -> None:
    CHECKER.check(request())
    for value in (100, -1):
        with pytest.raises(InvalidInput, match="outside 0 to 99"):
            CHECKER.check(request(input_ids=torch.full((2, 3), value)))
    CHECKER.check(request())
