"""dual_encoder: models that embed images and texts in one space: CLIP, SigLIP, ALIGN.

No labels are needed. What counts is how far the embeddings move from the dense model's, and which text is then the
nearest to each image. Both towers are one program, whose outputs are the embeddings; the class's own logits compare
all texts of a call with all its images, and no sample has them by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from inspect import signature
from typing import Any, get_args, get_type_hints

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from mptk.io.evaluation import Runs
from mptk.ir.samples import Samples, join_outputs
from mptk.progress import Progress
from mptk.protocols.values import SampleSets
from mptk.reading import Json
from mptk.tasks.dual_encoder_form import EMBEDS, SIMILARITIES, DualEncoderForm, NamedOutputs, open_sizes
from mptk.tasks.inputs import Inputs
from mptk.tasks.inputs.captioned import Captioned
from mptk.tasks.numbers import Numbers
from mptk.tasks.padding import IDS
from passes.frontend.trace import Flat

FEATURE_METHODS = ("get_text_features", "get_image_features")


@dataclass(frozen=True)
class DualEncoder(Numbers):
    """Fields as of ``Numbers``."""

    sequences = False

    def refusal(self, config: PreTrainedConfig, classes: set[type[PreTrainedModel]]) -> str | None:
        if classes and all(has_embeddings(each) for each in classes):
            return None
        return f"{min((c.__name__ for c in classes), default=type(config).__name__)} does not give {self.gives}"

    def choose_wrapper(self, model: nn.Module, example: Samples) -> Callable[[nn.Module, Sequence[str]], Flat]:
        return partial(NamedOutputs, outputs=EMBEDS)

    def read(self, called: Any) -> tuple[Tensor, ...]:
        return tuple(called[name] for name in EMBEDS)

    def open_sizes(self, example: Samples) -> Mapping[str, tuple[int, ...]]:
        return open_sizes(example.inputs)

    def parts(self, model: nn.Module) -> Mapping[str, Sequence[str]]:
        """The towers, by what they read; what else has parameters is the projector."""
        parts: dict[str, list[str]] = {"vision_tower": [], "text_tower": [], "projector": []}
        for name, child in model.named_children():
            reads = signature(child.forward).parameters
            part = "vision_tower" if "pixel_values" in reads else "text_tower" if IDS in reads else "projector"
            parts[part].append(name)
        return {part: names for part, names in parts.items() if names}

    def kind(self, model: nn.Module) -> Inputs:
        return Captioned()

    def quality(self, runs: Runs, sets: SampleSets, progress: Progress) -> Json:
        samples, rows = sets.evaluation, dict[str, list[Tensor]]()
        for name, _, output in runs(samples.split(1), partial(progress, "cosine")):
            rows.setdefault(name, []).append(join_outputs(output).cpu())
        embeds = {name: torch.cat(each).chunk(len(EMBEDS), 1) for name, each in rows.items()}
        dense = embeds["dense"]
        return {
            **{name: round(compute_mean_cosine(each, dense), 6) for name, each in embeds.items()},
            "metric": "cosine",
            "retrieval": {name: round(measure_retrieval(each, dense), 6) for name, each in embeds.items()},
            "protocol": (
                f"{sets.source}: mean cosine of the embeddings of {len(samples)} images and their texts with the dense "
                "model's; retrieval: share of the images whose nearest of these texts is the dense model's"
            ),
        }


def has_embeddings(model_class: type[PreTrainedModel]) -> bool:
    """Whether a class gives embeddings of texts and images, and their similarities."""
    named = get_type_hints(model_class.forward).get("return")
    fields = {name for each in (named, *get_args(named)) for name in getattr(each, "__dataclass_fields__", ())}
    return {*EMBEDS, *SIMILARITIES} <= fields and all(hasattr(model_class, name) for name in FEATURE_METHODS)


def compute_mean_cosine(embeds: Sequence[Tensor], dense: Sequence[Tensor]) -> float:
    """The mean cosine of embeddings of texts and of images, each [n, channels], with the dense model's."""
    return float(torch.cat([F.cosine_similarity(*both) for both in zip(embeds, dense, strict=True)]).mean())


def measure_retrieval(embeds: Sequence[Tensor], dense: Sequence[Tensor]) -> float:
    """The share of images whose nearest text, by the cosine, is the dense model's."""
    nearest, expected = (
        (F.normalize(images, dim=-1) @ F.normalize(texts, dim=-1).T).argmax(1) for texts, images in (embeds, dense)
    )
    return float((nearest == expected).float().mean())


DUAL_ENCODER = DualEncoder(
    "dual-encoder", "dual encoder", (), "embeddings of texts and images", DualEncoderForm(EMBEDS[0])
)
