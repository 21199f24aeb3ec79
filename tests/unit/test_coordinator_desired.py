import json
import multiprocessing
import os
import signal

import pytest

from coordinator.catalog import Digests, ModelVersion
from coordinator.config import ConfigError
from coordinator.desired import DesiredState
from protos.tensor_parallel.v1 import coordinator_pb2 as pb


def entry(**changes):
    options = pb.LoadOptions(kind="hf", dtype="bfloat16", batching=pb.BatchingOptions(max_joined_rows=8))
    made = ModelVersion("m", "3", "a/path", options, digests=Digests("s", "p", ("w0", "w1")))
    for name, value in changes.items():
        setattr(made, name, value)
    return made


def test_what_was_saved_is_restored(tmp_path):
    state = DesiredState(tmp_path / "state")
    assert state.load(2) is None
    state.save([entry(), entry(name="n", digests=None)], 2)
    first, second = state.load(2)
    assert (first.name, first.version, first.path) == ("m", "3", "a/path")
    assert first.options == entry().options
    assert first.digests == Digests("s", "p", ("w0", "w1"))
    assert first.served
    assert not second.served
    state.save([], 2)
    assert state.load(2) == []


def test_digests_of_another_number_of_ranks_say_nothing(tmp_path):
    state = DesiredState(tmp_path)
    state.save([entry()], 2)
    assert state.load(4)[0].digests is None


def test_without_a_directory_nothing_is_kept():
    state = DesiredState(None)
    state.save([entry()], 2)
    assert state.load(2) is None


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": 2, "models": []}', '{"format": 1, "models": [{}]}'])
def test_a_file_that_is_none_of_ours_stops_the_start(tmp_path, text):
    (tmp_path / "desired.json").write_text(text)
    with pytest.raises(ConfigError, match=r"desired\.json"):
        DesiredState(tmp_path).load(2)


def test_a_directory_serves_one_coordinator(tmp_path):
    first = DesiredState(tmp_path)
    with pytest.raises(ConfigError, match="in use by another coordinator"):
        DesiredState(tmp_path)
    first.close()
    DesiredState(tmp_path).close()


def _save_for_ever(directory, started):
    state = DesiredState(directory)
    models = [entry(name=f"m{n}") for n in range(50)]
    while True:
        state.save(models, 2)
        started.set()


def test_a_kill_at_any_moment_leaves_a_whole_file_and_no_lock(tmp_path):
    context = multiprocessing.get_context("spawn")
    started = context.Event()
    writer = context.Process(target=_save_for_ever, args=(tmp_path, started))
    writer.start()
    assert started.wait(20)
    os.kill(writer.pid, signal.SIGKILL)
    writer.join(10)
    state = DesiredState(tmp_path)
    assert [model.name for model in state.load(2)] == [f"m{n}" for n in range(50)]
    assert json.loads(state.path.read_text())["format"] == 1
