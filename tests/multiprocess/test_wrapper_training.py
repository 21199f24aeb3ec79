"""The wrapper over real ranks against the unsharded module: outputs, gradients, optimizer steps, checkpoints,
dropout."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from tensor_parallel.wrapper import DistributedModelWrapper
from tests.multiprocess.ranks import Place, on_ranks

VOCAB, WIDTH, HEADS = 37, 24, 6
pytestmark = pytest.mark.timeout(240)


class Block(nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 40), nn.Linear(40, WIDTH)
        self.dropout, self.inner_dropout = nn.Dropout(dropout), nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        b, t, c = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(b, t, 3, HEADS, c // HEADS).permute(2, 0, 3, 1, 4)
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.dropout(self.out(y.transpose(1, 2).reshape(b, t, c)))
        return x + self.dropout(self.down(self.inner_dropout(functional.gelu(self.up(self.norm2(x))))))


class Decoder(nn.Module):
    """Tied embedding and head, two blocks."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCAB, WIDTH)
        self.blocks = nn.ModuleList([Block(dropout), Block(dropout)])
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def build(dtype: torch.dtype = torch.float64, dropout: float = 0.0) -> tuple[Decoder, dict[str, Tensor]]:
    torch.manual_seed(0)
    model = Decoder(dropout).to(dtype)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            nn.init.normal_(parameter, 0.5, 0.2)
    return model, {"ids": torch.randint(0, VOCAB, (3, 7))}


def wrap(place: Place, model: nn.Module, example: dict[str, Tensor] | None) -> DistributedModelWrapper:
    return DistributedModelWrapper(model, place.world_size, place.rank, example, group=place.group("gloo"))


def loss_of(logits: Tensor, ids: Tensor) -> Tensor:
    return functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def trains_as_unsharded(place: Place) -> None:
    model, inputs = build()
    wrapper = wrap(place, model.train(), inputs)
    plain, sharded = torch.optim.AdamW(model.parameters(), 1e-2), torch.optim.AdamW(wrapper.parameters(), 1e-2)
    assert wrapper.plan.mode == "graph"
    for step in range(6):
        ids = torch.randint(0, VOCAB, (2 + step % 2, 6 + step), generator=torch.Generator().manual_seed(step))
        losses = []
        for module, optimizer in ((model, plain), (wrapper, sharded)):
            optimizer.zero_grad()
            loss = loss_of(module(ids=ids), ids)
            loss.backward()
            losses.append(loss.detach())
        assert_close(losses[1], losses[0], rtol=1e-9, atol=1e-9)
        whole = dict(model.named_parameters())
        for name, parameter in wrapper.named_parameters():
            want = wrapper.plan.shards[name].take(whole[name].grad, place.rank)
            assert_close(parameter.grad, want, rtol=1e-7, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}")
        norms = [nn.utils.clip_grad_norm_(model.parameters(), 0.3), wrapper.clip_grad_norm_(0.3)]
        assert_close(norms[1], norms[0])
        plain.step()
        sharded.step()
    final = wrapper.full_state_dict()
    assert bool(final) == (place.rank == 0)
    for name, tensor in final.items():
        assert_close(tensor, model.state_dict()[name], rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("world", [2, 4])
def test_trains_as_the_unsharded_model(world: int) -> None:
    on_ranks(world, trains_as_unsharded, timeout=200)


def full_state_roundtrip(place: Place) -> None:
    model, inputs = build()
    other, _ = build()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    wrapper = wrap(place, model.eval(), inputs)
    assert set(wrapper.state_dict()) == set(model.state_dict())
    wrapper.load_full_state_dict(other.state_dict())
    with torch.no_grad():
        assert_close(wrapper(**inputs), other.eval()(**inputs))
    state = wrapper.full_state_dict()
    if place.rank == 0:
        assert set(state) == set(other.state_dict())
        for name, tensor in state.items():
            assert torch.equal(tensor, other.state_dict()[name])


def test_full_state_dict_goes_out_and_in() -> None:
    on_ranks(3, full_state_roundtrip, timeout=200)


def counts_and_bytes(place: Place) -> None:
    model, inputs = build(torch.float32)
    wrapper = wrap(place, model.eval(), inputs)
    stats = place.group("gloo").stats
    summary = wrapper.plan.summary()
    with torch.no_grad():
        wrapper(**inputs)
        before = stats.snapshot()
        wrapper(**inputs)
        after = stats.snapshot()
    for kind in ("all_reduces", "all_gathers", "reduce_scatters"):
        assert after[kind] - before[kind] == summary[kind], kind
    assert summary["all_reduces"] <= 5
    assert summary["all_gathers"] <= 1
    held = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
        for t in [*wrapper.parameters(), *wrapper.buffers()]
    }
    assert sum(held.values()) == wrapper.plan.bytes_per_rank[place.rank]


def test_summary_counts_what_is_executed_and_held() -> None:
    on_ranks(2, counts_and_bytes, timeout=200)


def recomputes(place: Place) -> None:
    model, inputs = build(dropout=0.2)
    wrapper = wrap(place, model.train(), inputs)

    def gradients(call) -> list[Tensor]:
        wrapper.zero_grad()
        torch.manual_seed(5)
        loss_of(call(inputs["ids"]), inputs["ids"]).backward()
        return [p.grad.clone() for p in wrapper.parameters()]

    plain = gradients(lambda ids: wrapper(ids=ids))
    recomputed = gradients(lambda ids: checkpoint(lambda i: wrapper(ids=i), ids, use_reentrant=False))
    for a, b in zip(plain, recomputed, strict=True):
        assert torch.equal(a, b)


def test_activation_checkpointing_repeats_the_same_dropout() -> None:
    on_ranks(2, recomputes, timeout=200)


class Dropped(nn.Module):
    """One dropout on a replicated activation, one on a divided one."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 64, bias=False), nn.Linear(64, 8, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = functional.dropout(x, 0.5, self.training)
        hidden = functional.dropout(torch.ones_like(self.up(x)), 0.5, self.training)
        return x, hidden


def drops(place: Place) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    wrapper = wrap(place, Dropped().train(), {"x": torch.ones(4, 8)})
    torch.manual_seed(1)
    x, hidden = wrapper(x=torch.ones(4, 8))
    wrapper.eval()
    same, all_ones = wrapper(x=torch.ones(4, 8))
    return x, hidden, same, all_ones


def test_dropout_is_alike_on_replicated_and_distinct_on_divided_activations() -> None:
    results = on_ranks(2, drops, timeout=200)
    (x0, h0, same, ones), (x1, h1, _, _) = results
    assert torch.equal(x0, x1)  # outputs are whole on every rank
    assert torch.equal(h0, h1)
    assert 0.2 < float((x0 == 0).float().mean()) < 0.8
    left, right = h0.chunk(2, -1)
    assert not torch.equal(left, right), "both ranks drew the same mask for their own halves"
    assert torch.equal(same, torch.ones(4, 8))
    assert torch.equal(ones, torch.ones(4, 64))


def plans_at_the_first_call(place: Place) -> None:
    model, inputs = build(torch.float32)
    model.eval()
    wrapper = wrap(place, model, None)
    with torch.no_grad():
        assert_close(wrapper(**inputs), model(**inputs), rtol=1e-4, atol=1e-4)
        ids = torch.randint(0, VOCAB, (1, 3))
        assert_close(wrapper(ids), model(ids), rtol=1e-4, atol=1e-4)
        with pytest.raises(IndexError):
            wrapper(torch.full((1, 3), VOCAB))


def test_plans_lazily_takes_other_calls_and_refuses_bad_ids() -> None:
    on_ranks(2, plans_at_the_first_call, timeout=200)


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.scale = nn.Linear(8, 33), nn.Linear(33, 8), nn.Parameter(torch.randn(33, 4))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.up(x)
        if float(hidden.sum()) > 0:
            hidden = hidden * 2
        return self.down(hidden) + (hidden @ self.scale).sum()


def falls_back(place: Place) -> None:
    torch.manual_seed(0)
    model = Branching().double()
    x = torch.randn(5, 8, dtype=torch.float64)
    wrapper = wrap(place, model, {"x": x})
    assert wrapper.plan.mode == "modules"
    assert wrapper.plan.notes
    for sign in (1, -1):
        model.zero_grad()
        wrapper.zero_grad()
        got, want = wrapper(x=x * sign), model(x=x * sign)
        assert_close(got, want)
        got.square().sum().backward()
        want.square().sum().backward()
        whole = dict(model.named_parameters())
        for name, parameter in wrapper.named_parameters():
            assert_close(parameter.grad, wrapper.plan.shards[name].take(whole[name].grad, place.rank))


def test_control_flow_on_values_falls_back_and_says_so() -> None:
    on_ranks(3, falls_back, timeout=200)
