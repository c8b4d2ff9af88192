"""Training models of every kind: the student is called, and its outputs are read, as its task does it.

It reaches for mptk.methods: a class has no layer that learns.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from pictures import VAE
from transformers import BertConfig, BertForQuestionAnswering, CLIPModel

import mptk
from benchmarks.tiny_models import tiny_model
from mptk.errors import ModelError
from mptk.methods.maskprune.learner import adapt
from mptk.testing import expect_error
from mptk.testing.kinds import ENCODER


def make_clip() -> CLIPModel:
    """Two towers of one block each."""
    config: Any = tiny_model("zero-shot-image-classification", "clip").model.config
    config.text_config.num_hidden_layers = config.vision_config.num_hidden_layers = 1
    return CLIPModel(config)


MODELS = {
    "images packed into one sequence": lambda: tiny_model("image-text-to-text", "qwen2_vl").model,
    "logits and boxes": lambda: tiny_model("object-detection", "yolos").model,
    "embeddings of texts and images": make_clip,
    "starts and ends": lambda: BertForQuestionAnswering(BertConfig(**{**ENCODER, "num_hidden_layers": 1})),
    "images and latents": lambda: AutoencoderKL(**VAE),
}
ASKED = {"sparsity": 0.2, "tolerance": 0.15, "align": 1, "samples": 4, "length": 12, "eval_windows": 2}
ASKED |= {"eval_length": 12, "batch": 2, "micro": 2, "onnx": False, "data": "random", "progress": None}
RECOVERY = {"method": "magnitude", "steps": 2, "teacher": "cached"}
MASKS = {"method": "maskprune", "steps": 4}


@pytest.mark.parametrize(
    ("name", "target", "asked"),
    [
        ("images packed into one sequence", "stock", RECOVERY),
        ("logits and boxes", "stock", MASKS),
        ("embeddings of texts and images", "graph", MASKS),  # its trace takes no single sample
        ("starts and ends", "graph", RECOVERY),
        ("images and latents", "graph", RECOVERY),
    ],
)
def test_a_student_is_called_as_its_task_calls_the_class(name, target, asked, tmp_path):
    torch.manual_seed(0)
    MODELS[name]().save_pretrained(tmp_path)
    found = mptk.prune(str(tmp_path), target=target, **ASKED, **asked)
    assert "trained model" in [row["stage"] for row in found.report.proof]
    assert all(row["ok"] for row in found.report.proof)


def test_masks_of_blocks_are_in_the_hidden_states_that_a_model_collects(tmp_path):
    """A projector reads the vision tower's hidden states, which hooks of transformers collect."""
    torch.manual_seed(0)
    tiny_model("image-text-to-text", "aya_vision").model.save_pretrained(tmp_path)
    asked = {
        "method": "maskprune",
        "steps": 4,
        "families": ("vision_tower_layers",),
        "widths": {"vision_tower_layers": 2},
    }
    found = mptk.prune(str(tmp_path), **ASKED, **asked)
    assert "learned masks" in [row["stage"] for row in found.report.proof]
    assert all(row["ok"] for row in found.report.proof)


def test_a_class_whose_decorators_ask_for_hidden_states_is_trained_in_half_precision(tmp_path):
    """accelerate takes these off ``forward`` when it takes its own off."""
    torch.manual_seed(0)
    tiny_model("semantic-segmentation", "dpt").model.save_pretrained(tmp_path)
    found = mptk.prune(str(tmp_path), method="magnitude", steps=2, compute_dtype="bfloat16", **ASKED)
    assert all(row["ok"] for row in found.report.proof)


def test_a_model_without_linear_layers_learns_no_masks():
    model = tiny_model("semantic-segmentation", "mobilenet_v2").model
    with expect_error(ModelError, name="MobileNetV2ForSemanticSegmentation"):
        adapt(model, rank=2, seed=0)


def test_masks_of_heads_that_one_norm_reads_are_those_of_the_cut(tmp_path):
    """Queries of 0 attend to all tokens alike, so the heads' outputs are masked, too."""
    torch.manual_seed(0)
    tiny_model("causal-lm", "olmo2").model.save_pretrained(tmp_path)
    asked = {"method": "maskprune", "steps": 4, "families": ("q_heads",), "widths": {"q_heads": 2}}
    found = mptk.prune(str(tmp_path), **ASKED, **asked)
    assert all(row["ok"] for row in found.report.proof)
