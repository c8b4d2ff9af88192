"""``--rehome``: a cut that the model's own config class refuses, written with another class that it is equal in."""

from __future__ import annotations

import dataclasses
import filecmp
import json
from pathlib import Path

import pytest
from commands import done
from toy_checkpoints import llama_config
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import mptk
from mptk import MptkError, Report
from mptk.testing import save_word_model

REFUSED = mptk.Settings(method="wanda", widths={"kv_groups": 3}, families=("kv_groups",), samples=4, length=48, align=8)
"""6 heads: LlamaConfig wants the hidden size, 40, to be a multiple of them."""


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> str:
    sizes = {"hidden_size": 40, "num_attention_heads": 10, "num_key_value_heads": 5, "head_dim": 6}
    config = llama_config(num_hidden_layers=2, **sizes)
    return save_word_model(LlamaForCausalLM(config), tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def rehomed(llama, tmp_path_factory) -> Path:
    """Pruned by the command line."""
    out = tmp_path_factory.mktemp("out") / "pruned"
    words = (
        "--method wanda --width kv_groups=3 --families kv_groups --samples 4 --length 48 --align 8 --no-onnx --rehome"
    )
    done("prune", llama, "--out", out, *words.split())
    return out


def test_the_folder_loads_as_another_class_with_the_cut_shapes(rehomed):
    config = json.loads((rehomed / "config.json").read_text())
    assert config["model_type"] != "llama"
    assert (config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]) == (6, 3, 6)
    model, info = AutoModelForCausalLM.from_pretrained(rehomed, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not isinstance(model, LlamaForCausalLM)
    assert model.model.layers[1].self_attn.q_proj.weight.shape == (36, 40)
    report = Report.read(rehomed)
    assert report.config_changes["model_type"] == ["llama", config["model_type"]]
    assert any(type(model).__name__ in note and "LlamaConfig" in note for note in report.notes)


def test_the_reloaded_class_is_proven_and_verify_proves_it_again(rehomed):
    stages = [d["stage"] for d in Report.read(rehomed).proof]
    assert "reloaded checkpoint" in stages
    assert [d.stage for d in mptk.verify(rehomed)] == stages


def test_a_refusal_names_the_option_if_it_would_help_and_only_then(llama, tmp_path):
    with pytest.raises(
        MptkError,
        match=r"kv_groups cannot have width 3; .*or give rehome=True: \w+ForCausalLM holds them with equal logits",
    ):
        mptk.prune(llama, tmp_path / "out", REFUSED)
    for change in ({"sparsity": 0.97}, {"families": ("rotary_pairs",)}):
        with pytest.raises(MptkError) as error:
            mptk.prune(llama, tmp_path / "out", mptk.Settings(method="wanda", samples=4, length=48, align=8, **change))
        assert "rehome" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_a_refused_plan_names_the_option_too(llama, rehomed, tmp_path):
    plan = str(rehomed / "plan.json")
    with pytest.raises(MptkError, match=r"LlamaConfig.validate_architecture.*or give rehome=True"):
        mptk.prune(llama, tmp_path / "out", mptk.Settings(plan=plan, samples=4, length=48, onnx=False))
    mptk.prune(llama, tmp_path / "out", mptk.Settings(plan=plan, samples=4, length=48, onnx=False, rehome=True))
    assert filecmp.cmp((tmp_path / "out" / "model.safetensors"), (rehomed / "model.safetensors"), shallow=False)


def test_the_own_class_is_kept_where_it_holds_the_cut(llama, tmp_path):
    settings = mptk.Settings(
        method="wanda", widths={"kv_groups": 4}, families=("kv_groups",), samples=4, length=48, onnx=False, rehome=True
    )
    mptk.prune(llama, tmp_path / "out", settings)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "llama"


def test_a_class_that_a_program_registered_is_no_home(rehomed, llama, tmp_path, monkeypatch):
    """Its folder would not load where that program is not."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    class Registered(LlamaConfig):
        model_type = "registered"

    class RegisteredForCausalLM(LlamaForCausalLM):
        config_class = Registered

    monkeypatch.setitem(MODEL_FOR_CAUSAL_LM_MAPPING._extra_content, Registered, RegisteredForCausalLM)
    mptk.prune(llama, tmp_path / "out", dataclasses.replace(REFUSED, onnx=False, rehome=True))
    assert filecmp.cmp(tmp_path / "out" / "config.json", rehomed / "config.json", shallow=False)
