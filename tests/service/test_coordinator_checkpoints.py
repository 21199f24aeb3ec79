"""Checkpoints on disk that change while ranks come and go."""

import grpc
import numpy as np
import pytest
import torch

from protos.tensor_parallel.v1 import coordinator_pb2 as pb
from tests import checkpoints
from tests.service.clusters import Cluster, failure
from tests.service.daemons import wait_for

IDS = np.arange(12, dtype=np.int64).reshape(2, 6)


def scores(path):
    from transformers import BertForMaskedLM

    with torch.no_grad():
        return BertForMaskedLM.from_pretrained(path).eval()(input_ids=torch.from_numpy(IDS)).logits.numpy()


def rewrite(path):
    """Other weights of the same shape, in place."""
    from safetensors.torch import load_file, save_file

    (file,) = path.glob("*.safetensors")
    save_file({name: value + 1 for name, value in load_file(file).items()}, file, metadata={"format": "pt"})


@pytest.fixture
def cluster(tmp_path):
    (tmp_path / "run").mkdir()
    root = tmp_path / "models"
    checkpoints.bert(root / "bert")
    arguments = ["--state-dir", str(tmp_path / "state")]
    with Cluster(2, tmp_path / "run", model_root=root, arguments=arguments) as cluster:
        cluster.root = root
        cluster.load("bert", "bert")
        cluster.load("steady", "tests.service.shard_models:mlp", kind="factory")
        yield cluster


def ask(cluster, name):
    return cluster.forward(name, {"input_ids": IDS})["logits"]


@pytest.mark.timeout(120)
def test_a_replacement_never_joins_with_other_weights(cluster):
    first = scores(cluster.root / "bert")
    np.testing.assert_allclose(ask(cluster, "bert"), first, rtol=1e-4, atol=1e-5)
    rewrite(cluster.root / "bert")
    cluster.daemons.restart(1)
    models = wait_for(lambda: refused(cluster), "the change to be noticed")
    assert "changed" in models["bert"].reason
    assert "load it as a new version" in models["bert"].reason
    error = failure(lambda: ask(cluster, "bert"))
    assert error.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert "changed" in error.details()
    wait_for(lambda: by_name(cluster)["steady"].serving, "the other model")
    assert cluster.forward("steady", {"x": np.zeros((2, 16), np.float32)})["output"].shape == (2, 16)
    health = cluster.health()
    assert not health.serving
    assert "bert" in health.reason
    assert cluster.load("bert", "bert")[-1].version == "2"
    np.testing.assert_allclose(ask(cluster, "bert"), scores(cluster.root / "bert"), rtol=1e-4, atol=1e-5)
    assert np.abs(ask(cluster, "bert") - first).max() > 0.1
    assert cluster.await_serving()


def by_name(cluster):
    return {model.name: model for model in cluster.health().models}


def refused(cluster):
    models = by_name(cluster)
    return models if "changed" in models["bert"].reason else None


@pytest.mark.timeout(120)
def test_a_change_while_everything_was_down_is_served_and_told(cluster):
    rewrite(cluster.root / "bert")
    cluster.coordinator.kill()
    for rank in (0, 1):
        cluster.daemons.restart(rank)
    cluster.restart_coordinator()
    cluster.await_serving()
    np.testing.assert_allclose(ask(cluster, "bert"), scores(cluster.root / "bert"), rtol=1e-4, atol=1e-5)
    listed = {m.name: m for m in cluster.stub.ListModels(pb.ListModelsRequest(), timeout=5).models}
    assert any("changed on disk" in warning for warning in listed["bert"].warnings)
    assert not any("changed on disk" in warning for warning in listed["steady"].warnings)


@pytest.mark.timeout(120)
def test_a_new_version_with_other_weights_goes_by_the_plan_of_the_one_before(cluster):
    first = scores(cluster.root / "bert")
    rewrite(cluster.root / "bert")
    assert cluster.load("bert", "bert")[-1].version == "2"
    np.testing.assert_allclose(ask(cluster, "bert"), scores(cluster.root / "bert"), rtol=1e-4, atol=1e-5)
    assert np.abs(ask(cluster, "bert") - first).max() > 0.1
    for daemon in cluster.daemons:
        lines = [line for line in daemon.events("load_finished") if line["model"] == "bert"]
        assert [(line["version"], line["planned_by"]) for line in lines] == [
            ("1", "this rank"),
            ("2", "an earlier load"),
        ]
