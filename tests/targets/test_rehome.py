"""``--rehome``: a cut that the model's own config class refuses, written with another class that it is equal in."""

from __future__ import annotations

import filecmp
import json

import pytest
import torch
from commands import done
from stock_specs import VOCAB, one_group, refused
from toy_checkpoints import llama_config
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedConfig, PreTrainedModel

import mptk
from mptk import Report
from mptk.errors import BudgetError, TargetError
from mptk.testing import save_word_model
from passes.targets.stock.config import StockConfig
from passes.targets.stock.rehome import find_other_class

FEW = {"method": "magnitude", "samples": 2, "length": 16, "eval_windows": 1, "eval_length": 16, "onnx": False}
REFUSED = {"widths": {"kv_groups": 3}, "families": ("kv_groups",)}
"""6 heads: LlamaConfig wants the hidden size, 40, to be a multiple of them."""


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    sizes = {"hidden_size": 40, "num_attention_heads": 10, "num_key_value_heads": 5, "head_dim": 6}
    config = llama_config(num_hidden_layers=2, **sizes)
    return save_word_model(LlamaForCausalLM(config), tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def rehomed(llama, tmp_path_factory):
    """Pruned by the command line."""
    out = tmp_path_factory.mktemp("out") / "pruned"
    few = "--method magnitude --samples 2 --length 16 --eval-windows 1 --eval-length 16 --no-onnx"
    done("prune", llama, "--out", out, *few.split(), "--width", "kv_groups=3", "--families", "kv_groups", "--rehome")
    return out


def test_the_folder_loads_as_another_class_with_the_cut_shapes_and_is_proven_so(rehomed):
    config = json.loads((rehomed / "config.json").read_text())
    assert config["model_type"] != "llama"
    assert (config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]) == (6, 3, 6)
    model, info = AutoModelForCausalLM.from_pretrained(rehomed, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not isinstance(model, LlamaForCausalLM)
    assert model.model.layers[1].self_attn.q_proj.weight.shape == (36, 40)
    report = Report.read(rehomed)
    stages = [d["stage"] for d in report.proof]
    assert "reloaded checkpoint" in stages
    assert [d.stage for d in mptk.verify(rehomed)] == stages
    assert report.config_changes["model_type"] == ["llama", config["model_type"]]
    assert any(type(model).__name__ in note and "LlamaConfig" in note for note in report.notes)


def test_a_refusal_names_the_option_if_it_would_help_and_only_then(llama, rehomed, tmp_path):
    for asked, helps in (
        (REFUSED, True),
        ({"plan": str(rehomed / "plan.json")}, True),
        ({"sparsity": 0.97}, False),
        ({"families": ("rotary_pairs",)}, False),
    ):
        with pytest.raises((BudgetError, TargetError)) as error:
            mptk.prune(llama, tmp_path / "out", mptk.Settings(**FEW, **asked))
        assert ("rehome" in error.value.remedy) == helps
    assert not (tmp_path / "out").exists()


def test_the_own_class_is_kept_where_it_holds_the_cut(llama, tmp_path):
    kept = {"widths": {"kv_groups": 4}, "families": ("kv_groups",), "rehome": True}
    mptk.prune(llama, tmp_path / "out", mptk.Settings(**FEW, **kept))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "llama"


def test_a_class_that_a_program_registered_is_no_home(rehomed, llama, tmp_path):
    """Its folder would not load where that program is not. And the plan gives the same folder again."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    class Registered(LlamaConfig):
        model_type = "registered"

    class RegisteredForCausalLM(LlamaForCausalLM):
        config_class = Registered

    AutoModelForCausalLM.register(Registered, RegisteredForCausalLM)
    try:
        plan = str(rehomed / "plan.json")
        mptk.prune(llama, tmp_path / "out", mptk.Settings(**FEW, plan=plan, rehome=True))
    finally:
        del MODEL_FOR_CAUSAL_LM_MAPPING._extra_content[Registered]  # transformers has no public way back
    for name in ("config.json", "model.safetensors"):
        assert filecmp.cmp(tmp_path / "out" / name, rehomed / name, shallow=False)


def test_the_other_class_computes_what_the_refused_config_would():
    """The model itself does not mind what its config refuses."""
    torch.manual_seed(0)
    spec, keep = one_group(), {"q": [0, 1, 3, 4, 5]}
    refusal = refused(spec.probe({"q": 5}))
    state, tokens = spec.cut(keep), torch.randint(VOCAB, (2, 31))

    @torch.no_grad()
    def compute_logits(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> torch.Tensor:
        model = model_class(config).eval()
        model.load_state_dict(state)
        return model(tokens).logits

    reference = compute_logits(LlamaForCausalLM, refusal.config)

    def check(stock: StockConfig) -> float:
        return (compute_logits(stock.model_class, stock.config) - reference).abs().max().item()

    found = find_other_class(refusal.config, spec.shapes({"q": 5}), check)
    assert found.model_class is not LlamaForCausalLM
    assert found.config.num_attention_heads == 5
    assert check(found) <= 1e-6
    assert (reference - spec.masked_logits(keep, tokens)).abs().max() < 1e-5
    assert found.changes["model_type"] == ("llama", found.config.model_type)
    assert getattr(found.config, "sliding_window", None) is None


def test_a_class_with_other_logits_is_no_home():
    spec = one_group()
    config, shapes = refused(spec.probe({"q": 5})).config, spec.shapes({"q": 5})
    result = refused(find_other_class(config, shapes, lambda stock: 0.25))
    assert result.kind == "numeric"
    assert "0.25" in result.reason
    strange = {**shapes, "extra.weight": (3,)}
    assert refused(find_other_class(config, strange, lambda stock: 0.0)).kind == "names"
