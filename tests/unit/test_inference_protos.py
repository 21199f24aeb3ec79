"""Our Open Inference descriptors against those that the real client ships: same names, numbers, types, labels."""

import subprocess
import sys

import pytest
from tritonclient.grpc import model_config_pb2, service_pb2

from protos import inference

LEFT_OUT_METHODS = {"TraceSetting", "LogSettings"}
LEFT_OUT_FIELDS = {("ModelStatistics", "response_stats")}


def messages(file):
    found = {}

    def walk(descriptor):
        found[descriptor.full_name] = descriptor
        for nested in descriptor.nested_types:
            walk(nested)

    for descriptor in file.message_types_by_name.values():
        walk(descriptor)
    return found


def fields(descriptor):
    return {
        field.name: (
            field.number,
            field.type,
            field.is_repeated,
            field.message_type.full_name if field.message_type else None,
            field.enum_type.full_name if field.enum_type else None,
            field.containing_oneof.name if field.containing_oneof else None,
        )
        for field in descriptor.fields
    }


THEIRS = messages(service_pb2.DESCRIPTOR) | messages(model_config_pb2.DESCRIPTOR)
OURS = {
    name: descriptor
    for file in ("protos/inference/grpc_service.proto", "protos/inference/model_config.proto")
    for name, descriptor in messages(inference.pool.FindFileByName(file)).items()
}


@pytest.mark.parametrize("name", sorted(OURS))
def test_every_message_is_theirs(name):
    theirs = fields(THEIRS[name])
    for field, facts in fields(OURS[name]).items():
        assert theirs[field] == facts, f"{name}.{field}"


def test_messages_of_the_service_lack_nothing_unlisted():
    lacking = {
        (name.removeprefix("inference."), field)
        for name, descriptor in messages(inference.pool.FindFileByName("protos/inference/grpc_service.proto")).items()
        for field in fields(THEIRS[name]).keys() - fields(descriptor).keys()
    }
    assert lacking == LEFT_OUT_FIELDS


def test_enums_are_theirs():
    for name in ("DataType", "ModelInstanceGroup.Kind"):
        ours = inference.pool.FindEnumTypeByName(f"inference.{name}")
        theirs = model_config_pb2.DESCRIPTOR.pool.FindEnumTypeByName(f"inference.{name}")
        assert {v.name: v.number for v in ours.values} == {v.name: v.number for v in theirs.values}


def test_methods_are_theirs():
    def methods(service):
        return {
            method.name: (
                method.input_type.full_name,
                method.output_type.full_name,
                method.client_streaming,
                method.server_streaming,
            )
            for method in service.methods
        }

    theirs = methods(service_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"])
    ours = methods(inference.service)
    assert {name: theirs[name] for name in ours} == ours
    assert theirs.keys() - ours.keys() == LEFT_OUT_METHODS


def test_bytes_cross_between_the_two_in_one_process():
    theirs = service_pb2.ModelInferRequest(model_name="mlp", id="7", raw_input_contents=[b"abc"])
    theirs.parameters["timeout"].int64_param = 5
    theirs.inputs.add(name="x", datatype="UINT8", shape=[3])
    ours = inference.message("ModelInferRequest").FromString(theirs.SerializeToString())
    assert ours.raw_input_contents[0] == b"abc"
    assert service_pb2.ModelInferRequest.FromString(ours.SerializeToString()) == theirs


def test_order_of_imports_does_not_matter():
    code = "import protos.inference, tritonclient.grpc; protos.inference.message('ModelInferRequest')"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_an_unknown_message_is_refused():
    with pytest.raises(KeyError):
        inference.message("Nothing")
