"""Loads on a real daemon: progress, refusals that name the thing, cancelling, replacing, and serving meanwhile."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from protos.tensor_parallel.v1 import coordinator_pb2, shard_pb2, tensor_pb2
from tests.service.daemons import Daemons, wait_for
from tests.service.shard_client import Ranks, array

NAMES = ("mlp", "moody", "slow", "broken")
FACTORIES = [flag for name in NAMES for flag in ("--allow-factory", f"tests.service.shard_models:{name}")]
MLP, SLOW = "tests.service.shard_models:mlp", "tests.service.shard_models:slow"
X = np.random.default_rng(0).standard_normal((3, 16)).astype(np.float32)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model root with one good Hugging Face directory and several bad ones."""
    from transformers import LlamaConfig, LlamaForCausalLM

    directory = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "vocab_size": 96, "num_hidden_layers": 2}
    config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)
    LlamaForCausalLM(config).save_pretrained(directory / "llama")
    for name in ("truncated", "missing", "misshaped", "pickled"):
        copy = directory / name
        copy.mkdir()
        (copy / "config.json").write_bytes((directory / "llama" / "config.json").read_bytes())
    whole = (directory / "llama" / "model.safetensors").read_bytes()
    (directory / "truncated" / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    tensors = dict(LlamaForCausalLM(config).state_dict())
    del tensors["model.norm.weight"]
    save_file(tensors, directory / "missing" / "model.safetensors", {"format": "pt"})
    tensors["model.norm.weight"] = torch.zeros(31)
    save_file(tensors, directory / "misshaped" / "model.safetensors", {"format": "pt"})
    torch.save({}, directory / "pickled" / "pytorch_model.bin")
    (directory / "link").symlink_to("/etc")
    return directory


@pytest.fixture(scope="module")
def daemons(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemons]:
    with Daemons(2, tmp_path_factory.mktemp("loads"), model_root=root, arguments=FACTORIES) as started:
        yield started


@pytest.fixture
def ranks(daemons: Daemons) -> Iterator[Ranks]:
    with Ranks(daemons.addresses) as made:
        made.load("mlp", MLP)
        made.form()
        yield made


def refusal(ranks: Ranks, name: str, path: str, **fields) -> grpc.RpcError:
    with pytest.raises(grpc.RpcError) as refused:
        ranks[0].load(name, path, **fields)
    return refused.value


def test_a_directory_is_read_by_slices_and_described(ranks: Ranks) -> None:
    updates = list(ranks[0].load_stream("llama", "llama"))
    assert updates[0].stage == "planning"
    last = updates[-1]
    assert (last.stage, last.bytes_done, last.bytes_total) == ("loaded", last.model.bytes_held, last.model.bytes_held)
    first, second = last.model, ranks[1].load("llama", "llama")
    assert first.source_digest == second.source_digest
    assert first.plan_digest == second.plan_digest
    assert first.shard_digest != second.shard_digest
    info = first.info
    assert first.bytes_held < 0.6 * info.total_bytes
    assert list(info.bytes_per_rank) == [first.bytes_held, second.bytes_held]
    ids = {spec.name: spec for spec in info.inputs}["input_ids"]
    assert (ids.dtype, ids.minimum, ids.maximum) == (tensor_pb2.INT64, 0, 95)
    assert {"logits"} == {output.name for output in info.outputs}
    assert info.collectives["all_reduces"] >= 1


def test_a_sharded_output_is_sent_by_every_rank_in_its_part(ranks: Ranks, root: Path) -> None:
    from transformers import LlamaForCausalLM

    loaded = ranks.load("llama", "llama")
    ranks.form()
    ids = np.arange(10).reshape(2, 5)
    answers = ranks.execute("llama", input_ids=ids)
    with torch.no_grad():
        expected = LlamaForCausalLM.from_pretrained(root / "llama")(torch.from_numpy(ids)).logits.numpy()
    [placement] = loaded[0].placements
    if not placement.sharded:
        np.testing.assert_allclose(array(answers[0].execute.outputs[0]), expected, atol=1e-4)
        return
    together = np.zeros_like(expected)
    for model, answer in zip(loaded, answers, strict=True):
        part, at = array(answer.execute.outputs[0]), 0
        for run in model.placements[0].runs:
            together[..., run.start : run.stop] = part[..., at : at + run.stop - run.start]
            at += run.stop - run.start
    np.testing.assert_allclose(together, expected, atol=1e-4)


@pytest.mark.parametrize(
    ("path", "code", "words"),
    [
        ("nowhere", "INVALID_ARGUMENT", "nowhere"),
        ("truncated", "INVALID_ARGUMENT", "model.safetensors"),
        ("missing", "INVALID_ARGUMENT", "model.norm.weight"),
        ("misshaped", "INVALID_ARGUMENT", "model.norm.weight"),
        ("pickled", "INVALID_ARGUMENT", ""),
        ("../llama", "PERMISSION_DENIED", ".."),
        ("/etc", "PERMISSION_DENIED", "outside"),
        ("link/passwd", "PERMISSION_DENIED", "link"),
        ("os:system", "PERMISSION_DENIED", "os:system"),
        ("tests.service.shard_models:broken", "INVALID_ARGUMENT", "broken"),
    ],
)
def test_bad_checkpoints_are_named_and_change_nothing(ranks: Ranks, path: str, code: str, words: str) -> None:
    before = ranks[0].status()
    error = refusal(ranks, "bad", path)
    assert error.code().name == code, error.details()
    assert words in error.details()
    assert "Traceback" not in error.details()
    after = ranks[0].status()
    assert (after.loads, after.bytes_held) == (before.loads, before.bytes_held)
    assert "bad" in after.last_error
    assert "bad" not in {model.name for model in after.models}
    assert ranks.execute("mlp", x=X)[0].HasField("execute")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"execution": "warp"}, "warp"),
        ({"dtype": "int4"}, "dtype"),
        ({"kind": "onnx"}, "onnx"),
        ({"arguments_json": "[1"}, "arguments_json"),
        ({"arguments_json": "[1]"}, "arguments_json"),
        ({"arguments_json": '{"nosuch": 1}'}, "nosuch"),
        ({"inputs": [tensor_pb2.TensorSpec(name="x")]}, "'x' has no dtype"),
    ],
)
def test_bad_options_are_named(ranks: Ranks, options: dict, words: str) -> None:
    error = refusal(ranks, "bad", MLP, options=coordinator_pb2.LoadOptions(**options))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT, error.details()
    assert words in error.details()


@pytest.mark.parametrize("missing", ["name", "path", "version"])
def test_a_load_says_what(ranks: Ranks, missing: str) -> None:
    fields = {"name": "m", "path": MLP, "version": "1", missing: ""}
    error = refusal(ranks, **fields)
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_arguments_of_a_factory(ranks: Ranks) -> None:
    options = coordinator_pb2.LoadOptions(arguments_json='{"hidden": 64}')
    model = ranks[0].load("wide", MLP, options=options)
    assert model.info.total_bytes == 4 * (16 * 64 * 2 + 64 + 16)


def test_loading_again_returns_at_once_what_is_there(ranks: Ranks) -> None:
    loads = ranks[0].status().loads
    [*_, last] = ranks[0].load_stream("mlp", MLP)
    assert last.model.state == "ACTIVE"
    assert ranks[0].status().loads == loads
    error = refusal(ranks, "mlp", MLP, options=coordinator_pb2.LoadOptions(arguments_json='{"hidden": 8}'))
    assert error.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert "new version" in error.details()


@pytest.mark.parametrize("which", ["source", "plan", "shard"])
def test_a_replacement_may_not_differ(ranks: Ranks, which: str) -> None:
    held = ranks[0].load("mlp", MLP)
    digests = {f"expected_{name}_digest": getattr(held, f"{name}_digest") for name in ("source", "plan", "shard")}
    assert ranks[0].load("mlp", MLP, version="2", **digests).shard_digest == held.shard_digest
    digests[f"expected_{which}_digest"] = "0" * 64
    loads = ranks[0].status().loads
    error = refusal(ranks, "mlp", MLP, version="3", **digests)
    assert error.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert "changed" in error.details()
    assert ranks[0].status().loads == loads
    ranks[0].stub.CancelLoad(shard_pb2.CancelLoadRequest(name="mlp", version="2"), timeout=10)
    assert {model.version for model in ranks[0].status().models if model.name == "mlp"} == {"1"}


def test_a_load_is_shown_and_can_be_cancelled(ranks: Ranks) -> None:
    stream = ranks[0].load_stream("slow", SLOW)
    assert next(stream).stage == "planning"
    state = {model.name: model.state for model in ranks[0].status().models}
    assert state["slow"] == "LOADING"
    assert ranks.execute("mlp", x=X)[0].HasField("execute")
    ranks[0].stub.CancelLoad(shard_pb2.CancelLoadRequest(name="slow", version="1"), timeout=10)
    with pytest.raises(grpc.RpcError) as cancelled:
        list(stream)
    assert cancelled.value.code() is grpc.StatusCode.CANCELLED
    assert "slow" not in {model.name for model in ranks[0].status().models}


def test_a_caller_that_leaves_takes_its_load_along(ranks: Ranks) -> None:
    stream = ranks[0].load_stream("slow", SLOW)
    next(stream)
    stream.cancel()
    wait_for(lambda: "slow" not in {model.name for model in ranks[0].status().models}, "the load to end")


def test_forwards_go_on_while_a_model_is_planned_and_read(ranks: Ranks) -> None:
    expected = array(ranks.execute("mlp", x=X)[0].execute.outputs[0])
    versions = iter(range(100, 200))
    done = threading.Event()
    failures: list[Exception] = []

    def load() -> None:
        try:
            for _ in range(3):
                ranks.load("llama", "llama", str(next(versions)))
        except Exception as error:
            failures.append(error)
        finally:
            done.set()

    thread = threading.Thread(target=load)
    thread.start()
    served = 0
    while not done.is_set() or served == 0:
        first, _ = ranks.execute("mlp", x=X)
        np.testing.assert_array_equal(array(first.execute.outputs[0]), expected)
        served += 1
    thread.join()
    assert not failures
    assert served > 3


def test_unloading_frees_the_memory(ranks: Ranks) -> None:
    options = coordinator_pb2.LoadOptions(arguments_json='{"width": 1024, "hidden": 6144}', verify=False)

    def resident() -> int:
        text = Path(f"/proc/{ranks[0].status().pid}/statm").read_text()
        return int(text.split()[1]) * 4096

    ranks.load("big", MLP, "1", options)
    ranks.run(activate=shard_pb2.ActivateModel(name="big", version="1"))
    held = {model.name: model.bytes_held for model in ranks[0].status().models}["big"]
    before = resident()
    assert held > 20e6
    assert ranks.run(unload=shard_pb2.UnloadModel(name="big", version="1"))[0].HasField("done")
    wait_for(lambda: resident() < before - 0.8 * held, "the memory to be freed", seconds=5)


def test_a_plan_before_a_weight_is_read(ranks: Ranks) -> None:
    import json

    loads = ranks[0].status().loads
    answer = ranks[0].stub.Plan(coordinator_pb2.PlanRequest(path="llama", ranks=4), timeout=60)
    report = json.loads(answer.report_json)
    assert answer.fits
    assert len(report["bytes_per_rank"]) == 4
    assert max(report["bytes_per_rank"]) < report["total_bytes"]
    small = ranks[0].stub.Plan(coordinator_pb2.PlanRequest(path="llama", device_memory=1000), timeout=60)
    assert not small.fits
    assert ranks[0].status().loads == loads
    with pytest.raises(grpc.RpcError) as refused:
        ranks[0].stub.Plan(coordinator_pb2.PlanRequest(path="../x"), timeout=60)
    assert refused.value.code() is grpc.StatusCode.PERMISSION_DENIED
