"""gguf_file: a LLaMA model as the GGUF file that llama.cpp's converter makes of its checkpoint."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import gguf
from gguf import GGMLQuantizationType as Kind
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

from mptk.features.gguf.architectures import permute_pairs

BLOCK = 32
"""Weights that share a scale in Q8_0 and Q4_0."""

Stored = Callable[[str], Kind]
"""A weight's name in the checkpoint → the type in which its file has it."""


def write_gguf(model: LlamaForCausalLM, text: PreTrainedTokenizerBase, path: Path, name: str, stored: Stored) -> None:
    """``model``, called ``name``, as llama.cpp's converter writes it. A matrix whose rows no block divides stays float32."""
    config, state = model.config, model.state_dict()
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name(name)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    _write_tokenizer(writer, text)
    for weight, tensor in state.items():
        if weight == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if ".q_proj." in weight or ".k_proj." in weight:
            tensor = permute_pairs(tensor, config.head_dim)
        kind = stored(weight) if tensor.ndim == 2 and tensor.shape[-1] % BLOCK == 0 else Kind.F32
        writer.add_tensor(
            names.get_name(weight, try_suffixes=(".weight", ".bias")),
            gguf.quantize(tensor.numpy(), kind),
            raw_dtype=kind,
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _write_tokenizer(writer: gguf.GGUFWriter, text: PreTrainedTokenizerBase) -> None:
    spec = json.loads(text.backend_tokenizer.to_str())["model"]
    tokens = sorted(spec["vocab"], key=spec["vocab"].get)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    special = set(text.all_special_tokens)
    writer.add_token_types([gguf.TokenType.CONTROL if token in special else gguf.TokenType.NORMAL for token in tokens])
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in spec["merges"]])
    begin, end, pad = text.bos_token_id, text.eos_token_id, text.pad_token_id
    writer.add_bos_token_id(end if begin is None else begin)
    writer.add_eos_token_id(end)
    writer.add_unk_token_id(pad if text.unk_token_id is None else text.unk_token_id)
    writer.add_add_bos_token(False)
    writer.add_add_space_prefix(False)
    writer.add_pad_token_id(pad)
