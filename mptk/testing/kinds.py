"""A tiny checkpoint of each kind of model, and data that it reads."""

from __future__ import annotations

import wave
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
)

from mptk.testing.checkpoints import WORDS, make_tokenizer, save_word_model
from mptk.testing.decoders import make_config

TOKEN_COUNT = 300
CLASSES = 7
ENCODER_SIZES: dict[str, Any] = {
    "vocab_size": TOKEN_COUNT,
    "hidden_size": 24,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
}
ENCODER = {**ENCODER_SIZES, "max_position_embeddings": 64}


@dataclass(frozen=True)
class ModelKind:
    """``data``: which of the files of ``write_data`` it reads. ``task``, ``metric``: what a report says of it."""

    make: Callable[[], PreTrainedModel]
    task: str
    metric: str
    data: str = "text.txt"


def _make_speech() -> PreTrainedModel:
    return WhisperForConditionalGeneration(
        WhisperConfig(
            d_model=24,
            encoder_layers=1,
            decoder_layers=1,
            encoder_ffn_dim=40,
            decoder_ffn_dim=44,
            vocab_size=97,
            encoder_attention_heads=3,
            decoder_attention_heads=3,
            max_source_positions=50,
            max_target_positions=64,
            num_mel_bins=8,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            decoder_start_token_id=3,
            suppress_tokens=None,
            begin_suppress_tokens=None,
        )
    )


def _make_decoder() -> PreTrainedModel:
    config = make_config("llama", num_hidden_layers=3, num_key_value_heads=3, pad_token_id=None)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return model


def _make_encoder_decoder() -> PreTrainedModel:
    sizes: dict[str, Any] = {"d_model": 24, "d_kv": 8, "d_ff": 40, "num_layers": 2, "num_heads": 3}
    sizes |= {"vocab_size": TOKEN_COUNT, "decoder_start_token_id": 0}
    return T5ForConditionalGeneration(T5Config(**sizes))


def _make_image_classifier() -> PreTrainedModel:
    return ViTForImageClassification(
        ViTConfig(**{**ENCODER_SIZES, "image_size": 16, "patch_size": 4, "num_labels": CLASSES})
    )


MODEL_KINDS: dict[str, ModelKind] = {
    "decoder": ModelKind(_make_decoder, "causal-lm", "perplexity", "words.txt"),
    "encoder": ModelKind(lambda: BertModel(BertConfig(**ENCODER)), "encoder", "cosine"),
    "text classifier": ModelKind(
        lambda: BertForSequenceClassification(BertConfig(**{**ENCODER, "num_labels": CLASSES})),
        "classification",
        "agreement",
    ),
    "masked language model": ModelKind(
        lambda: BertForMaskedLM(BertConfig(**{**ENCODER, "vocab_size": TOKEN_COUNT + 1})),
        "masked-lm",
        "pseudo-perplexity",
    ),
    "encoder-decoder": ModelKind(_make_encoder_decoder, "seq2seq", "perplexity"),
    "image classifier": ModelKind(_make_image_classifier, "classification", "agreement", "images"),
    "speech": ModelKind(_make_speech, "seq2seq", "perplexity", "sounds"),
}
"""Kind of model → how its tiny one is made. All but the decoder need features of mptk."""


def write_kind(name: str, folder: Path) -> None:
    """Write the checkpoint of a kind, with what prepares its inputs. Its weights are the same each time."""
    torch.manual_seed(0)
    model = MODEL_KINDS[name].make()
    if name == "decoder":
        save_word_model(model, folder)
        return
    model.save_pretrained(folder)
    if name == "image classifier":
        ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder)
    elif name == "speech":
        WhisperFeatureExtractor(feature_size=8, chunk_length=1).save_pretrained(folder)
    else:
        tokenizer = make_tokenizer()
        if name == "masked language model":
            tokenizer.add_special_tokens({"mask_token": "<mask>"})
        tokenizer.save_pretrained(folder)


def write_data(root: Path) -> None:
    """Write text, words, two classes of images, and sounds: ``text.txt``, ``words.txt``, ``images/``, ``sounds/``."""
    root.mkdir(parents=True, exist_ok=True)
    (root / "text.txt").write_text("the quick brown fox jumps over a lazy dog. " * 200)
    draw = np.random.default_rng(0)
    (root / "words.txt").write_text(" ".join(draw.choice(WORDS, 2000)))
    for i in range(6):
        path = root / "images" / f"{i % 2}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw.integers(0, 255, (20, 30, 3), dtype=np.uint8)).save(path)
    (root / "sounds").mkdir()
    for i in range(6):
        with wave.open(str(root / "sounds" / f"{i}.wav"), "wb") as file:
            file.setnchannels(1)
            file.setsampwidth(2)
            file.setframerate(16_000)
            file.writeframes(draw.integers(-9000, 9000, 16_000, dtype=np.int16).tobytes())
