"""encoder: bare models that give features, not classes: encoders of sentences, images and speech, decoders' trunks.

What counts is how far the features move from the dense model's.
"""

from __future__ import annotations

from dataclasses import replace

import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

from mptk.io import Loaded, Runs
from mptk.progress import Progress
from mptk.protocols import SampleSets
from mptk.reading import Json
from mptk.tasks.base import ComparedTask, explain_unlisted, measure_figures, sum_output_distances
from mptk.tasks.inputs.text import TextWindows, describe_rows, split_rows
from mptk.tasks.model_form import FEATURES, MODEL_FORM
from mptk.tasks.onnx_proof import draw_scaled_batches


class Encoder(ComparedTask):
    """BertModel, ViTModel, Wav2Vec2Model: features of the last layer, [samples, positions, channels]."""

    name = "encoder"
    summary = "bare encoder"
    priority = 20  # it also takes the encoders of others
    onnx = replace(MODEL_FORM, outputs=(FEATURES,), draw=draw_scaled_batches)
    classes = False

    def explain_refusal(self, config: PreTrainedConfig, classes: set[type[PreTrainedModel]]) -> str | None:
        if getattr(config, "is_encoder_decoder", False):
            return f"{type(config).__name__} has an encoder and a decoder; give the model with its output layer"
        return explain_unlisted((MODEL_MAPPING_NAMES,), config, classes, "give features")

    def should_measure_texts(self, loaded: Loaded) -> bool:
        return loaded.tokenizer is not None and isinstance(self.find_inputs(loaded.model), TextWindows)

    def measure_quality(self, runs: Runs, sets: SampleSets, progress: Progress) -> Json:
        samples, figures = sets.evaluation, {"cosine": _sum_cosines, "distance": sum_output_distances}
        protocol = (
            f"{sets.source}: mean over {describe_rows(samples)} of the cosine of the features' mean over positions "
            "with the dense model's; distance: of all features, relative to their norm"
        )
        return measure_figures(runs, split_rows(samples), figures, progress, protocol)


def _sum_cosines(features: Tensor, reference: Tensor) -> Tensor:
    pooled, other = (mean_of_positions(f.float()) for f in (features, reference))
    return F.cosine_similarity(pooled, other, dim=-1).sum()


def mean_of_positions(features: Tensor) -> Tensor:
    """[samples, channels] of features [samples, positions, channels] or [samples, channels, height, width]."""
    if features.ndim == 4:
        return features.mean((2, 3))
    return features.mean(1) if features.ndim == 3 else features
