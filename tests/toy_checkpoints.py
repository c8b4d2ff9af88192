"""Tiny checkpoints, tokenizers and GGUF files, made on the spot. All sizes differ, so that none passes for another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import architectures
import torch
from gguf import GGMLQuantizationType as Kind
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

import mptk
from mptk.io import data

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


def llama(*, tied: bool = True, layers: int = 2, seed: int = 0, **sizes: int) -> LlamaForCausalLM:
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
    return LlamaForCausalLM(config).eval()


def saved(model: PreTrainedModel, folder: Path, text: PreTrainedTokenizerBase | None = None) -> str:
    """The folder of a checkpoint: the model and ``tokenizer()``, or another one."""
    model.save_pretrained(folder)
    (text or tokenizer()).save_pretrained(folder)
    return str(folder)


# ---- models of few words ----

WORDS = [f"w{i}" for i in range(95)]
SETTINGS = mptk.Settings(method="wanda", sparsity=0.35, samples=4, length=48, align=8)


def save(model: PreTrainedModel, folder: Path) -> str:
    """The folder of a model whose tokens are whole words. Its weights are drawn anew."""
    text = Tokenizer(models.WordLevel({word: i for i, word in enumerate([BEGIN, END, *WORDS])}, unk_token=BEGIN))
    text.pre_tokenizer = pre_tokenizers.Whitespace()
    torch.manual_seed(0)
    words = PreTrainedTokenizerFast(tokenizer_object=text, bos_token=BEGIN, eos_token=END)
    return saved(architectures.spread(model, 0.15), folder, words)


def llama_config(**changes: Any) -> LlamaConfig:
    sizes = {"num_hidden_layers": 3, "num_key_value_heads": 3, "pad_token_id": None}
    return architectures.config("llama", **{**sizes, **changes})


# ---- files and texts ----


def write_gguf(model: LlamaForCausalLM, text: PreTrainedTokenizerFast, path: Path, *, quantise: bool = False) -> None:
    """``model`` as llama.cpp's converter writes it; ``quantise``: the matrices of the feed-forward part as Q8_0."""
    from benchmarks import gguf_file  # it needs the feature

    gguf_file.write_gguf(
        model, text, path, "Toy Of The Tests", lambda name: Kind.Q8_0 if quantise and ".mlp." in name else Kind.F32
    )


def texts(name: str, tokenizer: PreTrainedTokenizerBase | None = None) -> list[str]:
    """The documents of ``name``, each whole, without empty ones."""
    found = ("".join(document) for document in data.read_documents(name, tokenizer))
    return [text for text in found if text.strip()]
