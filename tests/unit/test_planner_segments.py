"""``execution="compile"``: what is compiled computes the same, for the sizes of any request, and is refused if not."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tensor_parallel import serving
from tensor_parallel.errors import CannotCompile, InvalidInput, LoadCancelled
from tensor_parallel.group import Group
from tensor_parallel.planner import instantiate, make_plan, segments
from tensor_parallel.planner.module import ShardedModule
from tensor_parallel.planner.rehearsal import Alone, check_compiler
from tensor_parallel.planner.stopping import stoppable

pytestmark = pytest.mark.timeout(240)  # a cold compiler's cache


class Block(nn.Module):
    """What a decoder does between its matrices: a norm written out, a gate, residuals; and sizes as numbers."""

    def __init__(self, width: int = 16, hidden: int = 32) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(width) + 0.5)
        self.up, self.gate = nn.Linear(width, hidden), nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        rows, length = x.shape[:2]
        x = x * mask.unsqueeze(-1).to(x.dtype) + length
        normed = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.scale
        hidden = torch.tanh(self.gate(normed) * 0.5) * self.up(normed).view(rows * length, -1).view(rows, length, -1)
        return x + torch.sigmoid(self.down(hidden) * 2) * x


class Blocks(nn.Module):
    def __init__(self, layers: int) -> None:
        super().__init__()
        self.places = nn.Embedding(64, 16)
        self.layers = nn.ModuleList(Block() for _ in range(layers))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = x + self.places(torch.arange(x.shape[1]) % 32 + 1)  # of sizes alone: nothing to compile
        for layer in self.layers:
            x = layer(x, mask)
        return x


def inputs(rows: int, length: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(rows * 100 + length)
    return {
        "mask": torch.randint(0, 2, (rows, length), generator=generator),
        "x": torch.randn(rows, length, 16, generator=generator),
    }


def rank_of(model: nn.Module, rank: int = 0, example: tuple[int, int] = (3, 5)) -> ShardedModule:
    """A rank of two whose peer holds what it holds and adds nothing."""
    plan = make_plan(model, inputs(*example), 2, gather_outputs=False, verify=False)
    held = dict(model.state_dict())
    group = Group(rank, 2)
    group.bind(Alone(group))
    module = instantiate(plan, model, rank=rank, group=group, read=lambda name, shard: shard.take(held[name], rank))
    assert isinstance(module, ShardedModule)
    return module.eval()


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return Blocks(3).eval()


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small arguments are worth it too."""
    monkeypatch.setattr(segments, "SMALLEST", 0)


def counted(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of every segment that is called: whether a compiled version of it ran."""
    ran: list[bool] = []

    def strict(function: Callable[..., Any]) -> Callable[..., Any]:
        compiled = torch.compile(function, fullgraph=True, dynamic=True)

        def call(*args: Any) -> Any:
            try:
                with torch.compiler.set_stance("fail_on_recompile"):
                    result = compiled(*args)
            except RuntimeError as error:
                if "recompile" not in str(error):
                    raise
                ran.append(False)
                return function(*args)
            ran.append(True)
            return result

        return call

    monkeypatch.setattr(segments, "with_compiled", strict)
    return ran


@pytest.mark.parametrize("rank", [0, 1])
def test_requests_of_any_size_run_what_the_load_compiled(
    model: nn.Module, rank: int, small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, plain = rank_of(model, rank), rank_of(model, rank)
    ran = counted(monkeypatch)
    made = module.compile_programs(check=True)
    assert 0 < made < 9  # once for layers that are alike
    with torch.inference_mode():
        for rows, length in ((3, 5), (2, 9), (7, 7), (40, 3), (1, 5), (1, 30)):
            given = inputs(rows, length)
            before = len(ran)
            got, want = module(**given), plain(**given)
            assert torch.allclose(got, want, atol=1e-5)
            assert len(ran) - before >= 6
            assert all(ran[before:]), (rows, length)
        before = len(ran)
        module(**inputs(4, 1))  # one column was not rehearsed
        assert not all(ran[before:])


def test_gradients_are_recorded_as_ever(model: nn.Module, small: None) -> None:
    module, plain = rank_of(model), rank_of(model)
    module.compile_programs(check=True)
    given = inputs(2, 5)
    for one in (module, plain):
        one(**given).sum().backward()
    for (name, mine), (_, other) in zip(module.named_parameters(), plain.named_parameters(), strict=True):
        assert mine.grad is not None, name
        assert torch.equal(mine.grad, other.grad), name


def test_small_arguments_run_as_they_are(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    module = rank_of(model)
    ran = counted(monkeypatch)
    module.compile_programs(check=True)
    with torch.inference_mode():
        module(**inputs(2, 5))
        assert not ran
        module(**inputs(64, segments.SMALLEST // (64 * 16)))
        assert ran


def test_a_wrong_kernel_is_refused(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    module = rank_of(model)
    real = torch.compile

    def wrong(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        return lambda *args: tuple(
            out * 1.01 if isinstance(out, Tensor) and out.is_floating_point() else out
            for out in real(function, **options)(*args)
        )

    monkeypatch.setattr(torch, "compile", wrong)
    with pytest.raises(CannotCompile, match="differs from the same code uncompiled"):
        module.compile_programs(check=True)


def test_a_compiler_that_fails_is_a_refusal(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    module = rank_of(model)
    real = torch.compile

    def broken(*_: Any) -> Any:
        raise RuntimeError("no space left\nand more")

    monkeypatch.setattr(torch, "compile", partial(real, backend=broken))
    with pytest.raises(CannotCompile, match=r"execution='compile' cannot be had: RuntimeError: no space left"):
        module.compile_programs(check=True)


def test_it_can_be_cancelled_between_functions(model: nn.Module) -> None:
    calls: list[int] = []

    def stop() -> None:
        calls.append(1)
        if len(calls) == 2:
            raise LoadCancelled("enough")

    module = rank_of(model)
    with pytest.raises(LoadCancelled), stoppable(stop):
        module.compile_programs(check=True)


def test_it_serves_while_other_models_are_traced(model: nn.Module, small: None) -> None:
    """torch.export changes what the whole process does; what is compiled must keep working meanwhile."""
    module = rank_of(model)
    module.compile_programs(check=True)
    given = inputs(4, 6)
    want = module(**given)
    done = threading.Event()
    wrong: list[object] = []

    def serve() -> None:
        with torch.inference_mode():
            while not done.is_set():
                try:
                    if not torch.allclose(module(**given), want, atol=1e-5):
                        wrong.append("other values")
                except Exception as error:
                    wrong.append(error)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        for _ in range(3):
            make_plan(model, inputs(3, 5), 2, verify=False)
    finally:
        done.set()
        thread.join(20)
    assert not wrong


def test_without_a_compiler_it_says_so() -> None:
    """In a process whose torch finds none."""
    code = (
        "import torch\n"
        "from tensor_parallel.planner.rehearsal import check_compiler\n"
        "check_compiler('cpu')\n"
    )  # fmt: skip
    environment = {"PATH": "/nowhere", "CXX": "/nowhere/g++", "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"}
    found = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    last = found.stderr.strip().splitlines()[-1]
    assert "CannotCompile: execution='compile' cannot be had" in last, found.stderr
    assert "compiler" in last
    assert "eager" in last


def test_code_that_others_may_have_written_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    tmp_path.chmod(0o777)
    with pytest.raises(CannotCompile, match="others may write to"):
        check_compiler.__wrapped__("cpu")
    tmp_path.chmod(0o755)
    check_compiler.__wrapped__("cpu")


def test_options() -> None:
    assert serving.ServingOptions.parse({}).execution == "eager"
    assert serving.ServingOptions.parse({"execution": ""}).execution == "eager"
    assert serving.ServingOptions.parse({"execution": "compile"}).execution == "compile"
    with pytest.raises(InvalidInput, match=r"cuda_graphs.*eager, compile"):
        serving.ServingOptions.parse({"execution": "cuda_graphs"})
