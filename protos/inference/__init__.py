"""The Open Inference Protocol's messages, in a descriptor pool of their own.

The default pool refuses a second ``inference`` package, so ordinary generated modules could not live beside
``tritonclient``'s or KServe's in one process.  ``pool`` holds the
descriptors, ``message("ModelInferRequest")`` is a class.
"""

from __future__ import annotations

from importlib import resources

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.descriptor import ServiceDescriptor
from google.protobuf.message import Message

PACKAGE = "inference"
SERVICE_NAME = f"{PACKAGE}.GRPCInferenceService"
_DESCRIPTORS = "descriptors.binpb"


def _load() -> descriptor_pool.DescriptorPool:
    source = resources.files(__name__) / _DESCRIPTORS
    if not source.is_file():
        raise ImportError(f"{source} is missing: compile the protos with `python protos/build_stubs.py`")
    loaded = descriptor_pool.DescriptorPool()
    for file in descriptor_pb2.FileDescriptorSet.FromString(source.read_bytes()).file:
        loaded.Add(file)
    return loaded


pool = _load()
service: ServiceDescriptor = pool.FindServiceByName(SERVICE_NAME)


def message(name: str) -> type[Message]:
    """The class of ``inference.<name>``; raises KeyError when there is none."""
    return message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{PACKAGE}.{name}"))
