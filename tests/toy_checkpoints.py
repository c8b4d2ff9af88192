"""Tiny checkpoints, tokenizers and GGUF files, made on the spot. All sizes differ, so that none passes for another."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

BEGIN, END = "<s>", "</s>"
SPECIAL = [BEGIN, END, "<pad>"]
TEXT = "the quick brown fox jumps over the lazy dog while seven wizards quietly mix pale blue jars of honey\n" * 4


def tokenizer(*, begin: bool = False, vocab_size: int = 300) -> PreTrainedTokenizerFast:
    """Byte-level BPE; ``begin``: puts <s> before every text. Without it there is no begin-of-sequence token."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        [TEXT], trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=SPECIAL, initial_alphabet=alphabet)
    )
    if begin:
        backend.post_processor = TemplateProcessing(single=f"{BEGIN} $A", special_tokens=[(BEGIN, 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=BEGIN if begin else None, eos_token=END, pad_token="<pad>"
    )


def llama(*, tied: bool = True, layers: int = 2, seed: int = 0) -> LlamaForCausalLM:
    """Hidden 48, 6 heads of 16 on 2 key/value heads, ffn 64, vocabulary 300."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=48,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=16,
        intermediate_size=64,
        vocab_size=300,
        num_hidden_layers=layers,
        max_position_embeddings=70,
        tie_word_embeddings=tied,
        rms_norm_eps=1e-5,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
        rope_parameters={"rope_type": "default", "rope_theta": 50000.0},
    )
    return LlamaForCausalLM(config).eval()


def write_gguf(model: LlamaForCausalLM, text: PreTrainedTokenizerFast, path: Path, *, quantise: bool = False) -> None:
    """``model`` as llama.cpp's converter writes it; ``quantise``: the matrices of the feed-forward part as Q8_0."""
    config, state = model.config, model.state_dict()
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("Toy Of The Tests")
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
    for name, tensor in state.items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        kind = gguf.GGMLQuantizationType.F32
        if ".q_proj." in name or ".k_proj." in name:
            heads = tensor.shape[0] // config.head_dim
            tensor = _interleave(tensor, heads)
        if quantise and ".mlp." in name and tensor.shape[-1] % 32 == 0:
            kind = gguf.GGMLQuantizationType.Q8_0
        writer.add_tensor(_gguf_name(name), gguf.quantize(tensor.numpy(), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _interleave(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rotary halves → llama.cpp's adjacent pairs, in each head."""
    out, hidden = weight.shape
    return weight.view(heads, 2, out // heads // 2, hidden).transpose(1, 2).reshape(out, hidden).contiguous()


def _gguf_name(name: str) -> str:
    for old, new in {
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "lm_head": "output",
        "model.layers.": "blk.",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "post_attention_layernorm": "ffn_norm",
        "input_layernorm": "attn_norm",
    }.items():
        name = name.replace(old, new)
    return name


def _write_tokenizer(writer: gguf.GGUFWriter, text: PreTrainedTokenizerFast) -> None:
    spec = json.loads(text.backend_tokenizer.to_str())["model"]
    tokens = sorted(spec["vocab"], key=spec["vocab"].get)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL if token in SPECIAL else gguf.TokenType.NORMAL for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in spec["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_unk_token_id(2)
    writer.add_add_bos_token(False)
    writer.add_add_space_prefix(False)
    writer.add_pad_token_id(2)
