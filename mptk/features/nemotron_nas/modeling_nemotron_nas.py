"""modeling_nemotron_nas: LLaMA with a feed-forward width and a number of KV heads for each block.

mptk copies this file into a checkpoint folder, under mptk's licence, Apache-2.0. transformers runs it from there with
``trust_remote_code=True``; it needs nothing but transformers. The config is DeciLM's (``nemotron-nas``), which
vLLM, SGLang, TensorRT-LLM and mlx-lm read with code of their own. Its ``block_configs`` has one entry for each block:

    {"attention": {"no_op": false, "replace_with_linear": false, "n_heads_in_group": 3},
     "ffn": {"no_op": false, "replace_with_linear": false, "ffn_mult": 2.0}}

``n_heads_in_group`` is the number of query heads for each KV head. ``ffn_mult`` says the feed-forward width as in
``compute_ffn_width``; the width itself, as ``intermediate_size``, may stand in its place. A part that is ``no_op`` is
absent.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

WIDTH_STEP = 256
"""Widths that ``ffn_mult`` can say are multiples of this."""


class Fields(dict[str, Any]):
    """A JSON object whose fields are attributes, too, as the engines read them."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


class DeciLMConfig(LlamaConfig):
    """LLaMA's config with ``block_configs``."""

    model_type = "nemotron-nas"

    def __init__(self, block_configs: Sequence[Mapping[str, Mapping[str, Any]]] = (), **fields: Any) -> None:
        super().__init__(**fields)
        self.block_configs = [Fields({part: Fields(own) for part, own in block.items()}) for block in block_configs]


class DeciLMForCausalLM(LlamaForCausalLM):
    """LLaMA whose blocks have the widths of ``config.block_configs``.

    Raises:
        ValueError: there are more or fewer entries than blocks, or a block has a linear layer in place of a part.
    """

    config_class = DeciLMConfig

    def __init__(self, config: DeciLMConfig) -> None:
        super().__init__(config)
        if len(config.block_configs) != config.num_hidden_layers:
            raise ValueError(
                f"block_configs has {len(config.block_configs)} entries for {config.num_hidden_layers} blocks"
            )
        place = 0
        for i, fields in enumerate(config.block_configs):
            self.model.layers[i] = _build_block(config, fields, place)
            place += not fields.attention.no_op  # the cache counts only blocks with attention
        self.post_init()  # type: ignore[no-untyped-call]


def compute_ffn_width(fields: Fields, hidden: int) -> int:
    """The feed-forward width that a block's ``ffn`` says."""
    if "ffn_mult" not in fields:
        return int(fields.intermediate_size)
    return -(-int(2 * fields.ffn_mult * hidden / 3) // WIDTH_STEP) * WIDTH_STEP


def _build_block(config: DeciLMConfig, fields: Fields, place: int) -> nn.Module:
    attention, ffn = fields.attention, fields.ffn
    if attention.get("replace_with_linear") or ffn.get("replace_with_linear"):
        raise ValueError("a block with a linear layer in place of attention or feed-forward is not supported")
    own = copy.copy(config)
    if not attention.no_op:
        own.num_key_value_heads = config.num_attention_heads // attention.n_heads_in_group
    if not ffn.no_op:
        own.intermediate_size = compute_ffn_width(ffn, config.hidden_size)
    block: Any = LlamaDecoderLayer(own, place)
    block.self_attn.config = block.mlp.config = config  # what is set later, as the kind of attention, is set there
    if attention.no_op:
        block.input_layernorm, block.self_attn = nn.Identity(), NoHeads()
    if ffn.no_op:
        block.post_attention_layernorm, block.mlp = nn.Identity(), NoChannels()
    return cast("nn.Module", block)


class NoHeads(nn.Module):
    """Adds nothing in place of attention."""

    def forward(self, hidden_states: Tensor, **_: Any) -> tuple[Tensor, None]:
        return torch.zeros_like(hidden_states), None


class NoChannels(nn.Module):
    """Adds nothing in place of the feed-forward part."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return torch.zeros_like(hidden_states)
