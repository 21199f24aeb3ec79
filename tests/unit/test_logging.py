"""The coordinator's log lines: keys, order, context, secrets, libraries, a reader that is gone."""

import asyncio
import io
import json
import logging as stdlib

import pytest

from coordinator import logging


@pytest.fixture
def lines():
    stream = io.StringIO()
    before = stdlib.getLogger().handlers[:], stdlib.getLogger().level
    logging.configure("info", "auto", stream=stream)
    yield lambda: [json.loads(line) for line in stream.getvalue().splitlines()]
    stdlib.getLogger().handlers[:] = before[0]
    stdlib.getLogger().setLevel(before[1])
    logging.structlog.reset_defaults()


def test_one_json_object_a_line_with_the_fixed_keys_first(lines):
    logging.get_logger(generation=3).info("forward", seconds=0.5, model="mlp", text="two\nlines")
    (line,) = lines()
    assert list(line)[:4] == ["ts", "level", "event", "logger"]
    assert line["ts"].endswith("Z")
    assert (line["level"], line["event"], line["logger"]) == ("info", "forward", "coordinator")
    assert (line["generation"], line["model"], line["seconds"], line["text"]) == (3, "mlp", 0.5, "two\nlines")


def test_levels_below_the_threshold_are_dropped(lines):
    logging.get_logger().debug("load_progress")
    assert lines() == []


def test_bound_fields_follow_the_task_and_leave_with_it(lines):
    log = logging.get_logger()

    async def request(name):
        with logging.bound(request_id=name, model=None):
            await asyncio.create_task(inner())

    async def inner():
        await asyncio.sleep(0)
        log.info("forward")

    async def both():
        await asyncio.gather(request("a"), request("b"))

    asyncio.run(both())
    log.info("after")
    assert sorted(line.get("request_id", "") for line in lines()) == ["", "a", "b"]
    assert all("model" not in line for line in lines())


def test_exceptions_stay_on_one_line_and_secrets_out(lines):
    try:
        raise KeyError("x")
    except KeyError:
        logging.get_logger().exception("forward_failed", authorization="Bearer 123")
    (line,) = lines()
    assert "KeyError" in line["exception"]
    assert line["authorization"] == "(hidden)"


def test_library_messages_take_the_same_form(lines):
    stdlib.getLogger("grpc").warning("low %s", "memory")
    stdlib.getLogger("grpc").info("chatter")
    (line,) = lines()
    assert (line["event"], line["source"], line["message"]) == ("library", "grpc", "low memory")


def test_a_reader_that_has_gone_stops_nothing():
    stream = io.StringIO()
    try:
        logging.configure("info", "json", stream=stream)
        stream.close()
        logging.get_logger().info("still_here")
    finally:
        stdlib.getLogger().handlers[:] = []
        logging.structlog.reset_defaults()


def test_console_lines_name_the_event_and_hide_locals():
    stream = io.StringIO()
    try:
        logging.configure("info", "console", stream=stream)
        try:
            hidden_local = "s3cret" + "value"
            raise RuntimeError(len(hidden_local))
        except RuntimeError:
            logging.get_logger().exception("load_failed", model="mlp")
    finally:
        stdlib.getLogger().handlers[:] = []
        logging.structlog.reset_defaults()
    assert "load_failed" in stream.getvalue()
    assert "model=mlp" in stream.getvalue()
    assert "s3cretvalue" not in stream.getvalue()


@pytest.mark.parametrize(("level", "format"), [("loud", "json"), ("info", "xml")])
def test_unknown_level_or_format_is_refused(level, format):
    with pytest.raises(ValueError, match="is none of"):
        logging.configure(level, format)
