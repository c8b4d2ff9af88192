"""Multi-token-prediction layers, which a checkpoint has beside its class's weights, are cut with the model."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.modeling_layers import MtpModel

import mptk
from benchmarks.tiny_models import tiny_model
from mptk import testing
from mptk.features.drafter.cut import STAGE
from mptk.features.drafter.drafter import Drafter

LAYERS, HIDDEN = 2, 48
SIZES = {"num_hidden_layers": LAYERS, "vocab_size": 300, "hidden_size": HIDDEN, "max_position_embeddings": 128}
SIZES |= {"intermediate_size": 80, "moe_intermediate_size": 24, "num_experts_per_tok": 2, "num_attention_heads": 4}
SIZES |= {"eos_token_id": 1, "bos_token_id": None}
EXPERTS = {"n_routed_experts": 8, "first_k_dense_replace": 1}
LATENT = {"q_lora_rank": 20, "kv_lora_rank": 28, "qk_nope_head_dim": 12, "qk_rope_head_dim": 8, "v_head_dim": 16}
DEEPSEEK = {**EXPERTS, **LATENT, "num_key_value_heads": 4, "n_group": 2, "topk_group": 1}
GLM = {**EXPERTS, "num_key_value_heads": 2, "head_dim": 16}
HOW = {"method": "magnitude", "data": "random", "samples": 2, "length": 24, "align": 2, "onnx": False}


def numbered(name: str) -> str:
    """DeepSeek's and GLM's names of a layer's own weights."""
    return f"model.layers.{LAYERS}.{name}"


def made(model: type[PreTrainedModel], config: Any, folder: Path) -> Path:
    """A checkpoint of ``config`` with a further layer, that predicts the token after the next."""
    torch.manual_seed(0)
    config.num_hidden_layers = LAYERS + 1
    module = model(config)
    for parameter in module.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    testing.save_model(module, folder)
    config.num_hidden_layers = LAYERS
    config.architectures = [model.__name__]
    config.save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    weights |= {numbered(f"{name}.weight"): torch.rand(HIDDEN) + 0.5 for name in ("enorm", "hnorm", "shared_head.norm")}
    weights[numbered("eh_proj.weight")] = torch.randn(HIDDEN, 2 * HIDDEN) * 0.2
    weights[numbered("embed_tokens.weight")] = weights["model.embed_tokens.weight"].clone()
    weights[numbered("shared_head.head.weight")] = weights["lm_head.weight"].clone()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture
def glm(tmp_path, monkeypatch):
    return saved("glm", tmp_path, monkeypatch)


def saved(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    name, own = {"glm": ("Glm4Moe", GLM), "deepseek": ("DeepseekV3", DEEPSEEK)}[kind]
    model = getattr(transformers, f"{name}ForCausalLM")
    config = getattr(transformers, f"{name}Config")(**SIZES, **own)
    monkeypatch.setattr(model, "_keys_to_ignore_on_load_unexpected", [rf"model\.layers\.{LAYERS}\."])  # not 61 layers
    return made(model, config, tmp_path / "dense")


def drafted(folder: Path, ids: Tensor) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        return Drafter(model, MtpModel.from_pretrained(model).eval())(ids)


IDS = torch.arange(2, 14).reshape(2, 6)


def test_the_layers_are_cut_as_the_model_and_transformers_drafts_with_them(glm, tmp_path):
    out = tmp_path / "out"
    report = mptk.prune(str(glm), out, widths={"hidden": 40, "experts": 6, "kv_groups": 1}, tolerance=1.0, **HOW).report
    assert {row["stage"] for row in report.proof} >= {STAGE, f"{STAGE}, stored weights"}
    stored = load_file(out / "model.safetensors")
    assert stored[numbered("eh_proj.weight")].shape == (40, 80)
    assert stored[numbered("mlp.experts.5.down_proj.weight")].shape == (40, 24)
    assert numbered("mlp.experts.6.down_proj.weight") not in stored
    assert stored[numbered("self_attn.k_proj.weight")].shape == (16, 40)
    assert stored[numbered("shared_head.head.weight")].equal(stored["lm_head.weight"])
    assert json.loads((out / "config.json").read_text())["num_nextn_predict_layers"] == 1
    assert drafted(out, IDS).isfinite().all()
    assert {d.stage for d in mptk.verify(out)} >= {STAGE, f"{STAGE}, stored weights"}


@pytest.mark.parametrize(
    ("kind", "widths"),
    [("glm", {"ffn.2": 16, "ffn.3": 16}), ("deepseek", {"ffn.4": 16, "ffn.5": 16})],
    ids=["glm", "deepseek"],
)
def test_channels_of_zeros_go_from_the_layers_too(kind, widths, tmp_path, monkeypatch):
    """Half of the experts' 24 channels do nothing, other ones in each layer; with 16 that hold the rest nothing changes."""
    source, out = saved(kind, tmp_path, monkeypatch), tmp_path / "out"
    weights = load_file(source / "model.safetensors")
    for name in (n for n in weights if re.search(r"experts?\.(\d+\.)?down_proj", n)):
        for each in (name, name.replace("down", "up"), name.replace("down", "gate")):
            tensor = weights[each] if "down" in each else weights[each].T
            tensor[:, "layers.1." in name :: 2] = 0
    save_file(weights, source / "model.safetensors", {"format": "pt"})
    before = drafted(source, IDS)
    report = mptk.prune(str(source), out, widths=widths, families=tuple(widths), **HOW).report
    assert STAGE in {row["stage"] for row in report.proof}, report.notes
    after = drafted(out, IDS)
    assert (after - before).abs().max() < 1e-4 * before.abs().max()
    dense, cut = (
        sum(each.numel() for name, each in state.items() if "experts" in name)
        for state in (weights, load_file(out / "model.safetensors"))
    )
    assert 3 * cut == 2 * dense


def test_a_layer_that_is_no_copy_is_left_out_with_a_note(glm, tmp_path):
    weights = load_file(glm / "model.safetensors")
    weights[numbered("embed_tokens.weight")][3] += 1.0
    save_file(weights, glm / "model.safetensors", {"format": "pt"})
    report = mptk.prune(str(glm), tmp_path / "out", widths={"experts": 6}, tolerance=1.0, **HOW).report
    (note,) = [note for note in report.notes if "multi-token" in note]
    assert note.endswith("model.layers.2.embed_tokens.weight is not the model's model.embed_tokens.weight")
    assert not [name for name in load_file(tmp_path / "out" / "model.safetensors") if name.startswith(numbered(""))]


def test_layers_that_the_config_does_not_count_are_cut_too(tmp_path):
    """Qwen3-Next's, whose names begin with ``mtp.``; each attends to all tokens, as its last layer."""
    config = tiny_model("causal-lm", "qwen3_next").model.config
    config.layer_types = ["full_attention"] * len(config.layer_types)
    torch.manual_seed(0)
    model = transformers.Qwen3NextForCausalLM(config)
    model.save_pretrained(tmp_path / "dense")
    weights, size = load_file(tmp_path / "dense" / "model.safetensors"), model.config.hidden_size
    weights |= {n.replace("model.layers.1.", "mtp.layers.0."): 1.1 * t for n, t in weights.items() if ".layers.1." in n}
    norms = ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm")
    weights |= {f"mtp.{name}.weight": torch.full([size], 0.1) for name in norms}
    weights["mtp.fc.weight"] = torch.randn(size, 2 * size) * 0.2
    save_file(weights, tmp_path / "dense" / "model.safetensors", {"format": "pt"})
    how = {**HOW, "align": 1, "widths": {"experts": 4}, "families": ("experts",)}
    report = mptk.prune(str(tmp_path / "dense"), tmp_path / "out", **how).report
    assert {row["stage"] for row in report.proof} >= {STAGE, f"{STAGE}, stored weights"}
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert stored["mtp.layers.0.mlp.gate.weight"].equal(weights["mtp.layers.0.mlp.gate.weight"][kept(report, weights)])
    assert {name for name in weights if name.startswith("mtp.")} > {name for name in stored if name.startswith("mtp.")}
    assert stored["mtp.fc.weight"].equal(weights["mtp.fc.weight"])


def kept(report: mptk.Report, weights: dict[str, Tensor]) -> list[int]:
    """The experts of the further layer with the largest weights."""
    parts = [f"mtp.layers.0.mlp.experts.{i}." for i in range(report.families["experts"]["of"])]
    row = weights["mtp.layers.0.mlp.gate.weight"].square().sum(1)
    own = [sum(t.square().sum() for name, t in weights.items() if name.startswith(part)) for part in parts]
    return sorted((row + torch.stack(own)).topk(4).indices.tolist())
