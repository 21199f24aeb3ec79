"""RepositoryModelLoad's parameters as a LoadRequest, and a model's name remembered past its Unload."""

import json

import pytest

from coordinator.catalog import Catalog, ModelVersion
from coordinator.desired import DesiredState
from coordinator.errors import InvalidArgument
from coordinator.inference_repository import load_request
from protos.inference import message
from protos.tensor_parallel.v1 import coordinator_pb2 as pb


def request(name="llama", **config):
    made = message("RepositoryModelLoadRequest")(model_name=name)
    if config:
        made.parameters["config"].string_param = json.dumps(config)
    return made


def test_a_name_alone():
    assert load_request(request()) == pb.LoadRequest(name="llama")


def test_a_configuration():
    text = {name: {"string_value": value} for name, value in {"path": "llama-7b", "version": "3", "kind": "hf"}.items()}
    batching = {"preferred_batch_size": [4, 32], "max_queue_delay_microseconds": 500}
    load = load_request(request(parameters=text, max_batch_size=64, dynamic_batching=batching, backend="python"))
    assert (load.path, load.version, load.options.kind) == ("llama-7b", "3", "hf")
    assert load.options.batching == pb.BatchingOptions(
        max_batch_size=64, max_joined_rows=32, max_delay_microseconds=500
    )


@pytest.mark.parametrize(
    ("parameter", "choice", "value", "says"),
    [
        ("file:1/model.py", "bytes_param", b"import os", "model root"),
        ("colour", "string_param", "red", "unknown"),
        ("config", "int64_param", 3, "string_param"),
        ("config", "string_param", "{", "no model configuration"),
        ("config", "string_param", '{"max_batch_size": -1}', "negative"),
        ("config", "string_param", '{"max_batch_size": "many"}', "no model configuration"),
    ],
)
def test_what_would_be_dropped_is_refused(parameter, choice, value, says):
    made = request()
    setattr(made.parameters[parameter], choice, value)
    with pytest.raises(InvalidArgument, match=says):
        load_request(made)


def test_a_model_needs_a_name():
    with pytest.raises(InvalidArgument, match="name"):
        load_request(request(name=""))


def test_what_was_unloaded_is_known_after_a_restart(tmp_path):
    options = pb.LoadOptions(kind="hf", dtype="bfloat16")
    catalog = Catalog()
    catalog.note_unloaded(ModelVersion("llama", "4", "llama-7b", options))
    first = DesiredState(tmp_path)
    first.save([], 2, catalog.unloaded.values())
    first.close()
    second = DesiredState(tmp_path)
    assert second.load(2) == []
    second.close()
    (entry,) = second.unloaded
    assert (entry.name, entry.version, entry.path, entry.options) == ("llama", "4", "llama-7b", options)


def test_not_every_name_is_remembered_for_ever():
    catalog = Catalog()
    for n in range(1000):
        catalog.note_unloaded(ModelVersion(f"m{n}", "1", "p", pb.LoadOptions()))
    assert len(catalog.unloaded) < 300
    assert catalog.last("m999") is not None
    assert catalog.last("m0") is None
