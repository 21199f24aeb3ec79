"""Checkpoints served by real ranks: each reads its slices; together they answer as the unsharded model does."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tensor_parallel.checkpoint import open_source
from tensor_parallel.errors import GroupUnbound, TensorParallelError
from tensor_parallel.group import Group
from tensor_parallel.planner import OutputSpec
from tensor_parallel.serving import load_model
from tests import checkpoints
from tests.multiprocess.ranks import Place, on_ranks

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Answer:
    """What one rank reports."""

    outputs: dict[str, Tensor]
    specs: tuple[OutputSpec, ...]
    plan_digest: str
    source_digest: str
    shard_digest: str
    bytes_held: int
    progress: tuple[int, int]
    mode: str


def serve(place: Place, path: str, options: dict[str, Any], inputs: dict[str, Tensor]) -> Answer:
    """Load this rank's part and answer one request."""
    seen: list[tuple[int, int]] = []
    torch.set_num_threads(1)
    root = None if ":" in path else Path(path).parent
    model = load_model(
        open_source(path, root, options=options, factories=("tests.checkpoints:*",)),
        world_size=place.world_size,
        rank=place.rank,
        device=CPU,
        group=place.group("gloo"),
        options={"verify": False},  # the answer is compared here
        progress=lambda done, total: seen.append((done, total)),
    )
    model.validate(inputs)
    outputs = {name: value.clone() for name, value in model.run(inputs).items()}
    held = {
        id(value.untyped_storage()): value.untyped_storage().nbytes() for value in model._module.state_dict().values()
    }
    assert sum(held.values()) <= model.bytes_held
    digests = model.plan_digest, model.source_digest, model.shard_digest
    return Answer(outputs, model.outputs, *digests, model.bytes_held, seen[-1], model.plan.mode)


def joined(answers: list[Answer]) -> dict[str, Tensor]:
    """The ranks' outputs as one, as a coordinator joins them."""
    whole: dict[str, Tensor] = {}
    for spec in answers[0].specs:
        parts = [answer.outputs[spec.name] for answer in answers]
        if spec.shard is None or spec.shard.dim is None:
            whole[spec.name] = parts[0]
            continue
        sizes = list(parts[0].shape)
        sizes[spec.shard.dim] = max(stop for runs in spec.shard.runs for _, stop in runs)
        full = torch.full(sizes, float("nan"), dtype=parts[0].dtype)
        for rank, part in enumerate(parts):
            full.index_copy_(spec.shard.dim, spec.shard.index(rank), part)
        whole[spec.name] = full
    return whole


def difference(got: Tensor, want: Tensor) -> float:
    assert got.shape == want.shape
    return float((got.double() - want.double()).abs().max() / want.double().abs().max())


def text_inputs(vocabulary: int, *names: str) -> dict[str, Tensor]:
    """Two sentences of other sizes than the plan was made with, one padded."""
    generator = torch.Generator().manual_seed(5)
    inputs = {"input_ids": torch.randint(1, vocabulary, (3, 11), generator=generator)}
    inputs["attention_mask"] = torch.ones(3, 11, dtype=torch.int64)
    inputs["attention_mask"][1, 7:] = 0
    for name in names:
        inputs[name] = torch.randint(0, 2, (3, 11) if name == "token_type_ids" else (3, 5), generator=generator)
    return inputs


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root, made = tmp_path_factory.mktemp("families"), {}

    def get(family: str) -> Path:
        if family not in made:
            made[family] = checkpoints.FAMILIES[family](root / family)
        return made[family]

    return get


FAMILIES: dict[str, tuple[str, int, tuple[str, ...], float]] = {
    "bert": ("logits", 99, ("token_type_ids",), 0.62),
    "gpt2": ("logits", 101, (), 0.62),
    "llama": ("logits", 128, (), 0.55),
    "t5": ("logits", 97, ("decoder_input_ids",), 0.62),
    "mixtral": ("logits", 96, (), 0.55),
}


@pytest.mark.timeout(180)
@pytest.mark.parametrize(("family", "ranks"), [*((family, 2) for family in FAMILIES), ("bert", 3), ("mixtral", 3)])
def test_a_checkpoint_served_by_ranks_answers_as_transformers(
    family: str, ranks: int, saved: Callable[[str], Path]
) -> None:
    output, vocabulary, names, share = FAMILIES[family]
    path, inputs = saved(family), text_inputs(vocabulary, *names)
    answers = on_ranks(ranks, partial(serve, path=str(path), options={"dtype": "float32"}, inputs=inputs), timeout=150)
    source = open_source(path)
    model = type(source.build_meta()).from_pretrained(path, dtype=torch.float32)
    with torch.inference_mode():
        want = model(**inputs, use_cache=False)
    real = inputs["attention_mask"].bool() if family != "t5" else torch.ones(3, 5, dtype=torch.bool)
    assert difference(joined(answers)[output][real], want[output][real]) < 1e-5
    assert len({answer.plan_digest for answer in answers}) == len({answer.source_digest for answer in answers}) == 1
    assert len({answer.shard_digest for answer in answers}) == ranks
    assert {answer.mode for answer in answers} == {"graph"}
    if ranks == 2:
        total = open_source(path, options={"dtype": "float32"}).total_bytes
        assert max(answer.bytes_held for answer in answers) <= share * total
    assert all(answer.progress == (answer.bytes_held, answer.bytes_held) for answer in answers)


@pytest.mark.timeout(180)
@pytest.mark.parametrize("ranks", [2, 3])
def test_the_real_checkpoint_served_by_ranks_answers_as_transformers(ranks: int) -> None:
    from transformers import AutoModel

    path, inputs = checkpoints.minilm(), text_inputs(30_000)
    answers = on_ranks(ranks, partial(serve, path=str(path), options={}, inputs=inputs), timeout=150)
    with torch.inference_mode():
        want = AutoModel.from_pretrained(path)(**inputs)
    got = joined(answers)
    real = inputs["attention_mask"].bool()
    assert difference(got["last_hidden_state"][real], want["last_hidden_state"][real]) < 1e-5
    assert difference(got["pooler_output"], want["pooler_output"]) < 1e-5
    if ranks == 2:
        assert max(answer.bytes_held for answer in answers) <= 0.55 * open_source(path).total_bytes


def test_an_archive_served_by_ranks_answers_as_its_model(tmp_path: Path) -> None:
    path, inputs = checkpoints.mlp_archive(tmp_path / "model.pt2"), checkpoints.mlp_inputs()
    answers = on_ranks(2, partial(serve, path=str(path), options={}, inputs=inputs))
    torch.manual_seed(0)
    with torch.inference_mode():
        want: Mapping[str, Any] = checkpoints.make_mlp()(**inputs)
    got = joined(answers)
    assert sorted(got) == ["hidden", "parts.0", "parts.1", "pooled.mean"]
    assert difference(got["hidden"], want["hidden"]) < 1e-5
    assert difference(got["pooled.mean"], want["pooled"]["mean"]) < 1e-5
    assert difference(got["parts.1"], want["parts"][1]) < 1e-5


def test_a_factory_served_by_ranks_answers_as_its_model() -> None:
    inputs = checkpoints.mlp_inputs()
    specs = [
        {"name": "x", "dtype": "float32", "shape": [None, None, 16]},
        {"name": "mask", "dtype": "float32", "shape": [None, None]},
    ]
    options = {"kwargs": {"hidden": 24}, "inputs": specs}
    answers = on_ranks(2, partial(serve, path="tests.checkpoints:make_mlp", options=options, inputs=inputs))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        with torch.inference_mode():
            want = checkpoints.make_mlp(hidden=24)(**inputs)
    assert difference(joined(answers)["hidden"], want["hidden"]) < 1e-5


def unbound_then_bound(place: Place, path: str, inputs: dict[str, Tensor]) -> tuple[bool, float]:
    group = Group(place.rank, place.world_size)
    model = load_model(
        open_source(path),
        world_size=place.world_size,
        rank=place.rank,
        device=CPU,
        group=group,
        options={"verify": False},
    )
    try:
        model.run(inputs)
        refused = False
    except GroupUnbound:
        refused = True
    answers = []
    for generation in range(2):
        backend = place.form("gloo", f"generation {generation}")
        group.bind(backend)
        answers.append(model.run(inputs)["logits"].clone())
        group.unbind()
        backend.close()
    return refused, float((answers[0] - answers[1]).abs().max())


def test_weights_outlive_the_group(saved: Callable[[str], Path]) -> None:
    inputs = text_inputs(101)
    results = on_ranks(2, partial(unbound_then_bound, path=str(saved("gpt2")), inputs=inputs))
    assert results == [(True, 0.0)] * 2


def refusals(place: Place, path: str, requests: list[dict[str, Tensor]]) -> list[str]:
    group = place.group("gloo")
    model = load_model(
        open_source(path),
        world_size=place.world_size,
        rank=place.rank,
        device=CPU,
        group=group,
        options={"verify": False},
    )
    messages = []
    for request in requests:
        try:
            model.validate(request)
            messages.append("accepted")
        except TensorParallelError as error:
            messages.append(str(error))
    return messages


def test_a_bad_request_is_refused_alike_everywhere_before_it_runs(saved: Callable[[str], Path]) -> None:
    ids = torch.ones(2, 4, dtype=torch.int64)
    requests = [
        {"input_ids": ids},
        {"input_ids": ids + 100},
        {"input_ids": ids[:, :0]},
        {"input_ids": torch.ones(1, 65).long()},
    ]
    first, second = on_ranks(2, partial(refusals, path=str(saved("gpt2")), requests=requests))
    assert first == second
    assert first[0] == "accepted"
    assert "101" in first[1]
    assert "empty" in first[2]
    assert "at most" in first[3] or "to 64" in first[3]
