"""Each kind of model goes through the commands of a user: analyze, prune, verify, export, eval and bench."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.tiny_models import tiny_model
from mptk import testing

KINDS = {
    "causal-lm": "a toy LLaMA",
    "masked-lm": "bert",
    "seq2seq": "bart",
    "image-classification": "vit",
    "ctc": "wav2vec2",
    "semantic-segmentation": "segformer",
    "object-detection": "yolos",
    "depth-estimation": "depth_anything",
    "video-classification": "timesformer",
    "time-series-prediction": "patchtst",
    "zero-shot-image-classification": "clip",
    "image-text-to-text": "llava",
}
"""Mapping of transformers → the type that is tried."""
SIZES = ("--samples", "4", "--eval-windows", "2", "--eval-length", "12", "--align", "1")


TEXT = "the quick brown fox jumps over a lazy dog. " * 200


def write(mapping: str, folder: Path) -> Path | str:
    """Write a dense model; returns data for it."""
    if mapping != "causal-lm":
        tiny_model(mapping, KINDS[mapping]).model.save_pretrained(folder / "dense")
        return "random"
    testing.make_llama().save_pretrained(folder / "dense")
    testing.make_tokenizer().save_pretrained(folder / "dense")
    (folder / "text.txt").write_text(TEXT)
    return folder / "text.txt"


@pytest.mark.parametrize("mapping", KINDS)
def test_six_commands(mapping: str, tmp_path: Path, typed: Callable[..., int]) -> None:
    dense, out, graphs = tmp_path / "dense", tmp_path / "out", tmp_path / "graphs"
    read = ("--data", write(mapping, tmp_path), "--length", "12")
    lengths = ("--lengths", "512" if mapping == "ctc" else "12")
    for words in (
        ("analyze", dense),
        ("prune", dense, "--method", "wanda", "--sparsity", "0.2", *read, *SIZES, "--out", out),
        ("verify", out),
        ("export", dense, "--out", graphs),
        ("eval", out, *read, "--windows", "2"),
        ("bench", graphs, out, "--rounds", "2", *lengths),
    ):
        assert typed(*words) == 0, words
