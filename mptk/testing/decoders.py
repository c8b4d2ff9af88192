"""Tiny random decoders of nine architectures.

Sizes are pairwise different, so that a mixed-up axis cannot pass by luck: hidden 48, ffn 80, 6 heads (2 KV heads), head
size 10 (8 if the architecture ties it to 48 / 6), vocabulary 97.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch
import transformers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedConfig, PreTrainedModel

SomeModule = TypeVar("SomeModule", bound=torch.nn.Module)
HIDDEN_WIDTH = 48
FFN_SIZE = 80
HEAD_COUNT = 6
KV_COUNT = 2
HEAD_SIZE = 10
VOCAB_SIZE = 97
LAYER_COUNT = 2
GROUPED = {
    "hidden_size": HIDDEN_WIDTH,
    "intermediate_size": FFN_SIZE,
    "num_hidden_layers": LAYER_COUNT,
    "num_attention_heads": HEAD_COUNT,
    "num_key_value_heads": KV_COUNT,
    "vocab_size": VOCAB_SIZE,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
TOKEN_IDS = {key: GROUPED[key] for key in ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")}
UNSHARED_HEADS = {
    **TOKEN_IDS,
    "hidden_size": HIDDEN_WIDTH,
    "num_attention_heads": HEAD_COUNT,
    "num_hidden_layers": LAYER_COUNT,
}
DECODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {**GROUPED, "head_dim": HEAD_SIZE}),
    "qwen2": ("Qwen2Config", {**GROUPED}),
    "qwen3": ("Qwen3Config", {**GROUPED, "head_dim": HEAD_SIZE}),
    "gemma3": (
        "Gemma3TextConfig",
        {**GROUPED, "head_dim": HEAD_SIZE, "sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "phi3": ("Phi3Config", {**GROUPED}),
    "gpt2": (
        "GPT2Config",
        {
            **TOKEN_IDS,
            "n_embd": HIDDEN_WIDTH,
            "n_inner": FFN_SIZE,
            "n_layer": LAYER_COUNT,
            "n_head": HEAD_COUNT,
            "n_positions": 64,
        },
    ),
    "opt": (
        "OPTConfig",
        {**UNSHARED_HEADS, "ffn_dim": FFN_SIZE, "max_position_embeddings": 64, "word_embed_proj_dim": HIDDEN_WIDTH},
    ),
    "gptneox": ("GPTNeoXConfig", {**UNSHARED_HEADS, "intermediate_size": FFN_SIZE, "rotary_pct": 0.5}),
    "mixtral": ("MixtralConfig", {**GROUPED, "num_local_experts": 5, "num_experts_per_tok": 2}),
}


def make_config(architecture: str, **changes: Any) -> PreTrainedConfig:
    """The config of one of ``DECODERS``, with ``changes`` of its entries."""
    name, values = DECODERS[architecture]
    made: PreTrainedConfig = getattr(transformers, name)(**{**values, **changes})
    return made


def make_decoder(architecture: str, *, meta: bool = False, attention: str = "sdpa", **changes: Any) -> PreTrainedModel:
    """The model in eval mode, with weights far from their small initial values (norms and biases too)."""
    torch.manual_seed(0)
    with torch.device("meta" if meta else "cpu"):
        made: PreTrainedModel = AutoModelForCausalLM.from_config(
            make_config(architecture, **changes), attn_implementation=attention
        )
    found: PreTrainedModel = (made if meta else draw_weights(made)).eval()
    return found


def draw_weights(model: SomeModule, std: float = 0.2) -> SomeModule:
    """The model itself, its weights far from their small initial values (norms and biases too)."""
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=std)
    return model


def draw_tokens(batch: int = 2, sequence: int = 7) -> torch.Tensor:
    """Token ids of shape [batch, sequence], the same for the same shape, without the three special tokens."""
    return torch.randint(
        3, VOCAB_SIZE, (batch, sequence), generator=torch.Generator().manual_seed(batch * 100 + sequence)
    )


def make_llama(*, tied: bool = True, layers: int = 2, seed: int = 0, **sizes: Any) -> LlamaForCausalLM:
    """Hidden 48, 6 heads of 16 on 2 key/value heads, ffn 64, vocabulary 300; ``sizes``: other entries of the config."""
    torch.manual_seed(seed)
    own: dict[str, Any] = {
        "hidden_size": 48,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "intermediate_size": 64,
        "vocab_size": 300,
        "max_position_embeddings": 70,
        "rope_parameters": {"rope_type": "default", "rope_theta": 50000.0},
    }
    config = LlamaConfig(
        **{**own, **sizes},
        num_hidden_layers=layers,
        tie_word_embeddings=tied,
        rms_norm_eps=1e-5,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    model: LlamaForCausalLM = LlamaForCausalLM(config).eval()
    return model
