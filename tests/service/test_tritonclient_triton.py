"""The same conformance checks against the real Triton: this service differs only where it is listed here, and why.

Runs where Triton is (`make bench-triton` makes `.venv-triton`, or TRITON_VENV names another place).
"""

import os
from pathlib import Path

import pytest

from tests.service.conformance import CHECKS, Env
from tests.service.triton_server import home_of, serving

VENV = Path(os.environ.get("TRITON_VENV") or Path(__file__).resolve().parents[2] / ".venv-triton")

# What Triton 2.51 does instead, by check.
DIFFERS = {
    # Triton lets these through; here they are INVALID_ARGUMENT, because a caller that sends them is mistaken.
    "too_many_raw_contents": "ignores the surplus",
    "typed_value_out_of_range": "wraps 200 to an INT8 of -56",
    "negative_timeout": "takes it for an enormous one",
    # Not served here.
    "classification_is_refused": "classifies",
    "settings_that_are_not_served": "answers with its trace and log settings",
    # Codes: INTERNAL is kept for our own faults.
    "bytes_that_are_no_message": "INTERNAL",
    "a_region_that_does_not_exist": "INTERNAL",
    "outputs_larger_than_their_part_of_a_region": "INTERNAL",
    "load_of_an_unknown_model": "INTERNAL",
    "load_with_a_bad_configuration": "INTERNAL",
    "statistics_of_an_unknown_model": "INVALID_ARGUMENT; here NOT_FOUND, as everywhere else",
    "unload_of_an_unknown_model": "OK",
    "cuda_regions": "INVALID_ARGUMENT without a GPU; here UNIMPLEMENTED",
    # More than Triton gives.
    "request_id_comes_back_in_trailing_metadata": "has no x-request-id",
    "request_id_is_made_up_where_none_is_given": "has no x-request-id",
    "the_messages_own_id_is_the_request_id": "has no x-request-id",
    "failures_carry_error_info": "has no google.rpc.ErrorInfo",
    "stream_failure_says_which_request_and_why": "has no status code beside the message",
    "stream_with_strict_errors_ends_with_the_status": "of this version knows no triton_grpc_error; later ones do",
    "requested_outputs_in_the_order_asked": "answers in the model's own order",
    "statistics_count_requests": "counts a request as one row where max_batch_size is 0",
}

pytestmark = [
    pytest.mark.skipif(home_of(VENV) is None, reason=f"no tritonserver in {VENV}: make bench-triton"),
    pytest.mark.timeout(120),
    pytest.mark.slow,
]


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    with serving(home_of(VENV), tmp_path_factory.mktemp("triton")) as address:
        yield address


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_triton_passes_or_differs_where_listed(target, check):
    env = Env(target)
    try:
        if check.__name__ in DIFFERS:
            with pytest.raises((AssertionError, KeyError, pytest.fail.Exception)):
                check(env)
        else:
            check(env)
    finally:
        env.close()


def test_nothing_is_listed_that_is_no_check():
    assert DIFFERS.keys() <= {check.__name__ for check in CHECKS}
