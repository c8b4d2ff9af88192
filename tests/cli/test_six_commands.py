"""Each kind of model goes through the commands of a user: analyze, prune, verify, export, eval and bench."""

from __future__ import annotations

import pytest

from benchmarks.tiny_models import tiny_model

KINDS = {"object-detection": "yolos", "time-series-prediction": "patchtst"}
"""Mapping of transformers → the type that is tried: of kinds that no feature's tests take through the commands."""
SIZES = ("--samples", "4", "--eval-windows", "2", "--eval-length", "12", "--align", "1")


@pytest.mark.usefixtures("quick_bench")
@pytest.mark.parametrize("mapping", KINDS)
def test_six_commands(mapping, tmp_path, run_words):
    dense, out, graphs = tmp_path / "dense", tmp_path / "out", tmp_path / "graphs"
    tiny_model(mapping, KINDS[mapping]).model.save_pretrained(dense)
    read = ("--data", "random", "--length", "12")
    for words in (
        ("analyze", dense),
        ("prune", dense, "--method", "wanda", "--sparsity", "0.2", *read, *SIZES, "--no-onnx", "--out", out),
        ("verify", out),
        ("export", out, "--out", graphs),
        ("eval", out, *read, "--windows", "2"),
        ("bench", graphs, "--rounds", "2", "--lengths", "12"),
    ):
        assert run_words(*words) == 0, words
