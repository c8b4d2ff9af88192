"""classifier: models that give one distribution over classes for each sample: images, sounds or texts.

No labels are needed. What counts is how far the classes move from the dense model's.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

from mptk.io.evaluation import Runs
from mptk.ir.samples import Samples
from mptk.progress import Progress
from mptk.protocols.values import SampleSets
from mptk.tasks.base import ComparedTask, compared, known_to
from mptk.tasks.model_form import LOGITS, ModelForm

CLASSIFIERS = (
    modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    modeling_auto.MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES,
    modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
)


class Classifier(ComparedTask):
    """ViT, ConvNeXt, ResNet, Swin, BertForSequenceClassification, Wav2Vec2ForSequenceClassification."""

    name = "classification"
    summary = "classifier"
    onnx = ModelForm(LOGITS)

    def refusal(self, config: PreTrainedConfig, classes: set[type[PreTrainedModel]]) -> str | None:
        return known_to(CLASSIFIERS, config, classes, "give one distribution over classes for each sample")

    def loss(self, output: Tensor, samples: Samples) -> Tensor:
        """Sum of the KL divergences from the dense model's distribution (``targets``: its logits), in nats."""
        assert samples.targets is not None
        return divergence(output, samples.targets)

    def sensitivity(self, output: Tensor, samples: Samples) -> Tensor:
        """Sum of the cross entropies with the dense model's likeliest classes: the divergence has no slope there."""
        assert samples.targets is not None
        return F.cross_entropy(output.float(), samples.targets.argmax(-1), reduction="sum")

    def quality(self, runs: Runs, sets: SampleSets, progress: Progress) -> dict[str, Any]:
        samples, figures = sets.evaluation, {"agreement": _agreed, "divergence": divergence}
        protocol = (
            f"{sets.source}: share of {len(samples)} samples that get the dense model's likeliest class; "
            "divergence: mean KL divergence from its distribution, in nats"
        )
        return compared(runs, samples.split(1), figures, progress, protocol)


def _agreed(logits: Tensor, reference: Tensor) -> Tensor:
    return (logits.argmax(-1) == reference.argmax(-1)).sum()


def divergence(logits: Tensor, reference: Tensor) -> Tensor:
    """Σ KL(reference ‖ logits) over samples, in nats."""
    expected, found = reference.float().log_softmax(-1), logits.float().log_softmax(-1)
    return F.kl_div(found, expected, log_target=True, reduction="sum")
