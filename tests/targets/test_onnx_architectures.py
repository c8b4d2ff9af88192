"""The ONNX decoder of models with a detail of their own: positions, masks, key heads, experts."""

from __future__ import annotations

from pathlib import Path

import pytest
from onnx_checks import SIZES, assert_padded_rows_decode_as_alone, cache_inputs
from tiny_decoders import tiny_decoder
from transformers import DogeConfig, FalconConfig, GPTNeoConfig, MixtralConfig, PreTrainedConfig, RobertaConfig

from passes.frontend.trace_decoder import trace_decoder
from passes.pipelines import emit_onnx

POSITIONS = {"max_position_embeddings": 64}
NEO = {"hidden_size": 48, "num_heads": 6, "num_layers": 1, "vocab_size": 97, "attention_types": [[["global"], 1]]}
CONFIGS: dict[str, PreTrainedConfig] = {
    # It reserves the first positions for padding; the graph takes the usual ones, from 0.
    "positions from 2": RobertaConfig(**SIZES, **POSITIONS, is_decoder=True, pad_token_id=1),
    # It attends by hand, slices its mask from a table, and caches keys after a change of dtype that changes nothing.
    "a table as long as its positions": GPTNeoConfig(**NEO, **POSITIONS),
    # scaled_dot_product_attention broadcasts it.
    "one key head": FalconConfig(**SIZES, alibi=False, new_decoder_architecture=False, multi_query=True),
    # Its mask reads all values before it attends; the cache is in Attention all the same.
    "a mask made from cached values": DogeConfig(**SIZES, num_key_value_heads=2, keep_window_size=4),
    # Some get no token; the writes of the router keep the cache in Attention.
    "experts": MixtralConfig(**SIZES, num_key_value_heads=2, num_local_experts=9, head_dim=10),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_padded_rows_decode_as_alone_with_the_cache_in_attention(kind: str, tmp_path: Path) -> None:
    model = tiny_decoder(CONFIGS[kind])
    file = emit_onnx(trace_decoder(model), tmp_path)
    attention = [["past_key_values.0.key", "past_key_values.0.value"]]
    assert cache_inputs(file) == ([] if kind == "a table as long as its positions" else attention)
    assert_padded_rows_decode_as_alone(model, file)
