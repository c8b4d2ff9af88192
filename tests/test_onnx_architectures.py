"""The ONNX decoder of models with a detail of their own: positions, masks, key heads, experts."""

from __future__ import annotations

from onnx_checks import SIZES, assert_padded_rows_decode_as_alone, cache_inputs
from tiny_decoders import tiny_decoder
from transformers import (
    DogeConfig,
    FalconConfig,
    GPTNeoConfig,
    MixtralConfig,
    RobertaConfig,
)

from passes.frontend.trace_decoder import trace_decoder
from passes.pipelines import emit_onnx


def test_positions_start_where_the_model_starts_them(tmp_path):
    """RoBERTa reserves the first positions for padding; the graph takes the usual ones, from 0."""
    config = RobertaConfig(**SIZES, is_decoder=True, pad_token_id=1, max_position_embeddings=64)
    model = tiny_decoder(config)
    assert_padded_rows_decode_as_alone(model, emit_onnx(trace_decoder(model), tmp_path))


def test_one_key_head_for_all_query_heads(tmp_path):
    """Falcon lets scaled_dot_product_attention broadcast it."""
    config = FalconConfig(**SIZES, alibi=False, new_decoder_architecture=False, multi_query=True)
    model = tiny_decoder(config)
    file = emit_onnx(trace_decoder(model), tmp_path)
    assert cache_inputs(file) == [["past_key_values.0.key", "past_key_values.0.value"]]
    assert_padded_rows_decode_as_alone(model, file)


def test_model_with_a_table_as_long_as_its_positions(tmp_path):
    """GPT-Neo slices its mask from one, and caches keys after a change of dtype that changes nothing."""
    config = GPTNeoConfig(
        hidden_size=48,
        num_heads=6,
        num_layers=1,
        attention_types=[[["global"], 1]],
        max_position_embeddings=64,
        vocab_size=97,
    )
    model = tiny_decoder(config)
    assert_padded_rows_decode_as_alone(model, emit_onnx(trace_decoder(model), tmp_path))


def test_mask_made_from_cached_values(tmp_path):
    """Doge's mask reads all values before it attends; the cache is in Attention all the same."""
    model = tiny_decoder(DogeConfig(**SIZES, num_key_value_heads=2, keep_window_size=4))
    file = emit_onnx(trace_decoder(model), tmp_path)
    assert cache_inputs(file) == [["past_key_values.0.key", "past_key_values.0.value"]]
    assert_padded_rows_decode_as_alone(model, file)


def test_mixture_of_experts(tmp_path):
    """Grouped products of experts, some of which get no token; the writes of the router keep the cache in Attention."""
    model = tiny_decoder(MixtralConfig(**SIZES, num_key_value_heads=2, num_local_experts=9, head_dim=10))
    file = emit_onnx(trace_decoder(model), tmp_path)
    assert cache_inputs(file) == [["past_key_values.0.key", "past_key_values.0.value"]]
    assert_padded_rows_decode_as_alone(model, file)
