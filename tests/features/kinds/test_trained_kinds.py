"""Training models of every kind: the student is called, and its outputs are read, as its task does it.

It reaches for mptk.methods: a class has no layer that learns.
"""

from __future__ import annotations

import pytest
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
    config = tiny_model("zero-shot-image-classification", "clip").model.config
    config.text_config.num_hidden_layers = config.vision_config.num_hidden_layers = 1
    return CLIPModel(config)


ASKED = {"sparsity": 0.2, "tolerance": 0.15, "align": 1, "samples": 4, "length": 12, "eval_windows": 2}
ASKED |= {"eval_length": 12, "batch": 2, "micro": 2, "onnx": False, "data": "random", "progress": None}
RECOVERY = {"method": "magnitude", "steps": 2, "teacher": "cached"}
MASKS = {"method": "maskprune", "steps": 4}
BLOCKS = {"families": ("vision_tower_layers",), "widths": {"vision_tower_layers": 2}}
CASES = {
    "images packed into one sequence": (lambda: tiny_model("image-text-to-text", "qwen2_vl").model, RECOVERY),
    "logits and boxes": (lambda: tiny_model("object-detection", "yolos").model, MASKS),
    # Its trace takes no single sample.
    "embeddings of texts and images": (make_clip, {**MASKS, "target": "graph"}),
    "starts and ends": (
        lambda: BertForQuestionAnswering(BertConfig(**{**ENCODER, "num_hidden_layers": 1})),
        {**RECOVERY, "target": "graph"},
    ),
    "images and latents": (lambda: AutoencoderKL(**VAE), {**RECOVERY, "target": "graph"}),
    # A projector reads the vision tower's hidden states, which hooks of transformers collect.
    "masks of blocks": (lambda: tiny_model("image-text-to-text", "aya_vision").model, {**MASKS, **BLOCKS}),
    # Its class computes the positions, and does not save them.
    "frozen positions": (lambda: tiny_model("seq2seq", "marian").model, RECOVERY),
    # Decorators of its class ask for hidden states; accelerate takes these off ``forward`` when it takes its own off.
    "half precision": (
        lambda: tiny_model("semantic-segmentation", "dpt").model,
        {"method": "magnitude", "steps": 2, "compute_dtype": "bfloat16"},
    ),
    # One norm reads all heads: queries of 0 attend to all tokens alike, so the heads' outputs are masked, too.
    "masks of heads": (
        lambda: tiny_model("causal-lm", "olmo2").model,
        {**MASKS, "families": ("q_heads",), "widths": {"q_heads": 2}},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_student_is_called_as_its_task_calls_the_class(name, tmp_path):
    make, asked = CASES[name]
    make().save_pretrained(tmp_path)
    stages = {row["stage"] for row in mptk.prune(str(tmp_path), **ASKED, **asked).report.proof}
    assert "trained model" in stages
    assert ("learned masks" in stages) == (asked["method"] == "maskprune")


def test_a_model_without_linear_layers_learns_no_masks():
    model = tiny_model("semantic-segmentation", "mobilenet_v2").model
    with expect_error(ModelError, name="MobileNetV2ForSemanticSegmentation"):
        adapt(model, rank=2, seed=0)
