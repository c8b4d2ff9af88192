"""A pruned model as a GGUF file: that of equal layers is the folder's model, that of others has llama.cpp's lists."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import toy_checkpoints as toys
from gguf import GGUFReader
from safetensors.torch import load_file, save_file

import mptk
from mptk import FamilyPlan, Plan, ProofError, testing
from mptk.errors import ChangedError, FileError, InputError, TargetError
from mptk.features.gguf import api
from mptk.features.gguf.folder import GgufFolder, Pattern
from mptk.features.gguf.weights import LayerWidths
from mptk.ir import Weights
from mptk.testing import expect_error
from tests.broken import gguf as gguf_files

FEW = {"data": "random", "samples": 1, "length": 24, "eval_windows": 1, "eval_length": 24, "onnx": False}
HOW = {"method": "magnitude", **FEW}


def write_dense(folder: Path) -> None:
    model, words = testing.make_llama(layers=3), testing.make_tokenizer()
    testing.save_model(model, folder, words)
    toys.write_gguf(model, words, folder / "dense.gguf")


@pytest.fixture(scope="module")
def dense(laboratory):
    """A folder with a checkpoint, and its GGUF file in it."""
    return laboratory.keep("gguf/dense", write_dense)


def logits(model: str | Path) -> torch.Tensor:
    ids = torch.arange(24)[None]
    with torch.no_grad():
        return mptk.load(str(model)).model(ids).logits


@pytest.mark.parametrize("widths", [{"q_heads": 2, "ffn": 40}, {"layers": 2, "ffn": 32}])
def test_equal_layers_are_read_as_the_model_of_the_folder(dense, widths, tmp_path):
    mptk.prune(str(dense), tmp_path / "out", widths=widths, align=8, tolerance=1.0, **HOW)
    layers = api.gguf(tmp_path / "out", tmp_path / "out.gguf", like=dense / "dense.gguf").layers
    config = mptk.load(str(tmp_path / "out")).model.config
    equal = LayerWidths(config.num_attention_heads, config.num_key_value_heads, config.intermediate_size)
    assert layers == [equal] * config.num_hidden_layers
    assert torch.equal(logits(tmp_path / "out.gguf"), logits(tmp_path / "out"))
    words = mptk.load(str(tmp_path / "out.gguf")).tokenizer
    assert words(testing.SENTENCES).input_ids == testing.make_tokenizer()(testing.SENTENCES).input_ids


def test_llama_cpp_does_not_fill_the_files_chat_template(tmp_path):
    """It would fill it when it opens the file, without bounds: this one never ends."""
    words = testing.make_tokenizer()
    words.chat_template = "{% for a in range(99999) %}" * 3 + "{% endfor %}" * 3
    testing.save_model(testing.make_llama(layers=1), tmp_path / "model", words)
    mptk.prune(str(tmp_path / "model"), tmp_path / "out", widths={"ffn": 40}, align=8, **HOW)
    assert not api.gguf(tmp_path / "out", tmp_path / "out.gguf").notes


def prune_layers(dense: Path, folder: Path) -> None:
    folder.mkdir()
    rows = {layer: (tuple(range(width)),) for layer, width in ((0, 40), (2, 24))}
    plan = {f"ffn.{n}": FamilyPlan(len(kept[0]), 64, {f"model.layers.{n}.mlp": kept}) for n, kept in rows.items()}
    Plan(plan).save(folder / "plan.json")
    mptk.prune(str(dense), folder / "out", plan=str(folder / "plan.json"), target="graph", **FEW)


@pytest.fixture(scope="module")
def ragged(dense, laboratory):
    """Feed-forward layers of 40, 64 and 24 channels."""
    return mptk.Pruned.open(laboratory.keep("gguf/ragged", lambda folder: prune_layers(dense, folder)) / "out")


def test_other_layers_are_lists_of_the_architecture_that_has_them(dense, ragged, tmp_path):
    layers = api.gguf(ragged.place, tmp_path / "out.gguf", like=dense / "dense.gguf").layers
    read = GGUFReader(tmp_path / "out.gguf")
    fields = {name: field.contents() for name, field in read.fields.items()}
    assert fields["general.architecture"] == "deci"
    assert fields["deci.feed_forward_length"] == [layer.ffn for layer in layers] == [40, 64, 24]
    assert fields["deci.attention.head_count"] == [6] * 3
    whole = GGUFReader(dense / "dense.gguf")
    assert fields["deci.rope.freq_base"] == whole.get_field("llama.rope.freq_base").contents()
    assert not [name for name in fields if name.startswith("llama.")]
    tensors = {tensor.name: torch.from_numpy(np.array(tensor.data)) for tensor in read.tensors}
    weights = load_file(ragged.place / "model.safetensors")
    assert torch.equal(tensors["blk.2.ffn_down.weight"], weights["model.layers.2.mlp.down_proj.weight"])
    assert torch.equal(tensors["blk.2.attn_norm.weight"], weights["model.layers.2.input_layernorm.weight"])
    assert len(tensors) == len(whole.tensors)
    proof = mptk.verify(tmp_path / "out.gguf", like=ragged.place, model=dense / "dense.gguf")
    assert [row.stage for row in proof] == ["GGUF fields", "GGUF tensors"]
    with expect_error(InputError, name="like"):
        mptk.verify(tmp_path / "out.gguf", like=ragged.place)
    for field, damage in (
        ("deci.rope.freq_base", gguf_files.times("rope.freq_base", 2)),
        ("rope.freq_base", gguf_files.drop("rope.freq_base")),
        ("deci.feed_forward_length[0]", gguf_files.item("feed_forward_length", 0, 64)),
        ("tokenizer.ggml.tokens", gguf_files.swap(gguf_files.TOKENS, 5, 6)),
    ):
        copy = Path(shutil.copyfile(tmp_path / "out.gguf", tmp_path / "copy.gguf"))
        damage(copy)
        with expect_error(ProofError, name=field):
            mptk.verify(copy, like=ragged.place, model=dense / "dense.gguf")


def test_llama_cpp_computes_what_the_graph_does(dense, ragged, tmp_path):
    """Needs ``.[bench]``, which brings llama.cpp as a library. Its cache is of float32 here; half is its default."""
    xllamacpp = pytest.importorskip("xllamacpp")
    api.gguf(ragged.place, tmp_path / "out.gguf", like=dense / "dense.gguf")
    params = xllamacpp.CommonParams()
    params.model.path = str(tmp_path / "out.gguf")
    params.n_ctx, params.n_parallel, params.n_gpu_layers, params.verbosity = 64, 1, 0, 0
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    ids = [20, 31, 5, 77, 8, 250, 9]
    asked = {"prompt": ids, "n_predict": 1, "max_tokens": 1, "temperature": 0.0, "logprobs": 10, "ignore_eos": True}
    said = xllamacpp.Server(params).handle_completions(asked)["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
    with torch.no_grad():
        expected = ragged.model(torch.tensor([ids]))[0, -1].log_softmax(-1)
    assert len(said) == 10
    for each in said:
        assert each["logprob"] == pytest.approx(float(expected[each["id"]]), abs=1e-4)


def test_weights_keep_their_type(dense, tmp_path):
    mptk.prune(str(dense), tmp_path / "half", widths={"ffn": 32}, tolerance=1.0, dtype="bfloat16", **HOW)
    api.gguf(tmp_path / "half", tmp_path / "half.gguf", like=dense / "dense.gguf")
    tensors = {tensor.name: tensor for tensor in GGUFReader(tmp_path / "half.gguf").tensors}
    assert tensors["blk.0.ffn_norm.weight"].tensor_type.name == "F32"
    found = tensors["blk.0.ffn_up.weight"]
    assert found.tensor_type.name == "BF16"
    stored = load_file(tmp_path / "half" / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]
    assert found.data.tobytes() == stored.view(torch.uint16).numpy().tobytes()


KEEP = FamilyPlan(8, 16, {"": (tuple(range(8)),)})


@pytest.mark.parametrize(
    ("change", "families", "kind", "name"),
    [
        ({"gate.scale": torch.zeros(2, 2)}, {}, TargetError, "gate.scale"),
        ({"model.layers.0.self_attn.v_proj.weight": torch.zeros(24, 48)}, {}, TargetError, "blk.0"),
        ({"model.layers.0.self_attn.o_proj.bias": torch.zeros(48)}, {}, FileError, None),
        ({"model.norm.weight": torch.zeros(48).long()}, {}, TargetError, "output_norm.weight"),
        ({}, {"v_dim": KEEP}, TargetError, "v_dim"),
    ],
)
def test_what_a_file_cannot_hold(dense, ragged, change, families, kind, name):
    weights = Weights(load_file(ragged.place / "model.safetensors") | change)
    pattern = Pattern(dense / "dense.gguf")
    with expect_error(kind, name=name or dense / "dense.gguf"):
        GgufFolder(ragged.place, weights, Plan(families), None, pattern, "auto")


def test_the_pattern_is_the_dense_models_file(dense, ragged, tmp_path):
    (tmp_path / "text.gguf").write_text("text")
    toys.write_gguf(testing.make_llama(layers=1, hidden_size=24), testing.make_tokenizer(), tmp_path / "narrow.gguf")
    toys.write_gguf(testing.make_llama(layers=2), testing.make_tokenizer(), tmp_path / "short.gguf")
    for like in (dense, *(tmp_path / f"{name}.gguf" for name in ("text", "narrow", "short", "no"))):
        with expect_error(FileError, name=like):
            api.gguf(ragged.place, tmp_path / "out.gguf", like=like)
    assert not (tmp_path / "out.gguf").exists()


def test_a_folder_that_was_changed_is_refused(dense, ragged, tmp_path):
    shutil.copytree(ragged.place, tmp_path / "copy")
    weights = load_file(tmp_path / "copy" / "model.safetensors")
    save_file(weights | {"model.norm.weight": torch.zeros(48)}, tmp_path / "copy" / "model.safetensors")
    with expect_error(ChangedError, name="model.safetensors"):
        api.gguf(tmp_path / "copy", tmp_path / "out.gguf", like=dense / "dense.gguf")
