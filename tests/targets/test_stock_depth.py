"""The config with which a stock class has fewer blocks, and which choices of blocks it has none for."""

from __future__ import annotations

from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    DiffLlamaConfig,
    DiffLlamaForCausalLM,
    Dinov2Config,
    Dinov2ForImageClassification,
    Dots3NoteForCausalLM,
    Dots3NoteTextConfig,
    JambaConfig,
    JambaForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
    SwinConfig,
    SwinForImageClassification,
)

from passes.targets.choose_blocks import find_best_sequence
from passes.targets.stock.attempt import Refusal
from passes.targets.stock.config import StockConfig
from passes.targets.stock.depth import shorten_config

SIZES = {"hidden_size": 24, "num_attention_heads": 3, "intermediate_size": 40, "vocab_size": 97, "num_hidden_layers": 4}


def test_every_list_by_layer_follows_the_blocks():
    """SmolLM3: layer types and layers without rotary embedding are lists with one entry for each layer."""
    sizes = {**SIZES, "num_hidden_layers": 5, "num_key_value_heads": 3, "pad_token_id": 0}
    config = SmolLM3Config(**sizes, no_rope_layers=[1, 1, 0, 1, 0])
    found = shorten_config(StockConfig(SmolLM3ForCausalLM, config, {}), {"model.layers": (0, 2, 3)})
    assert found.config.num_hidden_layers == 3
    assert found.config.no_rope_layers == [1, 0, 1]
    assert found.changes["no_rope_layers"] == ([1, 1, 0, 1, 0], [1, 0, 1])


def test_what_a_config_says_by_a_blocks_number_follows():
    """dots3.note: layers of sliding attention have sizes of their own, by number."""
    kinds = ["indexed_attention", "sliding_attention", "indexed_attention", "sliding_attention"]
    config = Dots3NoteTextConfig(num_hidden_layers=4, layer_types=kinds)
    found = shorten_config(StockConfig(Dots3NoteForCausalLM, config, {}), {"model.layers": (0, 2, 3)})
    before, after = found.changes["per_layer_config"]
    assert (before.keys(), after) == ({"1", "3"}, {"2": before["3"]})


def test_a_number_of_first_blocks_follows():
    """DeepSeek: the first k layers are dense, the others mixtures."""
    sizes = {"hidden_size": 24, "num_attention_heads": 3, "num_key_value_heads": 3, "intermediate_size": 40}
    experts = {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 8,
        "n_group": 2,
        "topk_group": 1,
    }
    heads = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 4}
    config = DeepseekV3Config(**sizes, **experts, **heads, vocab_size=97, num_hidden_layers=5, first_k_dense_replace=3)
    found = shorten_config(StockConfig(DeepseekV3ForCausalLM, config, {}), {"model.layers": (0, 2, 3)})
    assert {name: new for name, (_, new) in found.changes.items()} == {
        "num_hidden_layers": 3,
        "first_k_dense_replace": 2,
    }


JAMBA = JambaConfig(
    **{**SIZES, "num_hidden_layers": 6},
    num_key_value_heads=3,
    attn_layer_period=3,
    attn_layer_offset=1,
    num_experts=1,
    mamba_d_state=4,
    mamba_dt_rank=4,
    use_mamba_kernels=False,
)


def test_a_hybrid_whose_pattern_follows_from_the_place_says_so():
    """Jamba: every third layer is attention, and no field can say otherwise."""
    found = shorten_config(StockConfig(JambaForCausalLM, JAMBA, {}), {"model.layers": (0, 2, 3, 4, 5)})
    assert (found.kind, found.where) == ("names", "model.layers.1.mamba.A_log")


def test_a_number_that_follows_from_the_place_is_refused():
    """DiffLlama: each layer's first λ follows from its number, and no shape shows it."""
    config = DiffLlamaConfig(**{**SIZES, "num_attention_heads": 4}, num_key_value_heads=2)
    found = shorten_config(StockConfig(DiffLlamaForCausalLM, config, {}), {"model.layers": (0, 2)})
    assert found.where == "model.layers.2.self_attn.lambda_init"


def test_a_rate_of_dropout_may_follow_from_the_place():
    """Swin: it grows from block to block, and at inference nothing is dropped."""
    config = SwinConfig(embed_dim=8, depths=[1, 3], num_heads=[1, 2])
    found = shorten_config(
        StockConfig(SwinForImageClassification, config, {}), {"swin.encoder.layers.1.blocks": (0, 1)}
    )
    assert not isinstance(found, Refusal)
    assert found.config.depths == [1, 2]


def test_lists_that_the_class_makes_are_made_again():
    """DINOv2 writes the names of its stages, one a block, and takes the last one for its output."""
    config = Dinov2Config(hidden_size=24, num_hidden_layers=3, num_attention_heads=2)
    found = shorten_config(StockConfig(Dinov2ForImageClassification, config, {}), {"dinov2.encoder.layer": (0, 2)})
    assert not isinstance(found, Refusal)
    assert found.changes["out_features"] == (["stage3"], ["stage2"])
    assert found.changes["num_hidden_layers"] == (3, 2)


def test_the_best_choice_that_keeps_the_pattern():
    kinds, wanted = ["m", "a", "m", "m", "a", "m"], ["m", "a", "m", "m"]
    assert find_best_sequence(kinds, wanted, [1, 5, 9, 2, 3, 4], ()) == (0, 1, 2, 5)
    assert find_best_sequence(kinds, wanted, [1, 5, 9, 2, 3, 4], (3,)) == (0, 1, 2, 3)
    assert find_best_sequence(kinds, ["a", "a", "a"], [1] * 6, ()) is None
