"""classifier: models that give distributions over classes, one for each sample or for each of its positions.

No labels are needed. What counts is how far the classes move from the dense model's. One more task is one more
``Classifier``: transformers' list of its classes, and the dimension of the logits that has the classes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto as auto

from mptk.io import Loaded, Runs
from mptk.ir import Samples
from mptk.progress import Progress
from mptk.protocols import OnnxForm, SampleSets
from mptk.reading import Json
from mptk.tasks.base import AutoLists, ComparedTask, explain_unlisted, measure_figures
from mptk.tasks.inputs.text import TextWindows, describe_rows, split_rows
from mptk.tasks.model_form import LOGITS_FORM
from mptk.tasks.onnx_proof import compare_features


@dataclass(frozen=True)
class Classifier(ComparedTask):
    """ViT, ConvNeXt, Swin, VideoMAE, BertForSequenceClassification, Wav2Vec2ForSequenceClassification.

    ``lists``: transformers' lists of the models. ``gives``: what these give, in words. ``dim``: the dimension of the
    classes in the logits; ``classes``: whether it is the last one. Other dimensions after the first are positions, over
    which figures are means.
    """

    name: str = "classification"
    summary: str = "classifier"
    lists: AutoLists = (
        auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
        auto.MODEL_FOR_VIDEO_CLASSIFICATION_MAPPING_NAMES,
        auto.MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES,
        auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    )
    gives: str = "one distribution over classes for each sample"
    dim: int = -1
    classes: bool = True
    onnx: OnnxForm = LOGITS_FORM
    priority = 50

    def explain_refusal(self, config: PreTrainedConfig, classes: set[type[PreTrainedModel]]) -> str | None:
        return explain_unlisted(self.lists, config, classes, f"give {self.gives}")

    def compute_loss(self, output: Tensor, samples: Samples) -> Tensor:
        """Sum of the KL divergences from the dense model's distributions (``targets``: its logits), in nats."""
        assert samples.targets is not None
        return sum_divergence(output, samples.targets, self.dim)

    def compute_sensitivity(self, output: Tensor, samples: Samples) -> Tensor:
        """Sum of the cross entropies with the dense model's likeliest classes: the divergence has no slope there."""
        assert samples.targets is not None
        logits, reference = (flatten_positions(each, self.dim) for each in (output, samples.targets))
        likeliest = reference.argmax(-1).flatten()
        return F.cross_entropy(logits.flatten(0, 1).float(), likeliest, reduction="sum") / logits.shape[1]

    def should_measure_texts(self, loaded: Loaded) -> bool:
        return loaded.tokenizer is not None and isinstance(self.find_inputs(loaded.model), TextWindows)

    def measure_quality(self, runs: Runs, sets: SampleSets, progress: Progress) -> Json:
        samples = sets.evaluation
        figures = {
            "agreement": partial(sum_agreement, dim=self.dim),
            "divergence": partial(sum_divergence, dim=self.dim),
        }
        what = describe_rows(samples) + ("" if self.name == Classifier.name else ", of all their positions,")
        protocol = (
            f"{sets.source}: share of {what} that get the dense model's likeliest class; "
            "divergence: mean KL divergence from its distribution, in nats"
        )
        return measure_figures(runs, split_rows(samples), figures, progress, protocol)


CLASSIFICATION = Classifier()
TOKEN_CLASSES = Classifier(
    "token-classification",
    "classifier of tokens",
    (auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,),
    "a distribution over classes for each token",
)
CTC = Classifier(
    "ctc", "speech recogniser (CTC)", (auto.MODEL_FOR_CTC_MAPPING_NAMES,), "a distribution over letters for each frame"
)
SEGMENTATION = Classifier(
    "semantic-segmentation",
    "classifier of pixels",
    (auto.MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES,),
    "a distribution over classes for each pixel",
    dim=1,
    classes=False,
    # Its logits have the classes in the second dimension, and ``compare_logits`` wants them in the last.
    onnx=replace(LOGITS_FORM, judge=compare_features),
)


def flatten_positions(logits: Tensor, dim: int) -> Tensor:
    """Logits [samples, positions, classes]. ``dim``: where the classes are."""
    last = logits.movedim(dim, -1)
    return last[:, None] if last.ndim == 2 else last.flatten(1, -2)  # a class for a sample is one position


def sum_agreement(logits: Tensor, reference: Tensor, dim: int = -1) -> Tensor:
    """Sum over samples of the share of positions with the same likeliest class."""
    found, expected = (flatten_positions(each, dim).argmax(-1) for each in (logits, reference))
    return (found == expected).float().mean(1).sum()


def sum_divergence(logits: Tensor, reference: Tensor, dim: int = -1) -> Tensor:
    """Σ KL(reference ‖ logits) over samples, of the mean over positions, in nats."""
    found, expected = (flatten_positions(each, dim).float().log_softmax(-1) for each in (logits, reference))
    return F.kl_div(found, expected, log_target=True, reduction="sum") / found.shape[1]
