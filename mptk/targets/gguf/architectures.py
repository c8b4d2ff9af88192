"""architectures: what llama.cpp expects of each kind of model: how tensors are stored, and what its code has built in.

The key of a row is the ``model_type`` of a transformers config.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

WeightChange = Callable[[Tensor, int], Tensor]
"""A weight and the size of a head → the tensor of the file."""
SILU, GELU, RELU2 = ("silu", "swish"), ("gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh"), ("relu2",)


@dataclass(frozen=True)
class Architecture:
    """What llama.cpp expects of one kind of model.

    Attributes:
        name: the architecture of the file.
        activations: names of the activation that it computes.
        changes: pattern of a tensor's name in the file → how it differs from the weight.
        square: whether heads x size of a head must be the hidden size.
        period: each ``period``-th layer attends to all tokens and the others to a window; 0: all layers to all tokens.
        fixed: fields of the config that it does not read → the value that it computes with.
        written: fields of the file that the transformers class has built in.
    """

    name: str
    activations: tuple[str, ...] = SILU
    changes: Mapping[str, WeightChange] = field(default_factory=dict)
    square: bool = False
    period: int = 0
    fixed: Mapping[str, Callable[[Any], object]] = field(default_factory=dict)
    written: Mapping[str, float] = field(default_factory=dict)


def paired(weight: Tensor, head_dim: int) -> Tensor:
    """Reorder rows [heads · head_dim, …]: rotated pairs are i and i + head_dim/2 before, and neighbours after."""
    rest = weight.shape[1:]
    return weight.view(-1, 2, head_dim // 2, *rest).transpose(1, 2).reshape(weight.shape)


def regrouped(weight: Tensor, head_dim: int) -> Tensor:
    """Reorder rows [heads · 3 · head_dim, …], query, key and value of each head, to [3 · heads · head_dim, …]."""
    return weight.view(-1, 3, head_dim, *weight.shape[1:]).transpose(0, 1).reshape(weight.shape)


def transposed(weight: Tensor, head_dim: int) -> Tensor:
    """Rows are output channels."""
    return weight.t()


def shifted(weight: Tensor, head_dim: int) -> Tensor:
    """The scale of a norm that multiplies by 1 + weight."""
    return weight + 1


def flat(weight: Tensor, head_dim: int) -> Tensor:
    """One row as a vector."""
    return weight.flatten()


PAIRED = {r"\.attn_[qk]\.": paired}
SHIFTED = {r"norm\.weight$": shifted}
LLAMA = Architecture("llama", changes=PAIRED)


def _always(value: object) -> Callable[[Any], object]:
    return lambda config: value


def _every_fourth(config: Any) -> list[int]:
    return [int((i + 1) % 4 != 0) for i in range(config.num_hidden_layers)]


ALL_EXPERTS = {"decoder_sparse_step": _always(1), "mlp_only_layers": _always([])}
GEMMA_SCALE = {"query_pre_attn_scalar": lambda config: config.head_dim}

ARCHITECTURES = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "mixtral": LLAMA,
    "qwen2": Architecture("qwen2", square=True),
    "qwen2_moe": Architecture(
        "qwen2moe",
        changes={"ffn_gate_inp_shexp": flat},
        square=True,
        fixed={**ALL_EXPERTS, "norm_topk_prob": _always(False)},
    ),
    "qwen3": Architecture("qwen3"),
    "qwen3_moe": Architecture("qwen3moe", fixed={**ALL_EXPERTS, "norm_topk_prob": _always(True)}),
    "gemma": Architecture("gemma", GELU, SHIFTED),
    "gemma2": Architecture("gemma2", GELU, SHIFTED, period=2, fixed=GEMMA_SCALE),
    "gemma3_text": Architecture("gemma3", GELU, SHIFTED, period=6, fixed=GEMMA_SCALE),
    "phi": Architecture("phi2", GELU, square=True, fixed={"qk_layernorm": _always(False)}),
    "phi3": Architecture("phi3", square=True),
    "gpt2": Architecture(
        "gpt2",
        GELU,
        {r"\.(attn_qkv|attn_output|ffn_up|ffn_down)\.weight$": transposed},
        square=True,
        fixed={"scale_attn_weights": _always(True), "scale_attn_by_inverse_layer_idx": _always(False)},
    ),
    "gpt_bigcode": Architecture("starcoder", GELU, square=True, fixed={"scale_attn_weights": _always(True)}),
    "gpt_neox": Architecture("gptneox", GELU, {r"\.attn_qkv\.": regrouped}, square=True),
    "starcoder2": Architecture("starcoder2", GELU, square=True, fixed={"use_bias": _always(True)}),
    "stablelm": Architecture("stablelm", square=True, fixed={"qk_layernorm": _always(False)}),
    "olmo": Architecture("olmo", changes=PAIRED, square=True, written={"layer_norm_eps": 1e-5}),
    "olmo2": Architecture("olmo2", square=True),
    "olmoe": Architecture(
        "olmoe",
        square=True,
        fixed={"norm_topk_prob": _always(False), "num_key_value_heads": lambda config: config.num_attention_heads},
    ),
    "granite": Architecture("granite", changes=PAIRED),
    "cohere": Architecture("command-r", square=True, fixed={"use_qk_norm": _always(False)}),
    "cohere2": Architecture("cohere2", square=True, period=4),
    "smollm3": Architecture("smollm3", changes=PAIRED, fixed={"no_rope_layers": _every_fourth}),
    "arcee": Architecture("arcee", RELU2, PAIRED),
    "nemotron": Architecture("nemotron", RELU2, SHIFTED, square=True),
    "seed_oss": Architecture("seed_oss"),
    "ernie4_5": Architecture("ernie4_5"),
    "glm4": Architecture("glm4"),
    "hunyuan_v1_dense": Architecture("hunyuan-dense"),
}
