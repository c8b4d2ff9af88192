"""Tiny decoders of four kinds (architectures.py), and ONNX graphs of them."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from mptk import testing
from passes.frontend.trace_decoder import trace_decoder
from passes.pipelines import ONNX_SCHEMES, emit_onnx, quantize_onnx

CONFIGS: dict[str, PreTrainedConfig] = {
    "grouped heads, rotary": testing.make_config("llama"),
    "sliding window, normed heads": testing.make_config("gemma3"),
    "learned positions, fused qkv": testing.make_config("gpt2"),
    "learned positions, biases": testing.make_config("opt"),
}
GROUPED, SLIDING, FUSED, BIASED = CONFIGS


def tiny_decoder(kind: str | PreTrainedConfig, **changes: int) -> PreTrainedModel:
    config = CONFIGS[kind] if isinstance(kind, str) else kind
    if changes:
        config = type(config)(**{**config.to_dict(), **changes})
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config).eval()
    return testing.draw_weights(model, 0.3)


def write_graphs(kind: str, folder: Path) -> None:
    """The ONNX graph of a tiny decoder, and one quantised by each scheme."""
    folder.mkdir()
    source = emit_onnx(trace_decoder(tiny_decoder(kind)), folder, metadata={"plan_sha256": "0a1b"})
    files = {"float": source.name} | {scheme: quantize_onnx(source, scheme).name for scheme in ONNX_SCHEMES}
    (folder / "files.json").write_text(json.dumps(files))


def graphs_of(folder: Path) -> dict[str, Path]:
    """Scheme, or float → the file of its graph."""
    return {scheme: folder / name for scheme, name in json.loads((folder / "files.json").read_text()).items()}
