"""The protocol's RepositoryModelLoad as our own LoadRequest.

Triton loads a model by its name alone; so does this service for one that it has loaded before.  Where it comes from the
first time (and how it is to be loaded) is told by Triton's ``config`` parameter, a model configuration in JSON:
``{"parameters": {"path": {"string_value": "llama-7b"}}, "max_batch_size": 8}``.
"""

from __future__ import annotations

from typing import Any

from google.protobuf import json_format

from coordinator.errors import InvalidArgument
from protos.inference import message
from protos.tensor_parallel.v1 import coordinator_pb2 as pb

_CONFIG: Any = message("ModelConfig")
_OPTIONS = ("kind", "dtype", "architecture", "arguments_json", "execution")


def load_request(request: Any) -> pb.LoadRequest:
    """Raises InvalidArgument for parameters that would be dropped silently (files, unknown ones)."""
    if not request.model_name:
        raise InvalidArgument("a model needs a name")
    load = pb.LoadRequest(name=request.model_name)
    for name, value in request.parameters.items():
        if name.startswith("file:"):
            raise InvalidArgument("model files cannot be sent with the request; put them under the daemons' model root")
        if name != "config":
            raise InvalidArgument(f"unknown load parameter {name!r}")
        if value.WhichOneof("parameter_choice") != "string_param":
            raise InvalidArgument("load parameter 'config' must be a string_param")
        _configure(load, _parse(value.string_param))
    return load


def _parse(text: str) -> Any:
    try:
        return json_format.Parse(text, _CONFIG(), ignore_unknown_fields=True)
    except json_format.ParseError as error:
        raise InvalidArgument(f"load parameter 'config' is no model configuration: {error}") from None


def _configure(load: pb.LoadRequest, config: Any) -> None:
    for name, value in config.parameters.items():
        if name == "path":
            load.path = value.string_value
        elif name == "version":
            load.version = value.string_value
        elif name in _OPTIONS:
            setattr(load.options, name, value.string_value)
    if config.max_batch_size < 0:
        raise InvalidArgument(f"max_batch_size must not be negative, not {config.max_batch_size}")
    if config.max_batch_size:
        load.options.batching.max_batch_size = config.max_batch_size
    if config.HasField("dynamic_batching"):
        sizes = [size for size in config.dynamic_batching.preferred_batch_size if size > 0]
        if sizes:
            load.options.batching.max_joined_rows = max(sizes)
        delay = config.dynamic_batching.max_queue_delay_microseconds
        if delay:
            load.options.batching.max_delay_microseconds = min(delay, 2**32 - 1)
