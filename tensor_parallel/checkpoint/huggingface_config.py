"""A Hugging Face model of which only ``config.json`` is here: enough to plan with, nothing to load."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from tensor_parallel.checkpoint.huggingface import HuggingFaceSource
from tensor_parallel.checkpoint.huggingface_files import read_config
from tensor_parallel.checkpoint.options import SourceOptions
from tensor_parallel.checkpoint.source import Source


class ConfigSource(HuggingFaceSource):
    """Plans as the checkpoint that the config describes would. Raises CheckpointError for a config that is none."""

    def __init__(self, path: Path, options: SourceOptions) -> None:
        Source.__init__(self, path, options)
        from tensor_parallel.checkpoint import huggingface_model

        self._library = huggingface_model
        self._described = huggingface_model.with_overrides(read_config(path, Path("/")), options.kwargs)
        self._stored = {}

    def _build(self) -> tuple[nn.Module, dict[str, Tensor]]:
        dtype = self._library.serving_dtype(self._config, {}, self.options.dtype)
        model = self._library.without_weights(self._class, self._config, dtype)
        self._inferred, self._constraints = self._infer(model)
        return model, {}
