"""A small model as an archive for daemons to load, and what it answers unsharded."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

NAME = "mlp"
FILE = "mlp.pt2"
WIDTH = 64


class _Mlp(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = torch.nn.Linear(WIDTH, 4 * WIDTH)
        self.down = torch.nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.relu(self.up(x)))


class Model:
    """Written below ``directory`` as FILE."""

    def __init__(self, directory: Path) -> None:
        torch.manual_seed(7)
        self._module = _Mlp().eval()
        rows = torch.export.Dim("rows", min=1, max=64)
        exported = torch.export.export(self._module, (torch.zeros(2, WIDTH),), dynamic_shapes=({0: rows},))
        torch.export.save(exported, directory / FILE)
        self.inputs = {"x": np.random.default_rng(7).standard_normal((4, WIDTH), dtype=np.float32)}
        with torch.no_grad():
            self._expected = self._module(torch.from_numpy(self.inputs["x"])).numpy()

    def check(self, outputs: dict[str, np.ndarray]) -> None:
        """AssertionError unless ``outputs`` is what the unsharded model answers."""
        (answer,) = outputs.values()
        np.testing.assert_allclose(answer, self._expected, rtol=1e-4, atol=1e-5)
