"""Tiny tokenizers, of bytes and of words, and the folder of a model with one."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from mptk.testing.decoders import draw_weights

BEGIN, END, PADDING = "<s>", "</s>", "<pad>"
WORDS = [f"w{i}" for i in range(95)]
"""The vocabulary of ``make_word_tokenizer``, beside a begin and an end."""
SENTENCES = "the quick brown fox jumps over the lazy dog while seven wizards quietly mix pale blue jars of honey\n" * 4
"""What ``make_tokenizer`` is trained on."""


def make_tokenizer(*, begin: bool = False, vocab_size: int = 300) -> PreTrainedTokenizerFast:
    """Byte-level BPE. With ``begin`` it puts a token before every text; without, it has none for the begin."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[BEGIN, END, PADDING], initial_alphabet=alphabet
    )
    backend.train_from_iterator([SENTENCES], trainer)
    if begin:
        backend.post_processor = TemplateProcessing(single=f"{BEGIN} $A", special_tokens=[(BEGIN, 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=BEGIN if begin else None, eos_token=END, pad_token=PADDING
    )


def make_word_tokenizer() -> PreTrainedTokenizerFast:
    """97 tokens: a begin, an end and ``WORDS``. Text is words with spaces between them."""
    text = Tokenizer(models.WordLevel({word: i for i, word in enumerate([BEGIN, END, *WORDS])}, unk_token=BEGIN))
    text.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=text, bos_token=BEGIN, eos_token=END)


def save_model(model: PreTrainedModel, folder: Path, tokenizer: PreTrainedTokenizerBase | None = None) -> str:
    """Write a checkpoint with ``make_tokenizer()``, or another one. Gives the folder's name."""
    model.save_pretrained(folder)
    (tokenizer or make_tokenizer()).save_pretrained(folder)
    return str(folder)


def save_word_model(model: PreTrainedModel, folder: Path) -> str:
    """Write a checkpoint with ``make_word_tokenizer`` and weights that are drawn anew. Gives the folder's name."""
    torch.manual_seed(0)
    return save_model(draw_weights(model, 0.15), folder, make_word_tokenizer())
