"""Hugging Face directories: every tensor, whole or sliced, is what ``from_pretrained`` loads; faults are named."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tensor_parallel.checkpoint import load_shards, open_source
from tensor_parallel.checkpoint.default_dtype import default_dtype
from tensor_parallel.checkpoint.expression import Compute, whole
from tensor_parallel.checkpoint.lazy import LazyTensor
from tensor_parallel.errors import AccessDenied, CheckpointError, DoesNotFit, InvalidInput
from tensor_parallel.planner.shard import Shard
from tests import checkpoints

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The directory of a family's checkpoint, made once."""
    root, made = tmp_path_factory.mktemp("families"), {}

    def get(family: str) -> Path:
        if family not in made:
            made[family] = checkpoints.FAMILIES[family](root / family)
        return made[family]

    return get


@pytest.fixture
def bert(saved: Callable[[str], Path], tmp_path: Path) -> Path:
    """A copy of the BERT checkpoint that a test may damage."""
    return Path(shutil.copytree(saved("bert"), tmp_path / "bert"))


def reference(path: Path, build: type[Any]) -> dict[str, torch.Tensor]:
    model = build.from_pretrained(path)
    return dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))


def edit_config(path: Path, **changes: Any) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | changes))


def edit_tensors(path: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(path / "model.safetensors")
    edit(tensors)
    save_file(tensors, path / "model.safetensors")


@pytest.mark.parametrize("family", checkpoints.FAMILIES)
@pytest.mark.parametrize("ranks", [1, 3])
def test_every_slice_is_what_transformers_loads(family: str, ranks: int, saved: Callable[[str], Path]) -> None:
    path = saved(family)
    source = open_source(path, path.parent)
    model = source.build_meta()
    want = reference(path, type(model))
    assert set(want) == set(source.tensors())
    for dim in (0, 1):
        shards = {
            name: Shard.even(dim, value.shape[dim], ranks) if value.ndim > dim else Shard.replicated()
            for name, value in want.items()
        }
        for rank in range(ranks):
            loaded = load_shards(source, shards, rank, device=CPU)
            for name, value in want.items():
                part = shards[name].take(value.detach(), rank)
                assert torch.equal(loaded.tensors[name], part), name
                assert torch.equal(source.read(name, shards[name], rank), part), name
    assert source.unused == ()


@pytest.mark.parametrize("family", checkpoints.FAMILIES)
def test_no_conversion_needs_a_whole_tensor(family: str, saved: Callable[[str], Path]) -> None:
    for value in open_source(saved(family)).tensors().values():
        if isinstance(value, LazyTensor):
            out = torch.empty(value.shape, dtype=value.dtype)
            assert not any(isinstance(job, Compute) for job in value.node.jobs(whole(value.shape), out))


@pytest.mark.parametrize("family", checkpoints.FAMILIES)
def test_the_model_has_no_weights_but_its_buffers(family: str, saved: Callable[[str], Path]) -> None:
    model = open_source(saved(family)).build_meta()
    assert all(parameter.is_meta for parameter in model.parameters())
    assert not any(buffer.is_meta for buffer in model.buffers())
    assert not model.training
    assert getattr(model.config, "use_cache", False) is False


@pytest.mark.parametrize(
    ("family", "name", "alias"),
    [
        ("gpt2", "transformer.wte.weight", "lm_head.weight"),
        ("t5", "shared.weight", "lm_head.weight"),
        ("t5", "shared.weight", "decoder.embed_tokens.weight"),
        ("bert", "bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight"),
    ],
)
def test_tied_weights_stay_one(family: str, name: str, alias: str, saved: Callable[[str], Path]) -> None:
    source = open_source(saved(family))
    assert source.tensors()[name] is source.tensors()[alias]
    model = source.build_meta()
    assert model.get_parameter(name) is model.get_parameter(alias)
    loaded = load_shards(source, dict.fromkeys(source.tensors(), Shard.replicated()), 0, device=CPU)
    assert loaded.tensors[name] is loaded.tensors[alias]
    assert loaded.nbytes == source.total_bytes


def test_the_checkpoints_dtype_is_kept_unless_another_is_asked_for(saved: Callable[[str], Path]) -> None:
    path = saved("llama")
    assert {value.dtype for name, value in open_source(path).tensors().items() if "proj" in name} == {torch.bfloat16}
    source = open_source(path, options={"dtype": "float32"})
    name = "model.layers.0.mlp.down_proj.weight"
    want = reference(path, type(source.build_meta()))[name].float()
    assert torch.equal(source.read(name, Shard.even(1, want.shape[1], 2), 1), want.chunk(2, 1)[1])


def test_a_head_is_stripped_or_missing(saved: Callable[[str], Path]) -> None:
    source = open_source(saved("bert"), options={"task": "feature-extraction"})
    with pytest.raises(CheckpointError, match=r"missing.*pooler\.dense"):
        source.build_meta()  # a masked-LM checkpoint has no pooler, and a random one would be served
    source = open_source(saved("gpt2"), options={"architecture": "GPT2Model"})
    want = reference(saved("gpt2"), type(source.build_meta()))
    assert all(torch.equal(source.read(name, Shard.replicated(), 0), value) for name, value in want.items())


def test_a_base_models_checkpoint_serves_under_a_head_that_shares_its_weights(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel, GPT2Model

    model = GPT2Model(GPT2Config(vocab_size=50, n_positions=32, n_embd=16, n_layer=1, n_head=2))
    model.save_pretrained(tmp_path)
    source = open_source(tmp_path, options={"task": "text-generation"})
    assert type(source.build_meta()) is GPT2LMHeadModel
    assert torch.equal(source.read("lm_head.weight", Shard.replicated(), 0), model.wte.weight)


def test_tensors_of_no_use_are_reported_and_ignored(bert: Path, caplog: pytest.LogCaptureFixture) -> None:
    edit_tensors(
        bert,
        lambda tensors: tensors.update({"extra.weight": torch.ones(2), "bert.embeddings.position_ids": torch.ones(2)}),
    )
    source = open_source(bert, bert.parent)
    source.build_meta()
    assert source.unused == ("extra.weight",)  # stored position ids are an old habit, which transformers knows of
    assert "extra.weight" in caplog.text


def test_weights_stored_under_old_names_are_found(bert: Path) -> None:
    def rename(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if "LayerNorm" in name]:
            tensors[name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")] = (
                tensors.pop(name)
            )

    edit_tensors(bert, rename)
    source = open_source(bert)
    want = reference(bert, type(source.build_meta()))
    assert all(torch.equal(source.read(name, Shard.replicated(), 0), value) for name, value in want.items())


def test_a_tie_that_the_values_contradict_is_not_made(tmp_path: Path, saved: Callable[[str], Path]) -> None:
    path = Path(shutil.copytree(saved("gpt2"), tmp_path / "gpt2"))
    edit_tensors(path, lambda tensors: tensors.update({"lm_head.weight": torch.randn(101, 48)}))
    source = open_source(path)
    assert source.tensors()["lm_head.weight"] is not source.tensors()["transformer.wte.weight"]


DAMAGE: dict[str, tuple[str, Callable[[Path], object]]] = {
    "missing tensor": (
        r"missing from the checkpoint: bert\.encoder\.layer\.1\.output\.dense\.weight",
        lambda path: edit_tensors(path, lambda t: dict.pop(t, "bert.encoder.layer.1.output.dense.weight")),
    ),
    "wrong shape": (
        r"cls\.predictions\.bias is \(5,\), the model needs \(99,\)",
        lambda path: edit_tensors(path, lambda t: t.update({"cls.predictions.bias": torch.ones(5)})),
    ),
    "truncated": (
        "truncated",
        lambda path: (path / "model.safetensors").write_bytes((path / "model.safetensors").read_bytes()[:-99]),
    ),
    "no weights": (r"model\.safetensors is missing", lambda path: (path / "model.safetensors").unlink()),
    "pickled": (
        r"pytorch_model\.bin: pickled",
        lambda path: (path / "model.safetensors").rename(path / "pytorch_model.bin"),
    ),
    "no index": (
        r"index\.json is missing",
        lambda path: (path / "model.safetensors").rename(path / "model-00001-of-00002.safetensors"),
    ),
    "no config": (r"config\.json is missing", lambda path: (path / "config.json").unlink()),
    "config is no JSON": ("not valid JSON", lambda path: (path / "config.json").write_text("{")),
    "config is a list": ("not a JSON object", lambda path: (path / "config.json").write_text("[]")),
    "no model type": ("model_type", lambda path: edit_config(path, model_type=None)),
    "unknown model type": ("not known", lambda path: edit_config(path, model_type="nothing")),
    "unknown class": ("not a model class", lambda path: edit_config(path, architectures=["Nothing"])),
    "class of another kind": ("not a model class", lambda path: edit_config(path, architectures=["BertTokenizer"])),
    "path as class": ("not a model class", lambda path: edit_config(path, architectures=["os.system"])),
    "sizes that do not fit": ("cannot be built", lambda path: edit_config(path, num_attention_heads=5)),
    "wrong kind of size": (
        "not a valid bert config|cannot be built",
        lambda path: edit_config(path, hidden_size="large"),
    ),
    "quantised": ("quantised", lambda path: edit_config(path, quantization_config={"quant_method": "gptq"})),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_checkpoint_is_refused_by_name(what: str, bert: Path) -> None:
    reason, damage = DAMAGE[what]
    damage(bert)
    with pytest.raises(CheckpointError, match=reason):
        open_source(bert, bert.parent).build_meta()


def test_the_index_is_checked(saved: Callable[[str], Path], tmp_path: Path) -> None:
    path = Path(shutil.copytree(saved("llama"), tmp_path / "llama"))
    index = json.loads((path / "model.safetensors.index.json").read_text())
    name, file = next(iter(index["weight_map"].items()))

    def with_map(**changes: str) -> None:
        (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index["weight_map"] | changes}))

    with_map(nothing=file)
    with pytest.raises(CheckpointError, match="places tensor nothing"):
        open_source(path)
    with_map(**{name: "../other.safetensors"})
    with pytest.raises(CheckpointError, match="weight_map"):
        open_source(path)
    with_map(**{name: "gone.safetensors"})
    with pytest.raises(CheckpointError, match=r"gone\.safetensors is missing"):
        open_source(path)


def test_code_named_by_a_config_is_never_looked_at(bert: Path) -> None:
    (bert / "evil.py").write_text("raise SystemExit('ran')")
    edit_config(
        bert,
        auto_map={"AutoModel": "evil.Model"},
        attn_implementation="kernels-community/evil",
        name_or_path="evil/evil",
    )
    model = open_source(bert).build_meta()
    assert model.config._attn_implementation == "sdpa"
    assert type(model).__module__.startswith("transformers.models.bert")


def test_links_out_of_the_root_are_denied(bert: Path, tmp_path: Path) -> None:
    (bert / "model.safetensors").rename(tmp_path / "weights")
    (bert / "model.safetensors").symlink_to(tmp_path / "weights")
    with pytest.raises(AccessDenied):
        open_source(bert, bert)
    assert open_source(bert, bert.parent).total_bytes > 0  # a link from one place of the root to another


def test_inputs_are_those_the_model_takes(saved: Callable[[str], Path]) -> None:
    names = {family: sorted(open_source(saved(family)).example_inputs()) for family in checkpoints.FAMILIES}
    decoder = ["attention_mask", "input_ids"]
    assert names == {
        "bert": ["attention_mask", "input_ids", "token_type_ids"],
        "gpt2": decoder,
        "llama": decoder,
        "mixtral": decoder,
        "t5": ["attention_mask", "decoder_input_ids", "input_ids"],
    }
    source = open_source(saved("bert"), options={"inputs": ["input_ids"]})
    assert list(source.example_inputs()) == ["input_ids"]
    assert source.default_inputs() == {}
    with pytest.raises(InvalidInput, match="pixel_values"):
        open_source(saved("bert"), options={"inputs": ["pixel_values"]}).build_meta()
    spec = {"name": "inputs_embeds", "dtype": "float32", "shape": [None, -1, 48]}
    given = open_source(saved("bert"), options={"inputs": [spec]}).example_inputs()
    assert {name: (value.dtype, value.shape[-1]) for name, value in given.items()} == {
        "inputs_embeds": (torch.float32, 48)
    }


@pytest.mark.parametrize(
    "options",
    [
        {"nothing": 1},
        {"dtype": "int8"},
        {"dtype": 3},
        {"inputs": "input_ids"},
        {"inputs": [{"name": "x"}]},
        {"inputs": [{"name": "x", "dtype": "float32", "shape": [-2]}]},
        {"task": 4},
        {"kwargs": []},
        {"inputs": [{"name": "x", "dtype": "int64", "shape": [1], "low": 3, "high": 2}]},
    ],
)
def test_malformed_options_are_refused(options: dict[str, Any], saved: Callable[[str], Path]) -> None:
    with pytest.raises(InvalidInput):
        open_source(saved("bert"), options=options)


def test_the_digest_tells_checkpoints_apart(bert: Path) -> None:
    digest = open_source(bert).digest()
    assert digest == open_source(bert).digest()
    assert digest != open_source(bert, options={"dtype": "bfloat16"}).digest()
    edit_tensors(
        bert, lambda tensors: tensors.update({"cls.predictions.bias": torch.ones(99)})
    )  # same header, other content
    changed = open_source(bert).digest()
    assert changed != digest
    edit_config(bert, layer_norm_eps=1e-3)
    assert open_source(bert).digest() not in (digest, changed)


def test_the_real_checkpoint_is_read_whole() -> None:
    path = checkpoints.minilm()
    source = open_source(path, path.parent)
    want = reference(path, type(source.build_meta()))
    shards = dict.fromkeys(want, Shard.replicated())
    loaded = load_shards(source, shards, 0, device=CPU)
    assert all(torch.equal(loaded.tensors[name], value) for name, value in want.items())


def test_building_a_bfloat16_model_changes_no_other_threads_default(saved: Callable[[str], Path]) -> None:
    seen: set[torch.dtype] = set()
    stop = threading.Event()

    def serve() -> None:
        while not stop.is_set():
            seen.update({torch.get_default_dtype(), torch.ones(1).dtype, torch.tensor(1.0).dtype})

    other = threading.Thread(target=serve)
    other.start()
    try:
        for _ in range(5):
            open_source(saved("llama")).build_meta()
    finally:
        stop.set()
        other.join(10)
    assert seen == {torch.float32}


def test_a_default_dtype_for_one_thread_is_what_torch_would_use() -> None:
    makers: list[Callable[[], Any]] = [
        lambda: torch.ones(2),
        lambda: torch.arange(3),
        lambda: torch.arange(0.0, 1.0, 0.25),
        lambda: torch.tensor([[1.0], [2]]),
        lambda: torch.tensor([1, 2]),
        lambda: torch.full((2,), 3),
        lambda: torch.full((2,), 0.5),
        lambda: torch.linspace(0, 1, 3),
        lambda: torch.empty(2),
        lambda: torch.nn.Linear(2, 2).weight,
        lambda: torch.zeros(2, dtype=torch.float64),
        lambda: torch.as_tensor(1.5),
        lambda: torch.eye(2),
        lambda: torch.tensor(True),
        lambda: torch.normal(0.0, 1.0, size=(2,)),
        lambda: torch.get_default_dtype(),
    ]
    with default_dtype(torch.bfloat16):
        here = [getattr(made, "dtype", made) for made in (make() for make in makers)]
    torch.set_default_dtype(torch.bfloat16)
    try:
        there = [getattr(made, "dtype", made) for made in (make() for make in makers)]
    finally:
        torch.set_default_dtype(torch.float32)
    assert here == there


def test_a_config_that_asks_for_absurd_tables_is_refused(bert: Path) -> None:
    edit_config(bert, max_position_embeddings=1 << 44)
    with pytest.raises((CheckpointError, DoesNotFit)):
        open_source(bert).build_meta()


def test_names_that_no_model_has_are_only_unused(bert: Path) -> None:
    odd = {"": torch.ones(1), "..": torch.ones(1), "a" * 5000: torch.ones(1), "bert.(?P<x>.": torch.ones(1)}
    edit_tensors(bert, lambda tensors: tensors.update(odd))
    source = open_source(bert)
    source.build_meta()
    assert len(source.unused) == 4


def test_arguments_override_the_config(saved: Callable[[str], Path]) -> None:
    path = saved("bert")
    usual = open_source(path)
    source = open_source(path, options={"kwargs": {"num_hidden_layers": 1}})
    assert len(source.build_meta().bert.encoder.layer) == 1
    assert any("layer.1" in name for name in source.unused)
    assert source.digest() != usual.digest()
    assert len(usual.build_meta().bert.encoder.layer) == 2
    source = open_source(path, options={"kwargs": {"id2label": {"0": "no"}}})
    assert source.build_meta().config.id2label == {0: "no"}


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"num_hidden_layer": 1}, "bert config has no num_hidden_layer"),
        ({"to_dict": 1}, "has no to_dict"),
        ({"model_type": "gpt2"}, "model_type cannot be overridden"),
        ({"auto_map": {"AutoModel": "evil.Evil"}}, "auto_map cannot be overridden"),
        ({"_attn_implementation": "flash_attention_2"}, "_attn_implementation cannot be overridden"),
    ],
)
def test_arguments_that_the_config_does_not_have_are_refused(
    arguments: dict[str, Any], reason: str, saved: Callable[[str], Path]
) -> None:
    with pytest.raises(InvalidInput, match=reason):
        open_source(saved("bert"), options={"kwargs": arguments})


def test_an_argument_of_the_wrong_type_is_named_with_the_reason(saved: Callable[[str], Path]) -> None:
    with pytest.raises(CheckpointError, match=r"num_hidden_layers': TypeError.*int"):
        open_source(saved("bert"), options={"kwargs": {"num_hidden_layers": "abc"}}).build_meta()


def test_given_inputs_are_the_models_own(saved: Callable[[str], Path]) -> None:
    spec = {"name": "pixels", "dtype": "float32", "shape": [None, 3]}
    with pytest.raises(InvalidInput, match="BertForMaskedLM takes no pixels"):
        open_source(saved("bert"), options={"inputs": [spec]}).build_meta()
