"""The config with which a stock class has fewer blocks, and which choices of blocks it has none for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import transformers

from passes.targets.choose_blocks import find_best_sequence
from passes.targets.stock.config import StockConfig
from passes.targets.stock.depth import shorten_config

SIZES = {"hidden_size": 24, "num_attention_heads": 3, "intermediate_size": 40, "vocab_size": 97, "num_hidden_layers": 4}


def shorten(model: str, config: Mapping[str, Any], *kept: int, blocks: str = "model.layers") -> Any:
    """What is found for a class of transformers, which has its sizes from ``config``, if it keeps these blocks."""
    kind = getattr(transformers, model)
    return shorten_config(StockConfig(kind, kind.config_class(**config), {}), {blocks: kept})


def test_every_list_by_layer_follows_the_blocks():
    """SmolLM3: layer types and layers without rotary embedding are lists with one entry for each layer."""
    sizes = {**SIZES, "num_hidden_layers": 5, "num_key_value_heads": 3, "pad_token_id": 0}
    found = shorten("SmolLM3ForCausalLM", {**sizes, "no_rope_layers": [1, 1, 0, 1, 0]}, 0, 2, 3)
    assert found.config.num_hidden_layers == 3
    assert found.config.no_rope_layers == [1, 0, 1]
    assert found.changes["no_rope_layers"] == ([1, 1, 0, 1, 0], [1, 0, 1])


def test_what_a_config_says_by_a_blocks_number_follows():
    """dots3.note: layers of sliding attention have sizes of their own, by number."""
    kinds = ["indexed_attention", "sliding_attention", "indexed_attention", "sliding_attention"]
    found = shorten("Dots3NoteForCausalLM", {"num_hidden_layers": 4, "layer_types": kinds}, 0, 2, 3)
    before, after = found.changes["per_layer_config"]
    assert (before.keys(), after) == ({"1", "3"}, {"2": before["3"]})


def test_a_number_of_first_blocks_follows():
    """DeepSeek: the first k layers are dense, the others mixtures."""
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "n_group": 2}
    heads = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 4}
    sizes = {**SIZES, **experts, **heads, "num_key_value_heads": 3, "num_hidden_layers": 5, "topk_group": 1}
    found = shorten("DeepseekV3ForCausalLM", {**sizes, "first_k_dense_replace": 3}, 0, 2, 3)
    assert found.changes == {"num_hidden_layers": (5, 3), "first_k_dense_replace": (3, 2)}


def test_a_hybrid_whose_pattern_follows_from_the_place_says_so():
    """Jamba: every third layer is attention, and no field can say otherwise."""
    pattern = {"attn_layer_period": 3, "attn_layer_offset": 1, "num_experts": 1, "num_key_value_heads": 3}
    mamba = {"mamba_d_state": 4, "mamba_dt_rank": 4, "use_mamba_kernels": False}
    found = shorten("JambaForCausalLM", {**SIZES, **pattern, **mamba, "num_hidden_layers": 6}, 0, 2, 3, 4, 5)
    assert (found.kind, found.where) == ("names", "model.layers.1.mamba.A_log")


def test_a_number_that_follows_from_the_place_is_refused():
    """DiffLlama: each layer's first λ follows from its number, and no shape shows it."""
    found = shorten("DiffLlamaForCausalLM", {**SIZES, "num_attention_heads": 4, "num_key_value_heads": 2}, 0, 2)
    assert found.where == "model.layers.2.self_attn.lambda_init"


def test_a_rate_of_dropout_may_follow_from_the_place():
    """Swin: it grows from block to block, and at inference nothing is dropped."""
    sizes = {"embed_dim": 8, "depths": [1, 3], "num_heads": [1, 2]}
    found = shorten("SwinForImageClassification", sizes, 0, 1, blocks="swin.encoder.layers.1.blocks")
    assert found.config.depths == [1, 2]


def test_lists_that_the_class_makes_are_made_again():
    """DINOv2 writes the names of its stages, one a block, and takes the last one for its output."""
    sizes = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2}
    found = shorten("Dinov2ForImageClassification", sizes, 0, 2, blocks="dinov2.encoder.layer")
    assert found.changes["out_features"] == (["stage3"], ["stage2"])
    assert found.changes["num_hidden_layers"] == (3, 2)


def test_the_best_choice_that_keeps_the_pattern():
    kinds, wanted = ["m", "a", "m", "m", "a", "m"], ["m", "a", "m", "m"]
    assert find_best_sequence(kinds, wanted, [1, 5, 9, 2, 3, 4], ()) == (0, 1, 2, 5)
    assert find_best_sequence(kinds, wanted, [1, 5, 9, 2, 3, 4], (3,)) == (0, 1, 2, 3)
    assert find_best_sequence(kinds, ["a", "a", "a"], [1] * 6, ()) is None
