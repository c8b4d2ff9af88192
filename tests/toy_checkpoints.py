"""Settings of short runs, two decoders that files share, GGUF files, and texts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from gguf import GGMLQuantizationType as Kind
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

import mptk
from mptk.io import data
from mptk.testing import make_config, save_word_model

SETTINGS = mptk.Settings(method="wanda", sparsity=0.35, samples=4, length=48, align=8)


def llama_config(**changes: Any) -> PreTrainedConfig:
    sizes = {"num_hidden_layers": 3, "num_key_value_heads": 3, "pad_token_id": None}
    return make_config("llama", **{**sizes, **changes})


@pytest.fixture(scope="module")
def llama(laboratory):
    return str(laboratory.open_model())


@pytest.fixture(scope="module")
def gpt2(laboratory):
    """A decoder whose heads have no size in its config."""
    sizes = {"n_embd": 48, "n_inner": 80, "n_layer": 2, "n_head": 6, "vocab_size": 97, "n_positions": 64}
    config = GPT2Config(**sizes, bos_token_id=0, eos_token_id=1)
    return str(laboratory.keep("toy/gpt2", lambda folder: save_word_model(GPT2LMHeadModel(config), folder)))


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
