"""onnxruntime-genai loads our folders and writes what transformers writes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import onnx
import pytest
import torch
import toy_checkpoints as toys
from onnx import TensorProto, helper
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig

import mptk
from mptk.tasks.genai import write_genai_config

PROMPTS = ("the quick", "jars of honey", "seven wizards mix", "a", "lazy dog while the")
NEW = 40
SETTINGS = mptk.Settings(
    method="magnitude", sparsity=0.2, data="random", samples=2, length=24, multiple=2, tolerance=0.1
)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dense")
    model = toys.llama()
    for p in model.parameters():
        torch.nn.init.normal_(p, mean=float(p.ndim == 1), std=0.3)
    model.save_pretrained(folder)
    toys.tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pruned(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Feed-forward units and whole groups of heads are cut."""
    out = tmp_path_factory.mktemp("pruned") / "out"
    mptk.prune(str(source), out, replace(SETTINGS, widths={"kv_groups": 1}, families=("kv_groups", "ffn")))
    return out


def test_the_config_says_what_the_graph_is(pruned: Path) -> None:
    said = json.loads((pruned / "genai_config.json").read_text())
    config = json.loads((pruned / "config.json").read_text())
    decoder = said["model"]["decoder"]
    assert (pruned / decoder["filename"]).is_file()
    for name in ("head_dim", "hidden_size", "num_attention_heads", "num_key_value_heads", "num_hidden_layers"):
        assert decoder["head_size" if name == "head_dim" else name] == config[name]
    assert decoder["num_key_value_heads"] == 1
    assert (said["model"]["vocab_size"], said["model"]["context_length"]) == (300, 70)
    assert (said["model"]["eos_token_id"], said["model"]["pad_token_id"]) == (1, 2)
    assert said["search"]["past_present_share_buffer"] is False


def test_layers_of_several_widths_and_models_without_an_end(tmp_path: Path) -> None:
    def graph(*heads: int) -> None:
        past = [
            helper.make_tensor_value_info(f"past_key_values.{i}.key", TensorProto.FLOAT, ["b", n, "p", 8])
            for i, n in enumerate(heads)
        ]
        logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["b", "s", 9])
        onnx.save(helper.make_model(helper.make_graph([], "g", past, [logits])), tmp_path / "model.onnx")

    config = LlamaConfig(bos_token_id=None, eos_token_id=None, pad_token_id=None)
    graph(2, 3)
    write_genai_config(config, None, tmp_path, "model.onnx")
    assert not (tmp_path / "genai_config.json").exists()
    graph(2, 2)
    write_genai_config(config, None, tmp_path, "model.onnx")
    model = json.loads((tmp_path / "genai_config.json").read_text())["model"]
    assert (model["eos_token_id"], model["pad_token_id"], "bos_token_id" in model) == (-1, 0, False)
    write_genai_config(config, GenerationConfig(eos_token_id=[4, 5], top_k=7), tmp_path, "model.onnx")
    said = json.loads((tmp_path / "genai_config.json").read_text())
    assert (said["model"]["eos_token_id"], said["model"]["pad_token_id"], said["search"]["top_k"]) == ([4, 5], 4, 7)


def test_it_writes_what_transformers_writes(pruned: Path) -> None:
    genai = pytest.importorskip("onnxruntime_genai")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(pruned), AutoTokenizer.from_pretrained(pruned)
    other = genai.Model(str(pruned))
    words = genai.Tokenizer(other)
    written = set()
    for prompt in PROMPTS:
        inputs = tokenizer(prompt, return_tensors="pt")
        length = inputs.input_ids.shape[1] + NEW
        expected = model.generate(**inputs, max_length=length, max_new_tokens=None, do_sample=False)[0].tolist()
        params = genai.GeneratorParams(other)
        params.set_search_options(max_length=length, do_sample=False)
        generator = genai.Generator(other, params)
        generator.append_tokens(words.encode(prompt))
        while not generator.is_done():
            generator.generate_next_token()
        assert [int(i) for i in generator.get_sequence(0)] == expected
        written |= set(expected)
    assert len(written) > 20
