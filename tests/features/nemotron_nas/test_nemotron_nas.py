"""The target nemotron-nas: layers of their own widths in a folder that DeciLM's readers and transformers read.

It reaches for the model class that travels with a folder: it runs without mptk.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import done as run_command
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import mptk
from mptk import ProofError, testing
from mptk.errors import TargetError
from mptk.features.nemotron_nas.modeling_nemotron_nas import DeciLMConfig, DeciLMForCausalLM, Fields, compute_ffn_width
from mptk.features.nemotron_nas.target import describe_ffn
from mptk.files import write_json
from mptk.io.loaders import register_all_classes
from mptk.publish.manifest import write_manifest
from mptk.testing import expect_error

TARGET = "nemotron-nas"
HOW = {"samples": 2, "length": 24, "eval_windows": 2, "eval_length": 24, "data": "random"}
FREE = {"method": "magnitude", "target": TARGET, "layers": "free", "sparsity": 0.3, "onnx": False, **HOW}
SIZES = {
    **{"hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 16},
    **{"intermediate_size": 1024, "vocab_size": 300, "max_position_embeddings": 70, "num_hidden_layers": 2},
    **{"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2},
}
IDS = torch.arange(24)[None]
ROPE = {"rope_type": "yarn", "rope_theta": 50000.0, "factor": 4.0, "original_max_position_embeddings": 16}


# ---- the class that travels ----


def block(group: int = 2, *, attention: bool = True, ffn: bool = True, **width: float) -> dict[str, Any]:
    return {
        "attention": {"no_op": not attention, "n_heads_in_group": group if attention else None},
        "ffn": {"no_op": not ffn, **width},
    }


BLOCKS = {
    "equal": [block(ffn_mult=24.0)] * 3,
    "ragged ffn": [block(ffn_mult=6.0), block(ffn_mult=24.0), block(intermediate_size=40)],
    "ragged KV heads": [block(1, ffn_mult=6.0), block(8, ffn_mult=6.0), block(2, ffn_mult=6.0)],
    "parts left out": [block(attention=False, ffn_mult=6.0), block(4, ffn=False), block(ffn_mult=6.0)],
    "a block left out": [block(ffn_mult=6.0), block(attention=False, ffn=False), block(ffn_mult=6.0)],
}


def model_of(blocks: list[dict[str, Any]]) -> DeciLMForCausalLM:
    torch.manual_seed(0)
    config = DeciLMConfig(blocks, **{**SIZES, "num_hidden_layers": len(blocks)})
    return testing.draw_weights(DeciLMForCausalLM(config), 0.3).eval()


@pytest.mark.parametrize("name", BLOCKS)
def test_it_is_saved_loaded_and_generates_with_a_cache_as_without(name, tmp_path):
    model = model_of(BLOCKS[name])
    model.save_pretrained(tmp_path)
    register_all_classes()
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(again) is DeciLMForCausalLM
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, model(IDS).logits)
    how = {"do_sample": False, "max_new_tokens": 6, "min_new_tokens": 6}
    assert torch.equal(again.generate(IDS, **how), again.generate(IDS, use_cache=False, **how))
    assert again.generate(IDS, num_beams=2, **how).shape == (1, 30)


def test_equal_blocks_are_llama():
    model = model_of(BLOCKS["equal"])
    llama = small("llama", num_hidden_layers=3)
    llama.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, llama(IDS).logits)


def test_a_part_that_is_left_out_adds_nothing():
    """It equals the model with zeros for the projections that write the part's result."""
    model = model_of(BLOCKS["parts left out"])
    whole = model_of([block(ffn_mult=6.0), block(4, ffn_mult=6.0), block(ffn_mult=6.0)])
    whole.load_state_dict(model.state_dict(), strict=False)
    whole.model.layers[0].self_attn.o_proj.weight.data.zero_()
    whole.model.layers[1].mlp.down_proj.weight.data.zero_()
    with torch.no_grad():
        assert torch.allclose(model(IDS).logits, whole(IDS).logits, atol=1e-6)
    left_out = {"model.layers.0.self_attn.q_proj.weight", "model.layers.1.post_attention_layernorm.weight"}
    assert left_out.isdisjoint(model.state_dict())


def test_its_kind_of_attention_can_be_set_and_its_config_is_read_by_attribute_and_written_as_json():
    model = model_of(BLOCKS["ragged ffn"])
    model.set_attn_implementation("eager")
    with torch.no_grad():
        assert len(model(IDS, output_attentions=True).attentions) == 3
    config = model.config
    assert [b.attention.n_heads_in_group for b in config.block_configs] == [2, 2, 2]
    assert [hasattr(b.ffn, "ffn_mult") for b in config.block_configs] == [True, True, False]
    assert json.loads(config.to_json_string())["block_configs"] == BLOCKS["ragged ffn"]


@pytest.mark.parametrize("hidden", [48, 576, 768, 4096, 8192, 16384])
def test_a_width_is_said_so_that_all_readers_find_it(hidden):
    for width in (256, 512, 1000, 1536, 11008, 14336, 28672, 53248):
        assert compute_ffn_width(Fields(describe_ffn(width, hidden)), hidden) == width


@pytest.mark.parametrize("blocks", [[block(ffn_mult=6.0) | {"ffn": {"no_op": False, "replace_with_linear": True}}], []])
def test_what_the_class_does_not_have_is_refused(blocks):
    with pytest.raises(ValueError):  # noqa: PT011 (transformers raises no other class)
        DeciLMForCausalLM(DeciLMConfig(blocks, **{**SIZES, "num_hidden_layers": 1}))


# ---- the target ----


@pytest.fixture(scope="module")
def dense(laboratory):
    """Three layers, 6 heads of 8 on 2 KV heads, so that the size of a head can be derived."""
    model = testing.make_llama(layers=3, num_attention_heads=6, head_dim=8, intermediate_size=1024)
    return str(laboratory.keep("nemotron-nas/dense", lambda folder: testing.save_model(model, folder)))


def cut(dense: str, folder: Path, families: dict[str, tuple[int, int, str, Any]], **how: Any) -> mptk.Pruned:
    """Prune to a plan: family → its width, its dense width, its layer and the units that stay."""
    plan = {name: {"width": w, "of": of, "keep": {layer: keep}} for name, (w, of, layer, keep) in families.items()}
    folder.mkdir(exist_ok=True)
    write_json(folder / "plan.json", {"format": "mptk-plan/1", "families": plan})
    return mptk.prune(dense, folder / "out", plan=str(folder / "plan.json"), target=TARGET, **HOW, **how)


def ffn(layer: int, width: int) -> dict[str, tuple[int, int, str, Any]]:
    return {f"ffn.{layer}": (width, 1024, f"model.layers.{layer}.mlp", f"0-{width - 1}")}


@pytest.fixture(scope="module")
def ragged(dense, laboratory):
    """Two of three blocks stay, with 256 and 1024 channels."""
    layers = {"layers": (2, 3, "model.layers", "0,2")}
    place = laboratory.keep("nemotron-nas/ragged", lambda folder: cut(dense, folder, {**ffn(0, 256), **layers}))
    return mptk.Pruned.open(place / "out")


def test_a_ragged_cut_is_proven_and_says_its_widths(ragged):
    assert "ONNX Runtime decode" in [row["stage"] for row in ragged.report.proof]
    assert mptk.verify(ragged.place)
    config = json.loads((ragged.place / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == (TARGET, ["DeciLMForCausalLM"])
    assert config["num_hidden_layers"] == len(config["block_configs"]) == 2
    assert config["rope_theta"] == 50000.0  # mlx-lm reads it there
    assert config["block_configs"][0] == {
        "attention": {"no_op": False, "replace_with_linear": False, "n_heads_in_group": 3},
        "ffn": {"no_op": False, "replace_with_linear": False, "ffn_mult": 8.0},
    }
    assert not [note for note in ragged.report.notes if "not read by" in note]


OUTSIDE = """
import sys, torch, transformers
transformers.dynamic_module_utils.HF_MODULES_CACHE = sys.argv[4]
for read, written in (sys.argv[1:3], sys.argv[2:4]):
    model = transformers.AutoModelForCausalLM.from_pretrained(read, trust_remote_code=True)
    assert "mptk" not in sys.modules
    model.save_pretrained(written)
    with torch.no_grad():
        torch.save(model(torch.arange(24)[None]).logits, written + "/logits")
"""


def test_transformers_reads_it_without_mptk(ragged, fresh, tmp_path):
    """Also after it is saved from there."""
    saved = [tmp_path / "saved", tmp_path / "saved again"]
    done = fresh.run(OUTSIDE, ragged.place, *saved, tmp_path / "modules", paths=())
    assert done.code == 0, done.err
    with torch.no_grad():
        expected = ragged.model(IDS).logits
    assert all(torch.allclose(torch.load(folder / "logits"), expected, atol=1e-6) for folder in saved)


def test_onnxruntime_genai_runs_its_graph(ragged):
    genai = pytest.importorskip("onnxruntime_genai")
    model = genai.Model(str(ragged.place))
    params = genai.GeneratorParams(model)
    params.set_search_options(max_length=20, do_sample=False)
    generator = genai.Generator(model, params)
    generator.append_tokens(IDS[0, 3:12].numpy())
    while not generator.is_done():
        generator.generate_next_token()
    found = [int(i) for i in generator.get_sequence(0)]
    assert found == ragged.model.generate(IDS[:, 3:12], max_length=20, do_sample=False)[0].tolist()


def test_each_layer_may_have_other_kv_heads_if_query_heads_are_equal(tmp_path):
    """4 query heads everywhere: 2 KV heads with 2, 4 KV heads with 1."""
    model = testing.make_llama(hidden_size=64, num_attention_heads=8, num_key_value_heads=4, intermediate_size=512)
    dense = testing.save_model(model, tmp_path / "dense")
    at = "model.layers.{}.self_attn"
    families = {"kv_groups.0": (2, 4, at.format(0), "1,3"), "q_heads.1": (1, 2, at.format(1), "1")}
    pruned = cut(dense, tmp_path, families)
    groups = [b["attention"]["n_heads_in_group"] for b in pruned.model.config.block_configs]
    assert (pruned.model.config.num_attention_heads, groups) == (4, [2, 1])
    (note,) = [note for note in pruned.report.notes if "not read by" in note]  # 4 heads of 16 are the hidden size
    assert note.startswith("this folder is not read by onnxruntime-genai: ")


def test_query_heads_that_differ_are_refused(dense, tmp_path):
    with expect_error(TargetError):
        cut(dense, tmp_path, {"kv_groups.0": (1, 2, "model.layers.0.self_attn", "1")})
    assert not (tmp_path / "out").exists()


def test_a_plan_may_say_what_not_all_engines_read(dense, tmp_path):
    heads = {"q_heads": {"width": 2, "of": 3, "keep": {f"model.layers.{i}.self_attn": "0-1" for i in range(3)}}}
    keep = {"width": 1000, "of": 1024, "keep": {"model.layers.1.mlp": "24-1023"}}
    write_json(tmp_path / "plan.json", {"format": "mptk-plan/1", "families": {**heads, "ffn.1": keep}})
    how = {"plan": str(tmp_path / "plan.json"), "target": TARGET, "onnx": False, **HOW}
    found = mptk.prune(dense, tmp_path / "out", **how)
    assert found.model.config.block_configs[1].ffn.intermediate_size == 1000
    assert [note.partition(" by ")[2] for note in found.report.notes if "not read" in note] == [
        "SGLang and mlx-lm and TensorRT-LLM: feed-forward widths must be multiples of 256",
        "mlx-lm: the size of a head must be hidden_size / num_attention_heads",
    ]
    with expect_error(TargetError, name="engines"):
        mptk.prune(dense, tmp_path / "other", **how, engines=("vllm", "sglang"))


def test_the_programs_that_must_read_it_decide_the_widths(dense, tmp_path):
    found = mptk.prune(dense, tmp_path / "out", engines=("vllm", "llama.cpp"), tolerance=0.02, **FREE)
    widths = {row["width"] for name, row in found.report.families.items() if name.startswith("ffn")}
    assert any(width % 256 for width in widths)
    assert not any(width % 32 for width in widths)
    assert any("not read by SGLang and mlx-lm" in note for note in found.report.notes)
    wide = testing.save_model(small("llama"), tmp_path / "wide")  # 8 heads of 16 in hidden 64: there is no cut for one
    with expect_error(TargetError, name="engines"):
        mptk.prune(wide, tmp_path / "wider", target=TARGET, method="magnitude", engines=("mlx-lm", "vllm"), **HOW)


def test_by_default_only_what_all_engines_read_is_cut(dense, tmp_path):
    found = mptk.prune(dense, tmp_path / "out", tolerance=0.2, **FREE)
    widths = {name: row["width"] for name, row in found.report.families.items() if row["width"] < row["of"]}
    assert {name.partition(".")[0] for name in widths} == {"ffn"}
    assert not any(width % 256 for width in widths.values())
    with expect_error(TargetError, name="q_heads"):
        mptk.prune(dense, tmp_path / "heads", families=("q_heads",), **FREE)


def test_legal_widths_are_shown_without_weights(dense):
    for more, step in (([], 256), (["--engines", "vllm"], 32)):
        result = run_command("analyze", dense, "--target", TARGET, *more, "--json", "-")
        found = {family["name"]: family["legal_widths"] for family in json.loads(result.stdout)["families"]}
        assert found["ffn"] == [*range(step, 1025, step)]
        assert found["q_heads"] == [3] or more


def test_its_class_is_trained_and_its_folder_cut_again(dense, ragged, tmp_path):
    how = {"method": "magnitude", "target": TARGET, "onnx": False, **HOW}
    training = {"steps": 2, "batch": 2, "micro": 2, "rank": 2, "tolerance": 1.0}
    found = mptk.prune(dense, tmp_path / "out", widths={"ffn": 512}, **training, **how)
    assert [row["stage"] for row in found.report.proof].count("trained model") == 1
    assert type(found.model).__name__ == "DeciLMForCausalLM"
    again = mptk.prune(ragged.place, tmp_path / "again", sparsity=0.3, tolerance=0.3, **how)
    assert [each.ffn.ffn_mult for each in again.model.config.block_configs] == [8.0, 8.0]


def small(kind: str, **more: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**SIZES, "num_hidden_layers": 1, **more})
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("qwen3", {}),
        ("qwen2", {}),
        ("mistral", {"sliding_window": 32}),
        ("llama", {"hidden_act": "gelu"}),
        ("gpt2", {"n_inner": 256}),
        ("granite", {"logits_scaling": 4.0}),
    ],
)
def test_what_deci_cannot_hold_is_refused_before_any_work(kind, more, tmp_path):
    model = small(kind, **more)
    dense = testing.save_model(model, tmp_path / "dense")
    with expect_error(TargetError, name=type(model).__name__):
        mptk.prune(dense, tmp_path / "out", target=TARGET, method="magnitude", **HOW)


@pytest.mark.parametrize(
    ("kind", "more", "said"),
    [("mistral", {"sliding_window": None}, 0), ("llama", {"attention_bias": True, "rope_parameters": ROPE}, 1)],
)
def test_what_it_holds(kind, more, said, tmp_path):
    model = testing.draw_weights(small(kind, num_hidden_layers=2, **more), 0.15)
    found = cut(testing.save_model(model, tmp_path / "dense"), tmp_path, ffn(0, 256), onnx=False)
    assert sum("not read by TensorRT-LLM: attention must have no biases" in note for note in found.report.notes) == said


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("modeling_nemotron_nas.py", "import torch", "import  torch"),
        ("config.json", '"rms_norm_eps": 1e-05', '"rms_norm_eps": 0.1'),
    ],
)
def test_code_or_a_config_that_was_changed_is_refused(ragged, tmp_path, file, old, new):
    folder = shutil.copytree(ragged.place, tmp_path / "copy")
    text = (folder / file).read_text()
    assert old in text
    (folder / file).write_text(text.replace(old, new))
    write_manifest(folder)
    with expect_error(ProofError, name="config"):
        mptk.verify(folder)
