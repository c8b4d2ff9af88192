"""Tiny checkpoints of every kind of model, with data for them, and the folders they are pruned to: each made once a run."""

from __future__ import annotations

import wave
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from PIL import Image
from transformers import (
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

import mptk
from mptk import testing

VOCAB = len(testing.make_tokenizer())
CLASSES = 7
SIZE = {
    "vocab_size": VOCAB,
    "hidden_size": 24,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
}
BERT = {**SIZE, "max_position_embeddings": 64}
SPEECH = {"d_model": 24, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 40, "decoder_ffn_dim": 44}
VAE: dict[str, Any] = {
    "block_out_channels": [12, 24],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "sample_size": 16,
}
MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "encoder": lambda: BertModel(BertConfig(**BERT)),
    "text classifier": lambda: BertForSequenceClassification(BertConfig(**BERT, num_labels=CLASSES)),
    "masked language model": lambda: BertForMaskedLM(BertConfig(**{**BERT, "vocab_size": VOCAB + 1})),
    "encoder-decoder": lambda: T5ForConditionalGeneration(
        T5Config(vocab_size=VOCAB, d_model=24, d_kv=8, d_ff=40, num_layers=2, num_heads=3, decoder_start_token_id=0)
    ),
    "image classifier": lambda: ViTForImageClassification(
        ViTConfig(**{**SIZE, "image_size": 16, "patch_size": 4, "num_labels": CLASSES})
    ),
    "speech": lambda: WhisperForConditionalGeneration(
        WhisperConfig(
            **SPEECH,
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
    ),
}
DATA = {"image classifier": "images", "speech": "sounds"}
METRICS = {
    "encoder": ("encoder", "cosine"),
    "text classifier": ("classification", "agreement"),
    "masked language model": ("masked-lm", "pseudo-perplexity"),
    "encoder-decoder": ("seq2seq", "perplexity"),
    "image classifier": ("classification", "agreement"),
    "speech": ("seq2seq", "perplexity"),
}


def made_once(root: Path, name: str, make: Callable[[Path], object]) -> Path:
    """``root/name`` as ``make`` writes it; the first worker that asks makes it, the others wait."""
    with FileLock(root / f"{name}.lock"):
        if not (root / f"{name}.done").exists():
            make(root / name)
            (root / f"{name}.done").touch()
    return root / name


def write_all(root: Path) -> None:
    """A checkpoint of each kind, with what prepares its inputs, and data for each."""
    root.mkdir()
    for name, make in MODELS.items():
        torch.manual_seed(0)
        make().save_pretrained(root / name)
    for name in ("encoder", "text classifier", "encoder-decoder"):
        testing.make_tokenizer().save_pretrained(root / name)
    words = testing.make_tokenizer()
    words.add_special_tokens({"mask_token": "<mask>"})
    words.save_pretrained(root / "masked language model")
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(root / "image classifier")
    WhisperFeatureExtractor(feature_size=8, chunk_length=1).save_pretrained(root / "speech")
    (root / "text.txt").write_text("the quick brown fox jumps over a lazy dog. " * 200)
    rng = np.random.default_rng(0)
    for i in range(6):
        path = root / "images" / f"{i % 2}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (20, 30, 3), dtype=np.uint8)).save(path)
    (root / "sounds").mkdir()
    for i in range(6):
        with wave.open(str(root / "sounds" / f"{i}.wav"), "wb") as file:
            file.setnchannels(1)
            file.setsampwidth(2)
            file.setframerate(16_000)
            file.writeframes(rng.integers(-9000, 9000, 16_000, dtype=np.int16).tobytes())


def settings(folders: Path, name: str, **more: Any) -> mptk.Settings:
    """30 % off a tiny model, calibrated and measured on a few samples of its kind's data; no ONNX."""
    return mptk.Settings(
        **{
            "method": "wanda",
            "data": str(folders / DATA.get(name, "text.txt")),
            "samples": 4,
            "length": 12,
            "eval_windows": 3,
            "eval_length": 12,
            "align": 2,
            "sparsity": 0.3,
            "tolerance": 0.3,
            "onnx": False,
            **more,
        }
    )
