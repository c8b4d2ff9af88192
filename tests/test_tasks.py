"""Masked language models through the command line: pruned, proven, measured by what they predict under masks.

It reaches for mptk.tasks: tokens are masked without a run.
"""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForMaskedLM, BertConfig, BertForMaskedLM, PreTrainedTokenizerFast

import mptk
from mptk import MptkError
from mptk.config.learning import Learning, Training
from mptk.io.models import load
from mptk.tasks import task_of
from mptk.tasks.masked_lm import FIRST, STRIDE

WORDS = [
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "lazy",
    "dog",
    "while",
    "seven",
    "wizards",
    "mix",
    "pale",
    "blue",
    "jars",
    "of",
    "honey",
]
SPECIAL = ["[PAD]", "[UNK]", "[MASK]"]
SETTINGS = {"sparsity": 0.316, "align": 4, "samples": 4, "length": 21, "eval_windows": 3, "eval_length": 24}


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Hidden 24, 3 heads of 8, ffn 40, 2 layers, 20 words."""
    folder = tmp_path_factory.mktemp("bert")
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=24,
        num_attention_heads=3,
        intermediate_size=40,
        num_hidden_layers=2,
        vocab_size=len(WORDS) + len(SPECIAL),
        max_position_embeddings=32,
    )
    BertForMaskedLM(config).save_pretrained(folder)
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate((*SPECIAL, *WORDS))}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]", mask_token="[MASK]"
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(" ".join(WORDS) * 40)
    return str(file)


def test_a_masked_language_model_is_pruned_and_verified(bert: Path, text: str, tmp_path: Path) -> None:
    settings = mptk.Settings(method="wanda", data=text, **SETTINGS)
    report = mptk.prune(str(bert), tmp_path / "out", settings).report
    assert report.task == "masked-lm"
    assert report.families["ffn"]["width"] < 40
    assert all(row["ok"] for row in report.proof)
    assert "pseudo-perplexity, 3 windows of 24 tokens, one token in 7 masked" in report.quality["protocol"]
    assert not any(note.startswith("no ONNX") for note in report.notes)
    assert [row["stage"] for row in report.proof][-2:] == ["ONNX Runtime", "ONNX Runtime padded"]
    small = AutoModelForMaskedLM.from_pretrained(tmp_path / "out")
    assert small.config.intermediate_size == report.families["ffn"]["width"]
    assert [d.stage for d in mptk.verify(tmp_path / "out")] == [row["stage"] for row in report.proof]


@pytest.mark.parametrize("method", ["taylor", "flap"])
def test_it_is_pruned_by_gradients_of_its_loss_and_with_biases(bert: Path, text: str, method: str) -> None:
    settings = mptk.Settings(method=method, data=text, onnx=False, **SETTINGS)
    report = mptk.prune(str(bert), settings=settings).report
    assert report.families["ffn"]["width"] < 40
    assert all(row["ok"] for row in report.proof)


def test_its_quality_is_that_of_tokens_under_masks(bert: Path) -> None:
    loaded = load(str(bert))
    task = task_of(loaded)
    ids = torch.randint(3, 20, (2, 17))
    masked = ids.clone()
    masked[:, FIRST::STRIDE] = loaded.tokenizer.mask_token_id  # type: ignore[union-attr]
    with torch.no_grad():
        samples = task.made(loaded, {"input_ids": ids})
        logits = task.output(loaded.model, samples)
        expected = -loaded.model(input_ids=masked).logits.log_softmax(-1).gather(2, ids[..., None])[:, FIRST::STRIDE]
    assert math.isclose(float(task.loss(logits, samples)), float(expected.sum()), rel_tol=1e-5)
    assert task.predicted(samples) == expected.numel()


def test_it_writes_no_text_for_itself(bert: Path, tmp_path: Path) -> None:
    with pytest.raises(MptkError, match="cannot write text to calibrate on; give some with data"):
        mptk.prune(str(bert), tmp_path / "out", mptk.Settings(method="wanda", **SETTINGS))


def test_masks_are_learned_for_it_and_it_recovers(bert: Path, text: str, tmp_path: Path) -> None:
    learning = Learning(steps=6, rank=2, training=Training(batch=4, micro=2))
    settings = mptk.Settings(data=text, learning=learning, onnx=False, **SETTINGS)
    report = mptk.prune(str(bert), tmp_path / "out", settings).report
    assert {"learned masks", "trained model"} <= {row["stage"] for row in report.proof}
    assert report.trained


def test_a_tokenizer_without_a_mask_is_said(bert: Path, text: str) -> None:
    loaded = load(str(bert))
    loaded.tokenizer.mask_token = None  # type: ignore[union-attr]
    with pytest.raises(MptkError, match="has no tokenizer with a mask token"):
        task_of(loaded).evaluation(loaded, mptk.Settings(data=text, eval_length=24))
