"""The tiny models of the zoo: sizes that catch mixed-up axes, every kind of layer, no dead branch."""

from __future__ import annotations

import json
import os
import time
from typing import Any

import pytest
import torch
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from benchmarks.tiny_config import tiny_config
from benchmarks.tiny_models import BATCH, SEQ, TARGET_SEQ, CannotBuild, main, model_types, sweep, tiny_model
from benchmarks.tiny_recipe import Recipe, recipes
from benchmarks.tiny_roles import LABELS, role


def test_every_type_of_the_mappings_is_listed():
    assert model_types("causal-lm") == list(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    assert model_types("masked-lm") == list(modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES)
    assert model_types("seq2seq") == list(modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES)
    assert model_types("image-classification") == list(modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES)


ROLES = {
    "hidden": "hidden_size d_model",
    "ffn": "moe_intermediate_size ffn_dim",
    "kv_heads": "num_key_value_heads kv_n_heads",
    "heads": "n_head",
    "head_dim": "mamba_d_head qk_rope_head_dim",
    "top_k": "num_experts_per_tok",
    "experts": "n_routed_experts",
    "shared": "n_shared_experts",
    "rank": "kv_lora_rank",
    "token": "image_token_id",
    "keep": "type_vocab_size conv_kernel_size",
    "first": "first_k_dense_replace",
    "other": "scale_emb",
}


def test_roles_are_read_from_the_words_of_a_name():
    assert {kind: {role(name) for name in names.split()} for kind, names in ROLES.items()} == {k: {k} for k in ROLES}


def test_recipes_give_up_few_liberties_first():
    given_up = [sum(vars(recipe).values()) for recipe in recipes()]
    assert given_up[0] == 0
    assert given_up == sorted(given_up)
    assert max(given_up) == 3


@pytest.mark.parametrize("model_type", ["gemma3_text", "qwen3_next", "deepseek_v32", "granitemoehybrid", "llama4_text"])
def test_few_layers_show_every_kind_of_layer(model_type):
    default = CONFIG_MAPPING[model_type]()
    config = next(filter(None, (_config(model_type, recipe) for recipe in recipes())))
    for name in ("layer_types", "mlp_layer_types"):
        if getattr(default, name, None):
            assert set(getattr(config, name)) == set(getattr(default, name))
            assert len(getattr(config, name)) == config.num_hidden_layers
    assert 2 <= config.num_hidden_layers <= 4


def _config(model_type: str, recipe: Recipe):  # type: ignore[no-untyped-def]
    try:
        return tiny_config(CONFIG_MAPPING[model_type], recipe)
    except Exception:
        return None


def test_sizes_are_pairwise_different():
    tiny = tiny_model("causal-lm", "qwen3_moe")
    config = tiny.model.config
    names = "hidden_size num_key_value_heads head_dim num_attention_heads intermediate_size moe_intermediate_size "
    names += "num_experts num_experts_per_tok vocab_size"
    one = {name: getattr(config, name) for name in names.split()}
    heads = one["num_attention_heads"], one.pop("num_key_value_heads")
    sizes = [*one.values(), *(count * config.head_dim for count in heads), SEQ]
    assert len(set(sizes)) == len(sizes)
    assert 1 < config.num_key_value_heads < config.num_attention_heads
    assert tiny.recipe == Recipe()


def test_a_relation_that_the_model_needs_is_found():
    tiny = tiny_model("causal-lm", "mamba2")
    config = tiny.model.config
    assert config.num_heads * config.head_dim == config.expand * config.hidden_size
    assert tiny.recipe == Recipe(relations=True)


def test_nested_configs_share_the_sizes_that_they_share_by_default():
    config = tiny_config(CONFIG_MAPPING["gemma3"], Recipe())
    assert config.text_config.hidden_size != config.vision_config.hidden_size
    assert config.text_config.num_hidden_layers <= 4
    assert config.vision_config.num_hidden_layers <= 4
    assert config.image_token_index < config.text_config.vocab_size


def test_features_of_images_get_the_width_of_the_text_model():
    """Ovis2's default config has 1536 channels for them, and a text model of 4096."""
    config = tiny_model("image-text-to-text", "ovis2").model.config
    assert config.hidden_size == config.get_text_config().hidden_size


def test_layers_that_cut_out_masks_have_one_width_and_their_backbone_its_own_heads():
    config = tiny_config(CONFIG_MAPPING["mask2former"], Recipe())
    assert {config.feature_size, config.mask_feature_size, config.hidden_dim} == {96}
    heads = tiny_config(CONFIG_MAPPING["maskformer"], Recipe()).backbone_config.num_heads
    assert [*heads] == [*CONFIG_MAPPING["maskformer"]().backbone_config.num_heads]


def test_a_detector_has_widths_that_its_backbone_gives_and_shows_classes_and_boxes():
    tiny = tiny_model("object-detection", "rt_detr")
    assert tiny.wrapper(*tiny.inputs).shape == (BATCH, 8 * (LABELS + 4))
    assert sum(p.numel() for p in tiny.model.parameters()) < 2_000_000


SHAPES = dict.fromkeys(("gpt2", "qwen3_next", "mixtral", "falcon_h1"), ("causal-lm", BATCH, SEQ))
SHAPES |= {"bert": ("masked-lm", BATCH, SEQ), "t5": ("seq2seq", BATCH, TARGET_SEQ)}
SHAPES |= dict.fromkeys(("convnext", "swin"), ("image-classification", BATCH, LABELS))


@pytest.mark.parametrize("model_type", SHAPES)
def test_every_parameter_matters_and_the_logits_come_out(model_type):
    mapping, *shape = SHAPES[model_type]
    tiny = tiny_model(mapping, model_type)
    assert not tiny.model.training
    out = tiny.wrapper(*tiny.inputs)
    assert list(out.shape[: len(shape)]) == shape
    assert out.dtype == torch.float32
    (out * torch.randn(out.shape, generator=torch.Generator().manual_seed(3))).sum().backward()
    dead = [n for n, p in tiny.model.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    constant = [n for n, p in tiny.model.named_parameters() if p.numel() > 1 and p.std() == 0]
    assert dead == []
    assert constant == []
    assert sum(p.numel() for p in tiny.model.parameters()) < 2_000_000


def test_a_last_relu_leaves_most_of_the_output():
    """Without the other sign of its last convolution, most depths of this model are 0."""
    tiny = tiny_model("depth-estimation", "depth_anything")
    assert (tiny.wrapper(*tiny.inputs) > 0).float().mean() > 0.5


def test_a_backbone_gives_as_many_states_as_the_head_takes():
    config = tiny_config(CONFIG_MAPPING["depth_anything"], Recipe())
    assert len(config.backbone_config.out_indices) == len(config.neck_hidden_sizes) == 4
    assert config.backbone_config.num_hidden_layers == 4
    assert config.reassemble_hidden_size == config.backbone_config.hidden_size


def test_running_statistics_are_no_identity():
    tiny = tiny_model("image-classification", "resnet")
    statistics = {n: b for n, b in tiny.model.named_buffers() if "running" in n}
    assert statistics
    assert all(b.std() > 0 for b in statistics.values())
    assert all(b.min() > 0 for n, b in statistics.items() if n.endswith("running_var"))


def test_the_seed_decides_the_weights():
    first, same, other = (tiny_model("causal-lm", "llama", seed) for seed in (0, 0, 1))
    assert torch.equal(first.wrapper(*first.inputs), same.wrapper(*same.inputs))
    assert not torch.equal(first.model.lm_head.weight, other.model.lm_head.weight)  # type: ignore[union-attr]


def test_a_model_that_cannot_run_from_tokens_says_why():
    with pytest.raises(CannotBuild, match="shared_kv_states") as caught:
        tiny_model("causal-lm", "gemma4_unified_assistant")
    assert caught.value.stage == "forward"


def hang_or_die(mapping: str, model_type: str) -> dict[str, Any]:
    if model_type == "hangs":
        time.sleep(60)
    os._exit(3)


def test_a_crash_and_a_hang_are_rows():
    pairs = [("causal-lm", "dies"), ("causal-lm", "hangs")]
    rows = {row["type"]: row for row in sweep(pairs, 2, hang_or_die, limit_s=5)}
    assert rows["dies"]["reason"] == "the process died with exit code 3"
    assert rows["hangs"]["reason"] == "ran past 5 s"


def test_the_command_writes_a_row_per_type(tmp_path, capsys):
    main(mapping="causal-lm", types="gpt2,opt", jobs=1, json_file=tmp_path / "rows.json")
    assert "causal-lm: 2 of 2 export" in capsys.readouterr().out
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert {(row["type"], row["stage"]) for row in rows} == {("gpt2", "export"), ("opt", "export")}
