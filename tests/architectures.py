"""Tiny random models of nine architectures. Sizes are pairwise different, so that a mixed-up axis cannot pass by luck:
hidden 48, ffn 80, 6 heads (2 KV heads), head size 10 (8 where the architecture ties it to 48 / 6), vocabulary 97."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

Model = TypeVar("Model", bound=torch.nn.Module)
HIDDEN, FFN, HEADS, KV, HEAD, VOCAB, LAYERS = 48, 80, 6, 2, 10, 97, 2
GROUPED = {
    "hidden_size": HIDDEN,
    "intermediate_size": FFN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV,
    "vocab_size": VOCAB,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
TOKENS = {key: GROUPED[key] for key in ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")}
PLAIN = {**TOKENS, "hidden_size": HIDDEN, "num_attention_heads": HEADS, "num_hidden_layers": LAYERS}
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {**GROUPED, "head_dim": HEAD}),
    "qwen2": ("Qwen2Config", {**GROUPED}),
    "qwen3": ("Qwen3Config", {**GROUPED, "head_dim": HEAD}),
    "gemma3": (
        "Gemma3TextConfig",
        {**GROUPED, "head_dim": HEAD, "sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "phi3": ("Phi3Config", {**GROUPED}),
    "gpt2": (
        "GPT2Config",
        {**TOKENS, "n_embd": HIDDEN, "n_inner": FFN, "n_layer": LAYERS, "n_head": HEADS, "n_positions": 64},
    ),
    "opt": (
        "OPTConfig",
        {**PLAIN, "ffn_dim": FFN, "max_position_embeddings": 64, "word_embed_proj_dim": HIDDEN},
    ),
    "gptneox": ("GPTNeoXConfig", {**PLAIN, "intermediate_size": FFN, "rotary_pct": 0.5}),
    "mixtral": ("MixtralConfig", {**GROUPED, "num_local_experts": 5, "num_experts_per_tok": 2}),
}


def config(architecture: str, **changes: Any) -> PreTrainedConfig:
    name, values = CONFIGS[architecture]
    made: PreTrainedConfig = getattr(transformers, name)(**{**values, **changes})
    return made


def model(architecture: str, *, meta: bool = False, attention: str = "sdpa", **changes: Any) -> PreTrainedModel:
    """The model in eval mode, with weights far from their small initial values (norms and biases too)."""
    torch.manual_seed(0)
    with torch.device("meta" if meta else "cpu"):
        made: PreTrainedModel = AutoModelForCausalLM.from_config(
            config(architecture, **changes), attn_implementation=attention
        )
    return (made if meta else spread(made)).eval()


def spread(model: Model, std: float = 0.2) -> Model:
    """The model itself, its weights far from their small initial values (norms and biases too)."""
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=std)
    return model


def tokens(batch: int = 2, sequence: int = 7) -> torch.Tensor:
    return torch.randint(3, VOCAB, (batch, sequence), generator=torch.Generator().manual_seed(batch * 100 + sequence))
