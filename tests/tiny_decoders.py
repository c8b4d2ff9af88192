"""Tiny decoders of four kinds, sizes pairwise different, weights far from their small initial values."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    OPTConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from passes.frontend.trace_decoder import trace_decoder
from passes.pipelines import SCHEMES, emit_onnx, quantize_onnx

TOKENS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
CONFIGS: dict[str, PreTrainedConfig] = {
    "grouped heads, rotary": LlamaConfig(
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=10,
        vocab_size=97,
        **TOKENS,
    ),
    "sliding window, normed heads": Gemma3TextConfig(
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=10,
        vocab_size=97,
        sliding_window=5,
        layer_types=["sliding_attention", "full_attention"],
        **TOKENS,
    ),
    "learned positions, fused qkv": GPT2Config(
        n_embd=48, n_inner=80, n_layer=2, n_head=6, n_positions=64, vocab_size=97, **TOKENS
    ),
    "learned positions, biases": OPTConfig(
        hidden_size=48,
        word_embed_proj_dim=48,
        ffn_dim=80,
        num_hidden_layers=2,
        num_attention_heads=6,
        max_position_embeddings=64,
        vocab_size=97,
        **TOKENS,
    ),
}
GROUPED, SLIDING, FUSED, BIASED = CONFIGS


def tiny_decoder(kind: str | PreTrainedConfig, **changes: int) -> PreTrainedModel:
    config = CONFIGS[kind] if isinstance(kind, str) else kind
    if changes:
        config = type(config)(**{**config.to_dict(), **changes})
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.3)
    return model


def write_graphs(kind: str, folder: Path) -> None:
    """The ONNX graph of a tiny decoder, and one quantised by each scheme."""
    folder.mkdir()
    source = emit_onnx(trace_decoder(tiny_decoder(kind)), folder, metadata={"plan_sha256": "0a1b"})
    files = {"float": source.name} | {scheme: quantize_onnx(source, scheme).name for scheme in SCHEMES}
    (folder / "files.json").write_text(json.dumps(files))


def graphs_of(folder: Path) -> dict[str, Path]:
    """Scheme, or float → the file of its graph."""
    return {scheme: folder / name for scheme, name in json.loads((folder / "files.json").read_text()).items()}
