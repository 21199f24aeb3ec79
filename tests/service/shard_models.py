"""Model factories for daemons under test; some misbehave when an input says so. Allowed with ``--allow-factory``."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import torch
from torch import nn

RAISE, MEMORY, SLEEP, NAP, MEMORY_ONE, RAISE_ONE, DIE_ONE, MEMORY_APART = 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0
GATE = 9.0  # wait while the file named by TEST_GATE is there
"""What ``x[0, 0]`` asks a ``Moody`` for: everywhere; (ONE) on rank 1 alone; (APART) on rank 0 a layer earlier."""


class Mlp(nn.Module):
    def __init__(self, width: int = 16, hidden: int = 32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.relu(self.up(x)))


class Moody(Mlp):
    """An Mlp that fails in the middle, after its first layer, when ``x[0, 0]`` asks for it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mood = float(x[0, 0])
        if mood == MEMORY_APART and is_first():
            misbehave(MEMORY)
        hidden = torch.relu(self.up(x))
        misbehave(MEMORY if mood == MEMORY_APART else mood)
        return self.down(hidden)


def is_first() -> bool:
    return sys.argv[sys.argv.index("--rank") + 1] == "0"


def misbehave(mood: float) -> None:
    first = is_first()
    if mood == RAISE or (mood == RAISE_ONE and not first):
        raise ValueError("the model is in a bad mood")
    if mood == MEMORY or (mood == MEMORY_ONE and not first):
        raise torch.OutOfMemoryError("tried to allocate more than there is")
    if mood == SLEEP:
        time.sleep(30.0)
    if mood == NAP:
        time.sleep(1.0)
    if mood == GATE:
        end = time.monotonic() + 30
        while Path(os.environ["TEST_GATE"]).exists() and time.monotonic() < end:
            time.sleep(0.01)
    if mood == DIE_ONE and not first:
        os.kill(os.getpid(), 9)


Made = tuple[nn.Module, dict[str, torch.Tensor]]


def mlp(**options: int) -> Made:
    model = Mlp(**options)
    return model, {"x": torch.zeros(2, model.up.in_features)}


def moody() -> Made:
    return Moody(), {"x": torch.zeros(2, 16)}


class Picky(Mlp):
    """Runs only where ``x`` has a value of 5, which no one would guess."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not bool((x == 5).any()):
            raise LookupError("no five among the inputs")
        return super().forward(x)


def picky(fits: bool = False) -> Made:
    """Its own example fits, or not."""
    return Picky(), {"x": torch.full((2, 16), 5.0 if fits else 0.0)}


def sabotaged(flag: str) -> Made:
    """Makes rank 1's part in the idle collectives go wrong for as long as the file ``flag`` says how: it hangs, or it
    comes with a tensor of another size."""
    from shardd.engine import Engine

    probe = Engine._probe

    def sabotage(engine: Engine) -> None:
        how = Path(flag).read_text() if not is_first() and Path(flag).exists() else ""
        if how == "hang":
            time.sleep(60.0)
        elif how:
            engine._group.all_reduce_sum_(torch.ones(int(how)))
        else:
            probe(engine)

    Engine._probe = sabotage
    return mlp()


def slow() -> Made:
    """Takes a while to build."""
    time.sleep(2.0)
    return mlp()


def broken() -> Made:
    raise RuntimeError("this factory is broken")


class Gated(Mlp):
    """An Mlp with something for a compiler between its matrices."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.up(x)
        return self.down(hidden * torch.sigmoid(hidden * 1.5 + 0.5))


def gated() -> Made:
    model = Gated(64, 256)
    return model, {"x": torch.zeros(2, 64)}


class Watched(Mlp):
    """Takes its time, and writes down that it is traced."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = path

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with open(f"{self.path}.{os.getpid()}", "a", encoding="ascii") as file:
            file.write(".")
        time.sleep(0.1)
        return super().forward(x)


def deep(path: str, layers: int = 300) -> Made:
    """Half a minute to trace."""
    return nn.Sequential(*(Watched(path) for _ in range(layers))), {"input": torch.zeros(2, 16)}
