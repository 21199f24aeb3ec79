"""torch's own transformer layers: every row of padded sequences is the model's own, whether gradients are recorded or
not; and a mask of the caller's is no obstacle to a graph."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from tensor_parallel import Group
from tensor_parallel.planner import make_plan
from tensor_parallel.wrapper import DistributedModelWrapper
from tests.simulated import run_ranks

LENGTHS = torch.tensor([[7], [4], [1]])
ENDS = torch.arange(7) >= LENGTHS
GAPS = ENDS.clone()
GAPS[0, 2] = True


class Padded(nn.Module):
    """The encoder has a final norm, and what follows reads every row."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(32, 4, 64, dropout, batch_first=True, activation="gelu")
        self.encoder = nn.TransformerEncoder(layer, 2, nn.LayerNorm(32))
        nn.init.normal_(self.encoder.norm.bias)
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        return self.head(self.encoder(x, src_key_padding_mask=padding).mean(1))


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Padded().double().eval()


def example(padding: Tensor = ENDS) -> dict[str, Tensor]:
    return {"x": torch.randn(3, 7, 32, dtype=torch.float64), "padding": padding}


def sharded(model: nn.Module, call, ranks: int = 2):
    """``call(wrapper)`` on every rank."""

    def run(group: Group):
        return call(DistributedModelWrapper(model, ranks, group.rank, example(), group=group))

    return run_ranks(ranks, run)


@pytest.mark.parametrize("padding", [ENDS, GAPS, torch.zeros_like(ENDS)], ids=["ends", "gaps", "none"])
@pytest.mark.parametrize("as_numbers", [False, True])
def test_padded_rows_are_the_models_own(model, padding, as_numbers):
    if as_numbers:
        padding = torch.zeros(padding.shape, dtype=torch.float64).masked_fill(padding, -torch.inf)
    given = example(padding)
    with torch.no_grad():
        want = model(**given)
    with torch.enable_grad():
        recorded = model(**given).detach()
    assert bool((want - recorded).abs().max() > 1e-3) == (padding.bool().equal(ENDS))  # or this proves nothing

    def call(wrapper):
        with torch.no_grad():
            return wrapper(**given)

    for got in sharded(model, call):
        assert_close(got, want, rtol=1e-9, atol=1e-12)


def test_zeros_cost_no_collective(model):
    plan = make_plan(model, example(), 2)
    assert (plan.mode, plan.verified) == ("graph", "whole model")
    assert plan.summary()["all_reduces"] == 4
    assert plan.summary()["all_gathers"] <= 1


def test_evaluation_that_records_gradients_keeps_the_rows(model):
    given = example()
    want = model(**given)
    want.sum().backward()
    gradient = model.encoder.layers[0].linear1.bias.grad

    def call(wrapper):
        got = wrapper(**given)
        got.sum().backward()
        name = "encoder.layers.0.linear1.bias"
        shard = wrapper.plan.shards[name]
        return got.detach(), dict(wrapper.named_parameters())[name].grad, shard

    for rank, (got, grad, shard) in enumerate(sharded(model, call)):
        assert_close(got, want.detach(), rtol=1e-9, atol=1e-12)
        assert_close(grad, shard.take(gradient, rank), rtol=1e-8, atol=1e-10)


def test_training_runs_the_graph(model):
    model.train()
    given = example()
    want = model(**given).detach()

    def call(wrapper):
        assert not wrapper.plan.own_derivatives
        return wrapper(**given).detach()

    for got in sharded(model, call):
        assert_close(got, want, rtol=1e-9, atol=1e-12)


def test_where_torch_is_told_not_to_the_rows_stay(model):
    given = example()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad():
            want = model(**given)
        for got in sharded(model, lambda wrapper: wrapper(**given).detach()):
            assert_close(got, want, rtol=1e-9, atol=1e-12)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


class Translator(nn.Module):
    """As in the tutorials: a causal mask made in forward."""

    def __init__(self) -> None:
        super().__init__()
        self.source, self.target = nn.Embedding(50, 32), nn.Embedding(60, 32)
        self.transformer = nn.Transformer(32, 4, 2, 2, 64, 0.0, batch_first=True)
        self.head = nn.Linear(32, 60)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(target.shape[1], dtype=torch.float64)
        return self.head(self.transformer(self.source(source), self.target(target), tgt_mask=mask))


@pytest.mark.parametrize("training", [False, True])
def test_a_causal_mask_is_no_obstacle(training):
    torch.manual_seed(0)
    model = Translator().double().train(training)
    given = {"source": torch.randint(0, 50, (2, 7)), "target": torch.randint(0, 60, (2, 5))}
    want = model(**given).detach()

    def run(group: Group):
        wrapper = DistributedModelWrapper(model, 2, group.rank, given, group=group)
        return wrapper(**given).detach(), wrapper.plan.mode, wrapper.plan.summary()["all_reduces"]

    for got, mode, reduces in run_ranks(2, run):
        assert_close(got, want, rtol=1e-9, atol=1e-12)
        assert mode == "graph"
        assert reduces <= 12  # two for each layer of the encoder, three of the decoder, and the embeddings
