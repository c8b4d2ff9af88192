"""Models of each architecture as GGUF files: their tensors, types and tokenizers, and what llama.cpp computes of them."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import gguf as library
import numpy as np
import pytest
import torch
from gguf import GGUFReader
from lab import fields as set_fields
from tokenizers import Regex, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import mptk
from benchmarks import gguf_models as tiny
from mptk import Plan
from mptk.compile.cut import open_pruned_weights
from mptk.errors import OutputError, TargetError
from mptk.features.gguf import GgufType, api, architectures, tokenizer
from mptk.features.gguf.architectures import ARCHITECTURES
from mptk.features.gguf.folder import GgufFolder
from mptk.features.gguf.weights import GgufWeights, arrange_weights
from mptk.files.outputs import check_file
from mptk.io import models
from mptk.ir import Weights
from mptk.testing import expect_error
from mptk.trust import NO_CODE
from tests.broken import gguf as gguf_files

CLOSE, ROUNDED = 2e-5, 1e-2
"""Largest difference of a log probability; where llama.cpp computes GELU by a table of half precision."""


def write(folder: Path, out: Path, kind: GgufType = "auto") -> GgufFolder:
    """A whole model's folder as a file."""
    weights, config = open_pruned_weights(folder, trust=NO_CODE), models.load_config(str(folder))
    made = GgufFolder(folder, weights, Plan({}), config, None, kind)
    made.write(out)
    return made


def fields(file: Path) -> dict[str, Any]:
    return {name: field.contents() for name, field in GGUFReader(file).fields.items()}


@pytest.mark.parametrize("name", tiny.MODELS)
def test_a_file_has_every_number_and_llama_cpp_computes_what_transformers_does(name, tmp_path):
    """llama.cpp comes as a library with ``.[bench]``; without it only the numbers are counted."""
    assert {name.partition(",")[0] for name in tiny.MODELS} == set(ARCHITECTURES)
    folder, file = tiny.save(name, tmp_path / "model"), tmp_path / "out.gguf"
    write(folder, file)
    own = sum(int(tensor.n_elements) for tensor in GGUFReader(file).tensors if not tensor.name.startswith("rope_"))
    stored = {tensor.data_ptr(): tensor.numel() for tensor in tiny.model(name).state_dict().values()}
    assert own == sum(stored.values())
    if importlib.util.find_spec("xllamacpp") is not None:
        gelu = "gelu" in ARCHITECTURES[name.partition(",")[0]].activations
        difference = (tiny.llama_cpp(file, tiny.IDS.tolist()) - tiny.expected(folder)).abs().max()
        assert difference < (ROUNDED if gelu else CLOSE)


def test_layers_before_those_with_experts_are_counted_and_experts_that_llama_cpp_would_not_find_refused(tmp_path):
    """It takes the width of shared experts, and the place of layers without experts, from other numbers."""
    made = write(tiny.save("glm4_moe", tmp_path / "model"), tmp_path / "out.gguf")
    assert [(layer.ffn, layer.experts) for layer in made.layers] == [(128, 0), (64, 4), (64, 4)]
    said = {"feed_forward_length": 128, "leading_dense_block_count": 1, "expert_feed_forward_length": 64}
    said |= {"expert_shared_count": 1, "expert_gating_func": library.ExpertGatingFuncType.SIGMOID}
    assert fields(tmp_path / "out.gguf").items() >= {f"glm4moe.{name}": value for name, value in said.items()}.items()
    base, dense = ARCHITECTURES["glm4_moe"], tiny.model("glm4_moe").state_dict()

    def held(state):
        return GgufWeights(arrange_weights(Weights(state), base, 32, tied=False), base, 32, "f32")

    assert held(dense).leading == 1
    shared = {name: weight for name, weight in dense.items() if ".shared_experts." in name}
    narrow = {name: weight[:, :40] if "down_proj" in name else weight[:40] for name, weight in shared.items()}
    swapped = {name.translate(str.maketrans("01", "10")) if ".mlp." in name else name: w for name, w in dense.items()}
    for wrong in (dense | narrow, swapped):
        with expect_error(TargetError, name="glm4moe"):
            held(wrong)


@pytest.fixture(scope="module")
def qwen(laboratory):
    return laboratory.keep("gguf/qwen3", lambda folder: tiny.save("qwen3", folder))


@pytest.mark.parametrize(
    ("kind", "most"), [("q8_0", 0.004), ("q5_1", 0.02), ("q5_0", 0.04), ("q4_1", 0.04), ("q4_0", 0.07)]
)
def test_matrices_are_quantised(qwen, kind, most, tmp_path):
    """``most``: the largest error of a number, of weights of standard deviation 0.1."""
    write(qwen, tmp_path / "out.gguf", kind)
    found = {tensor.name: tensor for tensor in GGUFReader(tmp_path / "out.gguf").tensors}
    assert found["blk.0.ffn_up.weight"].tensor_type.name == kind.upper()
    assert found["token_embd.weight"].tensor_type.name == "Q8_0"
    assert found["blk.0.ffn_norm.weight"].tensor_type.name == "F32"
    weights = tiny.model("qwen3").state_dict()
    for name, own in (("ffn_down", "mlp.down_proj"), ("attn_q", "self_attn.q_proj")):
        tensor = found[f"blk.1.{name}.weight"]
        read = library.dequantize(tensor.data, tensor.tensor_type)
        assert np.abs(read - weights[f"model.layers.1.{own}.weight"].numpy()).max() < most
    assert fields(tmp_path / "out.gguf")["general.file_type"] == library.LlamaFileType[f"MOSTLY_{kind.upper()}"]


def test_rows_that_no_block_divides_are_float16(tmp_path):
    model = tiny.model("qwen3")
    for layer in model.model.layers:
        layer.mlp.down_proj.weight = torch.nn.Parameter(layer.mlp.down_proj.weight[:, :40].clone())
        for part in (layer.mlp.gate_proj, layer.mlp.up_proj):
            part.weight = torch.nn.Parameter(part.weight[:40].clone())
    model.config.intermediate_size = 40
    model.save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    made = write(tmp_path / "model", tmp_path / "out.gguf", "q8_0")
    assert made.notes == ["3 matrices are float16, as 32 does not divide their rows"]
    kinds = {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(tmp_path / "out.gguf").tensors}
    assert kinds["blk.0.ffn_down.weight"] == "F16"
    assert kinds["blk.0.ffn_up.weight"] == "Q8_0"


HOW = {"method": "magnitude", "data": "random", "samples": 1, "length": 24, "eval_windows": 1, "onnx": False}


@pytest.mark.always
def test_a_pruned_folder_needs_no_file_of_the_dense_model(qwen, tmp_path):
    mptk.prune(str(qwen), tmp_path / "out", widths={"kv_groups": 1, "ffn": 64}, align=8, tolerance=1.0, **HOW)
    made = api.gguf(tmp_path / "out", tmp_path / "out.gguf")
    assert {(layer.heads, layer.groups, layer.ffn) for layer in made.layers} == {(2, 1, 64)}
    check_file(tmp_path / "out.gguf", "GGUF")
    (tmp_path / "dense.gguf").write_bytes(b"GGUF of somebody")
    with expect_error(OutputError, name=tmp_path / "dense.gguf"):
        api.gguf(tmp_path / "out", tmp_path / "dense.gguf")
    read = fields(tmp_path / "out.gguf")
    assert read["general.name"] == f"{qwen.name}, pruned by {mptk.Report.read(tmp_path / 'out').sparsity:.0%}"
    assert read["qwen3.attention.head_count"] == 2
    assert read["qwen3.feed_forward_length"] == 64
    pytest.importorskip("xllamacpp")
    difference = tiny.llama_cpp(tmp_path / "out.gguf", tiny.IDS.tolist()) - tiny.expected(tmp_path / "out")
    assert difference.abs().max() < CLOSE


def test_a_smaller_vocabulary_is_the_folders(qwen, tmp_path):
    text = ["the quick jars of honey\n"] * 40
    words = mptk.prune(str(qwen), tmp_path / "out", sparsity=0.0, vocabulary=text, tolerance=1.0, **HOW).tokenizer
    api.gguf(tmp_path / "out", tmp_path / "out.gguf")
    read = fields(tmp_path / "out.gguf")
    assert read["tokenizer.ggml.tokens"] == words.convert_ids_to_tokens(range(len(words)))
    assert read["qwen3.vocab_size"] == len(words) < tiny.VOCAB


# ---- what llama.cpp computes otherwise ----


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("qwen3", {"model_type": "opt"}),
        ("qwen3", {"hidden_act": "relu"}),
        ("qwen3_moe", {"norm_topk_prob": False}),
        ("gemma3_text", {"layer_types": ["full_attention"] * 7}),
        ("gemma2", {"query_pre_attn_scalar": 48}),
        ("smollm3", {"no_rope_layers": [1] * 5}),
    ],
)
def test_a_config_that_llama_cpp_does_not_compute(name, changes):
    config = tiny.model(name).config
    config.update(changes)
    with expect_error(TargetError, name=changes.get("model_type", name)):
        architectures.find_architecture(config)


def test_rotary_embeddings_that_llama_cpp_does_not_have_and_a_window_that_it_ignores(tmp_path):
    folder, rope = tiny.save("qwen3", tmp_path / "model"), {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    set_fields("config.json", rope_parameters=rope)(folder)
    with expect_error(TargetError, name="qwen3"):
        write(folder, tmp_path / "out.gguf")
    folder = tiny.save("mistral", tmp_path / "windowed")
    assert write(folder, tmp_path / "out.gguf").notes == []
    set_fields("config.json", sliding_window=16)(folder)
    (note,) = write(folder, tmp_path / "out.gguf").notes
    assert "after 16 tokens its results differ" in note


def test_heads_that_are_not_the_hidden_size(tmp_path):
    config = tiny.model("starcoder2").config
    weights = open_pruned_weights(tiny.save("starcoder2", tmp_path / "model"), trust=NO_CODE)
    cut = [name for name in weights if "q_proj" in name or name.endswith("o_proj.weight")]
    rows, columns = (lambda tensor: tensor[:32]), (lambda tensor: tensor[:, :32])
    halves = {name: columns if "o_proj" in name else rows for name in cut}
    with expect_error(TargetError, name="portable"):
        GgufFolder(tmp_path / "model", weights.with_edits(halves), Plan({}), config, None, "auto")


# ---- tokenizers ----


@pytest.mark.parametrize("make", [tiny.tokenizer, gguf_files.spaced])
def test_llama_cpp_reads_text_as_the_folder_does(make, tmp_path):
    pytest.importorskip("xllamacpp")
    tiny.model("llama").save_pretrained(tmp_path / "model")
    make().save_pretrained(tmp_path / "model")
    write(tmp_path / "model", tmp_path / "out.gguf")
    text = "the quick wizards mix ü jars"
    ids = torch.tensor(make()(text).input_ids)
    difference = tiny.llama_cpp(tmp_path / "out.gguf", text) - tiny.expected(tmp_path / "model", ids)
    assert difference.abs().max() < CLOSE


QWEN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA = QWEN.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def split_by(regex: str) -> pre_tokenizers.PreTokenizer:
    bytewise = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(regex), "isolated"), bytewise])


DIGITS = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)])


@pytest.mark.parametrize(
    ("splitter", "merged", "name"),
    [
        (pre_tokenizers.ByteLevel(add_prefix_space=False), False, "gpt-2"),
        (DIGITS, False, "smollm"),
        (split_by(QWEN), False, "qwen2"),
        (split_by(LLAMA), True, "llama-bpe"),
        (split_by(LLAMA), False, "dbrx"),
        (split_by(TEKKEN), True, "tekken"),
    ],
)
def test_how_text_is_split_has_a_name(splitter, merged, name, qwen, tmp_path):
    words = tiny.tokenizer()
    words.backend_tokenizer.pre_tokenizer = splitter
    words.save_pretrained(tmp_path)
    set_fields("tokenizer.json", model__ignore_merges=merged)(tmp_path)
    words = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    writer = library.GGUFWriter(tmp_path / "out.gguf", "qwen3")
    tokenizer.write_tokenizer(writer, tmp_path, words, tiny.VOCAB + 4)
    written = writer.kv_data[0]
    assert written["tokenizer.ggml.pre"].value == name
    assert written["tokenizer.ggml.tokens"].value[-1] == f"[PAD{tiny.VOCAB + 3}]"


@pytest.mark.parametrize(
    "change",
    [
        {"pre_tokenizer": {"type": "Whitespace"}},
        {"normalizer": {"type": "Lowercase"}},
        {"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}},
    ],
)
def test_a_tokenizer_that_llama_cpp_does_not_have(change, tmp_path):
    tiny.tokenizer().save_pretrained(tmp_path)
    set_fields("tokenizer.json", **change)(tmp_path)
    words = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    with expect_error(TargetError, name="like"):
        tokenizer.write_tokenizer(library.GGUFWriter(tmp_path / "out.gguf", "qwen3"), tmp_path, words, tiny.VOCAB)
