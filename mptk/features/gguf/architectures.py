"""architectures: what llama.cpp expects of each kind of model: how tensors are stored, what its code has built in, and
a config's numbers as fields of a file.

The key of a row is the ``model_type`` of a transformers config.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from gguf import ExpertGatingFuncType, GGUFWriter, RopeScalingType
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from mptk.errors import MptkError, TargetError
from mptk.reading import Json

WeightChange = Callable[[Tensor, int], Tensor]
"""A weight and the size of a head → the tensor of the file."""
# transformers' names of what llama.cpp computes as one activation.
SILU, GELU, RELU2 = ("silu", "swish"), ("gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh"), ("relu2",)


@dataclass(frozen=True)
class Architecture:
    """What llama.cpp expects of one kind of model.

    Attributes:
        name: the architecture of the file.
        activations: names of the activation that it computes.
        changes: pattern of a tensor's name in the file → how it differs from the weight.
        square: whether heads × size of a head must be the hidden size.
        period: each ``period``-th layer attends to all tokens and the others to a window; 0: all layers to all tokens.
        fixed: fields of the config that it does not read → the value that it computes with.
        written: fields of the file that the transformers class has built in.
        counted: whether the file says how many shared experts there are, each as wide as the others.
    """

    name: str
    activations: tuple[str, ...] = SILU
    changes: Mapping[str, WeightChange] = field(default_factory=dict)
    square: bool = False
    period: int = 0
    fixed: Mapping[str, Callable[[PreTrainedConfig], object]] = field(default_factory=dict)
    written: Mapping[str, float] = field(default_factory=dict)
    counted: bool = False


def permute_pairs(weight: Tensor, head_dim: int) -> Tensor:
    """Reorder rows [heads · head_dim, …]: rotated pairs are i and i + head_dim/2 before, and neighbours after."""
    rest = weight.shape[1:]
    return weight.view(-1, 2, head_dim // 2, *rest).transpose(1, 2).reshape(weight.shape)


def group_projections(weight: Tensor, head_dim: int) -> Tensor:
    """Reorder rows [heads · 3 · head_dim, …], query, key and value of each head, to [3 · heads · head_dim, …]."""
    return weight.view(-1, 3, head_dim, *weight.shape[1:]).transpose(0, 1).reshape(weight.shape)


def transpose_weight(weight: Tensor, head_dim: int) -> Tensor:
    """The weight of a ``Conv1D`` of transformers, whose rows are inputs."""
    return weight.t()


def shift_scale(weight: Tensor, head_dim: int) -> Tensor:
    """The scale of a norm that multiplies by 1 + weight: llama.cpp multiplies by the weight."""
    return weight + 1


def flatten_weight(weight: Tensor, head_dim: int) -> Tensor:
    """One row as a vector."""
    return weight.flatten()


PAIRED = {r"\.attn_[qk]\.": permute_pairs}
SHIFTED = {r"norm\.weight$": shift_scale}
LLAMA = Architecture("llama", changes=PAIRED)
# What rows below have in common. A value of ``fixed`` is a function of the config.


def _give_always(value: object) -> Callable[[object], object]:
    return lambda config: value


def _mark_fourth_layers(config: PreTrainedConfig) -> list[int]:
    return [int((i + 1) % 4 != 0) for i in range(config.num_hidden_layers)]


ALL_EXPERTS = {"decoder_sparse_step": _give_always(1), "mlp_only_layers": _give_always([])}
"""All layers have experts."""
UNGROUPED = {"num_key_value_heads": lambda config: config.num_attention_heads}
"""Each query head has keys of its own."""
SIGMOID = {"expert_gating_func": ExpertGatingFuncType.SIGMOID}
GEMMA_SCALE = {"query_pre_attn_scalar": lambda config: config.head_dim}
"""Attention's scale follows from the size of a head."""

ARCHITECTURES = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "mixtral": LLAMA,
    "qwen2": Architecture("qwen2", square=True),
    "qwen2_moe": Architecture(
        "qwen2moe",
        changes={"ffn_gate_inp_shexp": flatten_weight},
        square=True,
        fixed={**ALL_EXPERTS, "norm_topk_prob": _give_always(False)},
    ),
    "qwen3": Architecture("qwen3"),
    "qwen3_moe": Architecture("qwen3moe", fixed={**ALL_EXPERTS, "norm_topk_prob": _give_always(True)}),
    "gemma": Architecture("gemma", GELU, SHIFTED),
    "gemma2": Architecture("gemma2", GELU, SHIFTED, period=2, fixed=GEMMA_SCALE),
    "gemma3_text": Architecture("gemma3", GELU, SHIFTED, period=6, fixed=GEMMA_SCALE),
    "phi": Architecture("phi2", GELU, square=True, fixed={"qk_layernorm": _give_always(False)}),
    "phi3": Architecture("phi3", square=True),
    "gpt2": Architecture(
        "gpt2",
        GELU,
        {r"\.(attn_qkv|attn_output|ffn_up|ffn_down)\.weight$": transpose_weight},
        square=True,
        fixed={"scale_attn_weights": _give_always(True), "scale_attn_by_inverse_layer_idx": _give_always(False)},
    ),
    "gpt_bigcode": Architecture("starcoder", GELU, square=True, fixed={"scale_attn_weights": _give_always(True)}),
    "gpt_neox": Architecture("gptneox", GELU, {r"\.attn_qkv\.": group_projections}, square=True),
    "starcoder2": Architecture("starcoder2", GELU, square=True, fixed={"use_bias": _give_always(True)}),
    "stablelm": Architecture("stablelm", square=True, fixed={"qk_layernorm": _give_always(False)}),
    "olmo": Architecture("olmo", changes=PAIRED, square=True, written={"layer_norm_eps": 1e-5}),
    "olmo2": Architecture("olmo2", square=True),
    "olmoe": Architecture(
        "olmoe",
        square=True,
        fixed={"norm_topk_prob": _give_always(False), **UNGROUPED},
    ),
    "granite": Architecture("granite", changes=PAIRED),
    "cohere": Architecture("command-r", square=True, fixed={"use_qk_norm": _give_always(False)}),
    "cohere2": Architecture("cohere2", square=True, period=4),
    "smollm3": Architecture("smollm3", changes=PAIRED, fixed={"no_rope_layers": _mark_fourth_layers}),
    "arcee": Architecture("arcee", RELU2, PAIRED),
    "nemotron": Architecture("nemotron", RELU2, SHIFTED, square=True),
    "seed_oss": Architecture("seed_oss"),
    "ernie4_5": Architecture("ernie4_5"),
    "glm4": Architecture("glm4"),
    "hunyuan_v1_dense": Architecture("hunyuan-dense"),
    "hunyuan_v1_moe": Architecture("hunyuan-moe"),
    "internlm3": LLAMA,
    "iquestcoder": LLAMA,
    "cwm": LLAMA,
    "ministral3": Architecture("mistral3", changes=PAIRED),
    "exaone": Architecture("exaone"),
    "exaone4": Architecture("exaone4", square=True, fixed={"sliding_window": _give_always(None)}),
    "jais2": Architecture("jais2", RELU2),
    "glm": Architecture("chatglm", square=True),
    "olmo3": Architecture("olmo2", square=True, period=4),
    "falcon": Architecture(
        "falcon",
        GELU,
        square=True,
        fixed={
            name: _give_always(name == "multi_query") for name in ("multi_query", "new_decoder_architecture", "alibi")
        },
    ),
    "glm4_moe": Architecture("glm4moe", fixed={"n_group": _give_always(1)}, written=SIGMOID, counted=True),
    "dots1": Architecture("dots1", fixed={"n_group": _give_always(1), **UNGROUPED}, written=SIGMOID, counted=True),
    "ernie4_5_moe": Architecture(
        "ernie4_5-moe", changes={"exp_probs_b": flatten_weight}, fixed={"moe_layer_interval": _give_always(1)}
    ),
    "granitemoe": Architecture("granitemoe", changes=PAIRED),
    "granitemoeshared": Architecture("granitemoe", changes=PAIRED),
}
"""``model_type`` → what llama.cpp expects."""

COPIED = {
    "context_length": ("max_position_embeddings",),
    "layer_norm_rms_eps": ("rms_norm_eps",),
    "layer_norm_eps": ("layer_norm_eps", "layer_norm_epsilon", "norm_epsilon", "norm_eps"),
    "expert_used_count": ("num_experts_per_tok", "moe_k"),
    "expert_weights_scale": ("routed_scaling_factor",),
    "expert_weights_norm": ("norm_topk_prob",),
    "interleave_moe_layer_step": ("moe_layer_interval",),
    "attn_logit_softcapping": ("attn_logit_softcapping",),
    "final_logit_softcapping": ("final_logit_softcapping",),
    "attention_scale": ("attention_multiplier",),
    "embedding_scale": ("embedding_multiplier",),
    "residual_scale": ("residual_multiplier",),
    "logit_scale": ("logit_scale", "logits_scaling"),
    "parallel_residual": ("use_parallel_residual",),
    "clamp_kqv": ("clip_qkv",),
}
"""Setting of gguf's writer → its names in a config, the first of which counts."""
YARN = {
    "rope_scaling_yarn_ext_factor": "extrapolation_factor",
    "rope_scaling_yarn_attn_factor": "attention_factor",
    "rope_scaling_yarn_beta_fast": "beta_fast",
    "rope_scaling_yarn_beta_slow": "beta_slow",
    "rope_scaling_yarn_log_mul": "mscale_all_dim",
    "attn_temperature_scale": "llama_4_scaling_beta",
}
"""The same for the fields of YaRN's ``rope_parameters``."""
FREQUENCIES, LONG_FACTORS, SHORT_FACTORS = "rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"
DIVISORS = (FREQUENCIES, LONG_FACTORS, SHORT_FACTORS)
"""Divisors of the rotary frequencies: tensors that the file has and the model does not have."""
ACTIVATIONS = ("hidden_activation", "hidden_act", "activation_function", "activation")
"""The activation's names in a config, the first of which counts."""
GgufSetting = tuple[str, object]


def find_architecture(config: PreTrainedConfig) -> Architecture:
    """What llama.cpp expects of the model. Raises MptkError if it would compute the model with other numbers."""
    found = ARCHITECTURES.get(config.model_type)
    if found is None:
        raise TargetError(
            f"mptk cannot write {config.model_type} models as GGUF, only {', '.join(ARCHITECTURES)}; use llama.cpp's "
            "converter",
            name=config.model_type,
            nearest=ARCHITECTURES,
        )
    # What llama.cpp has built in must be what the config says: numbers, the activation, the order of windows.
    for name, wanted in found.fixed.items():
        if (has := getattr(config, name, wanted(config))) != wanted(config):
            raise _make_unlike_error(config, f"{name} {has}", f"{wanted(config)}")
    activation = next((getattr(config, name) for name in ACTIVATIONS if getattr(config, name, None)), None)
    if activation not in found.activations:
        raise _make_unlike_error(config, f"the activation {activation}", " or ".join(found.activations))
    windows = [(i + 1) % found.period != 0 for i in range(config.num_hidden_layers)] if found.period else []
    if windows and [kind == "sliding_attention" for kind in config.layer_types] != windows:
        raise _make_unlike_error(
            config, "other sliding layers", f"a full layer after each {found.period - 1} sliding ones"
        )
    return found


def find_head_dim(config: PreTrainedConfig) -> int:
    """The size of a head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def write_settings(writer: GGUFWriter, config: PreTrainedConfig, architecture: Architecture) -> None:
    """Write what a cut does not change. The widths come from the weights."""
    for name, value in (*_list_copied(config), *_list_rope(config), *architecture.written.items()):
        getattr(writer, f"add_{name}")(value)
    writer.add_rope_dimension_count(find_rope_dim(config))
    if architecture.period:
        writer.add_sliding_window(config.sliding_window)
        writer.add_sliding_window_pattern(architecture.period)


def find_ignored_window(config: PreTrainedConfig, architecture: Architecture) -> int | None:
    """The length of the window to which layers attend, if llama.cpp lets them attend to all tokens."""
    window = getattr(config, "sliding_window", None)
    # Without a list of types, a window holds for all layers.
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"]
    if architecture.period or not window or "sliding_attention" not in kinds:
        return None
    return int(window) if window < config.max_position_embeddings else None


def find_rope_dim(config: PreTrainedConfig) -> int:
    """How many channels of a head are rotated."""
    return int(find_head_dim(config) * _find_rope(config).get("partial_rotary_factor", 1.0))


def compute_rope_divisors(config: PreTrainedConfig) -> dict[str, Tensor]:
    """The tensors that scale rotary frequencies, by name."""
    rope = _find_rope(config)
    if rope.get("rope_type") == "longrope":
        return {
            name: torch.tensor(rope[key])
            for name, key in ((LONG_FACTORS, "long_factor"), (SHORT_FACTORS, "short_factor"))
        }
    if rope.get("rope_type") != "llama3":
        return {}
    # llama.cpp divides its own frequencies by the tensor: plain frequencies over those of transformers.
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config)
    size = find_rope_dim(config)
    return {FREQUENCIES: rope["rope_theta"] ** (-torch.arange(0, size, 2).float() / size) / scaled}


def _list_copied(config: PreTrainedConfig) -> Iterator[GgufSetting]:
    for key, names in COPIED.items():
        value = next((getattr(config, name) for name in names if getattr(config, name, None) is not None), None)
        if value is not None:
            yield key, value


def _list_rope(config: PreTrainedConfig) -> Iterator[GgufSetting]:
    rope, sliding = _find_rope(config), (getattr(config, "rope_parameters", None) or {}).get("sliding_attention")
    if not rope:
        return
    # ``swa``: of the layers with a window, which may rotate otherwise.
    yield "rope_freq_base", rope["rope_theta"]
    if sliding is not None:
        yield "rope_freq_base_swa", sliding["rope_theta"]
    kind = rope.get("rope_type", "default")
    if kind == "linear":
        yield from (("rope_scaling_type", RopeScalingType.LINEAR), ("rope_scaling_factor", rope["factor"]))
    elif kind == "yarn":
        yield from (("rope_scaling_type", RopeScalingType.YARN), ("rope_scaling_factor", rope["factor"]))
        yield from ((field, rope[name]) for field, name in YARN.items() if rope.get(name) is not None)
    elif kind == "longrope":
        yield "rope_scaling_type", RopeScalingType.LONGROPE
        yield "rope_scaling_attn_factors", ROPE_INIT_FUNCTIONS["longrope"](config)[1]
    elif kind not in ("default", "llama3"):
        raise _make_unlike_error(
            config, f"rotary embeddings of type {kind}", "default, linear, llama3, longrope or yarn"
        )
    if rope.get("original_max_position_embeddings") and kind in ("yarn", "longrope"):
        yield "rope_scaling_orig_ctx_len", rope["original_max_position_embeddings"]


def _find_rope(config: PreTrainedConfig) -> Json:
    """The rotary settings of the layers that attend to all tokens; empty without rotary embeddings."""
    found = getattr(config, "rope_parameters", None) or {}
    return dict(found.get("full_attention", found))


def _make_unlike_error(config: PreTrainedConfig, has: str, wanted: str) -> MptkError:
    return TargetError(
        f"this {config.model_type} model has {has}, and llama.cpp computes such models with {wanted}; use the folder "
        "in another program",
        name=config.model_type,
    )
