"""classifier: models that give one distribution over classes for each sample: images, sounds or texts.

No labels are needed. What counts is how far the classes move from the dense model's.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

from mptk.io.evaluation import Runs
from mptk.io.models import Loaded
from mptk.ir.samples import Samples
from mptk.progress import Count, Progress
from mptk.run.chain import Task
from mptk.run.settings import Settings
from mptk.run.values import SampleSets
from mptk.tasks.classes import known_to
from mptk.tasks.inputs import inputs_of
from mptk.tasks.model_form import LOGITS, ModelForm

MAPPINGS = (
    modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    modeling_auto.MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES,
    modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
)


class Classifier(Task):
    """ViT, ConvNeXt, ResNet, Swin, BertForSequenceClassification, Wav2Vec2ForSequenceClassification."""

    name = "classification"
    summary = "classifier"
    onnx = ModelForm(LOGITS)
    compares = True

    def refusal(self, config: PreTrainedConfig, classes: set[type[PreTrainedModel]]) -> str | None:
        return known_to(MAPPINGS, config, classes, "give one distribution over classes for each sample")

    def example(self, model: nn.Module) -> Samples:
        return Samples(inputs_of(model).example(model))

    def samples(self, loaded: Loaded, settings: Settings, count: int, progress: Count) -> Samples:
        return Samples(inputs_of(loaded.model).calibration(loaded, settings, count, progress))

    def evaluation(self, loaded: Loaded, settings: Settings) -> Samples:
        return Samples(inputs_of(loaded.model).evaluation(loaded, settings))

    def loss(self, output: Tensor, samples: Samples) -> Tensor:
        """Sum of the KL divergences from the dense model's distribution (``targets``: its logits), in nats."""
        assert samples.targets is not None
        return divergence(output, samples.targets)

    def sensitivity(self, output: Tensor, samples: Samples) -> Tensor:
        """Sum of the cross entropies with the dense model's likeliest classes: the divergence has no slope there."""
        assert samples.targets is not None
        return F.cross_entropy(output.float(), samples.targets.argmax(-1), reduction="sum")

    def predicted(self, samples: Samples) -> int:
        return len(samples)

    @torch.no_grad()
    def quality(self, runs: Runs, sets: SampleSets, progress: Progress) -> dict[str, Any]:
        agreed: dict[str, int] = {}
        apart: dict[str, float] = {}
        reference = torch.empty(0)
        for name, _, output in runs(sets.evaluation.split(1), partial(progress, "agreement")):
            reference = output if name == "dense" else reference
            same = output.argmax(-1).cpu() == reference.argmax(-1).cpu()
            agreed[name] = agreed.get(name, 0) + int(same.sum())
            apart[name] = apart.get(name, 0.0) + float(divergence(output.cpu(), reference.cpu()))
        count = len(sets.evaluation)
        return {
            **{name: round(total / count, 4) for name, total in agreed.items()},
            "metric": "agreement",
            "divergence": {name: round(total / count, 6) for name, total in apart.items()},
            "protocol": (
                f"{sets.source}: share of {count} samples that get the dense model's likeliest class; divergence: mean "
                "KL divergence from its distribution, in nats"
            ),
        }


def divergence(logits: Tensor, reference: Tensor) -> Tensor:
    """Σ KL(reference ‖ logits) over samples, in nats."""
    expected, found = reference.float().log_softmax(-1), logits.float().log_softmax(-1)
    return F.kl_div(found, expected, log_target=True, reduction="sum")
