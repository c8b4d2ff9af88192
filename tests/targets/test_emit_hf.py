"""The emitted folder: stock transformers loads it with nothing of mptk, and it appears whole or not at all.

It reaches for passes.targets.stock: the checkpoint is written without a run.
"""

from __future__ import annotations

import json
import weakref
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from mptk.errors import TargetError
from mptk.ir import Lazy, Weights
from mptk.publish.folder import publish
from mptk.testing import expect_error
from passes.targets.stock.config import StockConfig
from passes.targets.stock.emit import write_checkpoint

VOCAB = 101


SIZES = {"hidden_size": 48, "intermediate_size": 80, "vocab_size": VOCAB, "head_dim": 10}
HEADS = {"num_attention_heads": 6, "num_key_value_heads": 2}


def llama(**more: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, **HEADS, num_hidden_layers=3, rope_theta=5000.0, **more)).eval()


def mixtral() -> MixtralForCausalLM:
    torch.manual_seed(0)
    return MixtralForCausalLM(MixtralConfig(**SIZES, **HEADS, num_hidden_layers=2, num_local_experts=5)).eval()


def write(
    state: Mapping[str, Tensor], model: PreTrainedModel, folder: Path, tokenizer: PreTrainedTokenizerFast | None = None
) -> Path:
    """A published folder with the checkpoint."""
    with publish(folder) as temporary:
        write_checkpoint(state, stock_of(model), model, tokenizer, temporary)
    return folder


def stock_of(model: PreTrainedModel) -> StockConfig:
    return StockConfig(type(model), model.config, {})


def logits(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return model(tokens).logits


@pytest.fixture
def tokenizer():
    inner = Tokenizer(WordLevel({"[UNK]": 0, "one": 1, "two": 2}, unk_token="[UNK]"))
    inner.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="[UNK]")


@pytest.fixture
def tokens():
    return torch.arange(26).reshape(2, 13) * 7 % VOCAB


def test_stock_transformers_loads_it(tmp_path, tokenizer, tokens):
    model = llama(tie_word_embeddings=True)
    model.generation_config = GenerationConfig(max_new_tokens=17)
    folder = write(model.state_dict(), model, tmp_path / "runs" / "small", tokenizer)
    found, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    assert AutoTokenizer.from_pretrained(folder)("one two")["input_ids"] == [1, 2]
    assert found.generation_config.max_new_tokens == 17
    assert (type(found), found.dtype) == (LlamaForCausalLM, torch.float32)
    assert (logits(found, tokens) - logits(model, tokens)).abs().max() <= 1e-5
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["dtype"] == "float32"
    assert config["rope_theta"] == 5000.0  # at the top level too, for readers older than rope_parameters
    assert {path.name for path in tmp_path.joinpath("runs").iterdir()} == {"small"}


def test_tied_weights_are_stored_once_and_others_each_though_they_share_memory(tmp_path):
    model = llama(tie_word_embeddings=True)
    folder = write(model.state_dict(), model, tmp_path / "tied")
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert set(file.keys()) == model.state_dict().keys() - {"lm_head.weight"}
    model = llama()
    state = model.state_dict()
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    for name in [n for n in state if n.endswith("norm.weight")]:
        state[name] = state["model.norm.weight"]
    loaded = AutoModelForCausalLM.from_pretrained(write(state, model, tmp_path / "untied"))
    assert torch.equal(loaded.lm_head.weight, model.model.embed_tokens.weight)
    assert loaded.lm_head.weight is not loaded.model.embed_tokens.weight


def test_the_weights_set_the_dtype(tmp_path):
    model = llama().to(torch.bfloat16)
    write_checkpoint(model.state_dict(), stock_of(llama()), model, None, tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.dtype is torch.bfloat16
    assert all(torch.equal(t, model.state_dict()[name]) for name, t in loaded.state_dict().items())


def test_slices_are_stored_without_the_memory_they_came_from(tmp_path, tokens):
    model, up = llama(), "model.layers.1.mlp.up_proj.weight"
    state = model.state_dict()
    state["model.norm.weight"] = torch.cat([state["model.norm.weight"], torch.ones(1000)])[:48]
    state[up] = state[up].T.contiguous().T
    loaded = AutoModelForCausalLM.from_pretrained(write(state, model, tmp_path / "out"))
    assert (logits(loaded, tokens) - logits(model, tokens)).abs().max() <= 1e-5


class Made:
    """Lazy weights that exist only while someone holds them, and the most bytes that did so at once."""

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        self.alive: weakref.WeakSet[Tensor] = weakref.WeakSet()
        self.most, self.asked = 0, 0
        lazy = {name: Lazy(tensor.to("meta"), partial(self.make, tensor)) for name, tensor in state.items()}
        self.weights = Weights(lazy)

    def make(self, source: Tensor) -> Tensor:
        tensor = source.clone()
        self.alive.add(tensor)
        self.most = max(self.most, sum(t.nbytes for t in self.alive))
        self.asked += 1
        return tensor


@pytest.mark.parametrize("size", [600_000, 100_000])
@pytest.mark.parametrize("build", [llama, partial(llama, tie_word_embeddings=True), mixtral])
def test_the_files_are_those_of_save_pretrained_with_one_weight_in_memory(tmp_path, build, size):
    model = build().to(torch.bfloat16)
    model.model.norm.float()
    made = Made(model.state_dict())
    (mine := tmp_path / "mine").mkdir()
    write_checkpoint(made.weights, stock_of(model), model, None, mine, max_shard_size=size, portable=dict)
    model.save_pretrained(tmp_path / "theirs", max_shard_size=size)
    names = {path.name for path in mine.glob("*")}
    assert names == {path.name for path in (tmp_path / "theirs").glob("*")}
    if build is mixtral and size == 600_000:  # tied weights are compared, two at a time
        largest = max(tensor.nbytes for tensor in model.state_dict().values())
        assert (made.most, made.asked) == (largest, len(made.weights))
    assert ("model.safetensors.index.json" in names) == (size == 100_000)
    for name in names - {"config.json"}:
        assert (mine / name).read_bytes() == (tmp_path / "theirs" / name).read_bytes(), name
        assert (mine / name).stat().st_mode == (tmp_path / "theirs" / "config.json").stat().st_mode


@pytest.mark.parametrize(
    ("change", "weight"),
    [
        ({"model.norm.weight": None}, "model.norm.weight"),
        ({"extra": torch.zeros(3)}, "extra"),
        ({"model.norm.weight": torch.ones(47)}, "model.norm.weight"),
        ({"lm_head.weight": torch.zeros(VOCAB, 48)}, "lm_head.weight"),
    ],
    ids=["missing", "unknown", "of another shape", "tied, with other values"],
)
def test_weights_that_do_not_fit_are_refused(tmp_path, change, weight):
    model = llama(tie_word_embeddings="lm_head.weight" in change)
    state = {k: v for k, v in {**model.state_dict(), **change}.items() if v is not None}
    with expect_error(TargetError, name=weight):
        write(state, model, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
