"""Listing and calling everything with nothing but reflection, as grpcurl does."""

import time

import grpc
import pytest
import tritonclient.grpc  # noqa: F401 - its own `inference` package must not get in the way
from google.protobuf import descriptor_pb2, descriptor_pool, json_format, message_factory
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2 as pb

from coordinator.reflection import V1, V1ALPHA, add_reflection
from protos.tensor_parallel.v1 import coordinator_pb2
from tests.service.fake_core import FakeServer

SERVICES = ("inference.GRPCInferenceService", "tensor_parallel.v1.Coordinator", "grpc.health.v1.Health")


class Curl:
    """A client that knows a target, a version of reflection, and JSON."""

    def __init__(self, target, version):
        self.channel = grpc.insecure_channel(target)
        self._ask = self.channel.stream_stream(
            f"/{version}/ServerReflectionInfo",
            request_serializer=pb.ServerReflectionRequest.SerializeToString,
            response_deserializer=pb.ServerReflectionResponse.FromString,
        )
        self.pool = descriptor_pool.DescriptorPool()
        self._known = set()

    def ask(self, **request):
        return next(iter(self._ask(iter([pb.ServerReflectionRequest(**request)]), timeout=20)))

    def list(self):
        return [service.name for service in self.ask(list_services="").list_services_response.service]

    def describe(self, symbol):
        """Fetches the symbol's file and all that it imports into our pool."""
        answer = self.ask(file_containing_symbol=symbol)
        assert answer.HasField("file_descriptor_response"), answer
        files = [
            descriptor_pb2.FileDescriptorProto.FromString(data)
            for data in answer.file_descriptor_response.file_descriptor_proto
        ]
        while files:
            file = next(f for f in files if set(f.dependency) <= self._known)
            files.remove(file)
            if file.name not in self._known:
                self.pool.Add(file)
                self._known.add(file.name)
        return self.pool.FindFileContainingSymbol(symbol)

    def call(self, service, method, request):
        self.describe(service)
        described = self.pool.FindServiceByName(service).methods_by_name[method]
        taken, given = (message_factory.GetMessageClass(t) for t in (described.input_type, described.output_type))
        function = self.channel.unary_unary(
            f"/{service}/{method}", request_serializer=taken.SerializeToString, response_deserializer=given.FromString
        )
        return json_format.MessageToDict(function(json_format.ParseDict(request, taken()), timeout=20))


@pytest.fixture(scope="module")
def server():
    def add(aio_server, _core):
        servicer = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(servicer, aio_server)
        add_reflection(aio_server, SERVICES)

    with FakeServer(handlers=[add]) as running:
        yield running


@pytest.fixture(params=[V1, V1ALPHA])
def curl(server, request):
    made = Curl(server.target, request.param)
    yield made
    made.channel.close()


def test_every_service_is_listed(curl):
    assert sorted(curl.list()) == sorted([*SERVICES, V1, V1ALPHA])


def test_every_listed_service_can_be_described(curl):
    for name in curl.list():
        curl.describe(name)
        assert curl.pool.FindServiceByName(name).methods


def test_inference_is_described_by_our_own_file(curl):
    assert curl.describe("inference.GRPCInferenceService").name == "protos/inference/grpc_service.proto"
    assert curl.describe("inference.ModelInferRequest").name == "protos/inference/grpc_service.proto"


def test_descriptions_are_complete(curl):
    curl.describe("tensor_parallel.v1.Coordinator")
    ours = coordinator_pb2.DESCRIPTOR.services_by_name["Coordinator"]
    assert [m.name for m in curl.pool.FindServiceByName(ours.full_name).methods] == [m.name for m in ours.methods]
    assert curl.pool.FindMessageTypeByName("tensor_parallel.v1.Tensor").fields_by_name["data"].number == 4


def test_calls_without_protos(curl):
    assert curl.call("inference.GRPCInferenceService", "ServerLive", {}) == {"live": True}
    assert curl.call("grpc.health.v1.Health", "Check", {}) == {"status": "SERVING"}
    answer = curl.call(
        "inference.GRPCInferenceService",
        "ModelInfer",
        {
            "modelName": "identity_fp32",
            "inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 2], "contents": {"fp32Contents": [1.5, -2.0]}}],
        },
    )
    assert answer["rawOutputContents"] == ["AADAPwAAAMA="]  # 1.5 and -2.0


def test_unknown_names_are_not_found(curl):
    for request in (
        {"file_containing_symbol": "no.such.Thing"},
        {"file_by_filename": "no/such/file.proto"},
        {"all_extension_numbers_of_type": "no.such.Thing"},
    ):
        answer = curl.ask(**request)
        assert answer.error_response.error_code == grpc.StatusCode.NOT_FOUND.value[0], request


def test_files_are_found_by_name(curl):
    answer = curl.ask(file_by_filename="protos/inference/model_config.proto")
    (data,) = answer.file_descriptor_response.file_descriptor_proto
    assert descriptor_pb2.FileDescriptorProto.FromString(data).package == "inference"


def test_extensions_of_a_message_of_either_pool(curl):
    for name in ("inference.ModelInferRequest", "tensor_parallel.v1.Tensor"):
        answer = curl.ask(all_extension_numbers_of_type=name)
        assert list(answer.all_extension_numbers_response.extension_number) == []
        assert answer.all_extension_numbers_response.base_type_name == name


def test_many_questions_on_one_stream(curl):
    asked = [pb.ServerReflectionRequest(list_services="") for _ in range(20)]
    began = time.monotonic()
    answers = list(curl._ask(iter(asked), timeout=20))
    assert len(answers) == 20
    assert time.monotonic() - began < 20


def test_health_messages_are_those_of_the_default_pool(server):
    with grpc.insecure_channel(server.target) as channel:
        answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=20)
    assert answer.status == health_pb2.HealthCheckResponse.SERVING
