"""dual_encoder: models that embed images and texts in one space: CLIP, SigLIP, ALIGN.

No labels are needed. What counts is how far the embeddings move from the dense model's, and which text is then the
nearest to each image. Both towers are one program, whose outputs are the embeddings; the class's own logits compare
all texts of a call with all its images, and no sample has them by itself.

As ONNX it is one graph with optimum's names, for any numbers of texts and of images.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from inspect import signature
from typing import Any, get_args, get_type_hints

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from mptk.errors import TargetError
from mptk.features.dual_encoder.captioned import Captioned
from mptk.io import Runs
from mptk.ir import Samples, join_outputs
from mptk.ort.sessions import OrtGraph
from mptk.progress import Progress, step
from mptk.protocols import PROOF_SHAPE, Dense, SampleSets, Traced
from mptk.reading import Json
from mptk.tasks.inputs import Inputs
from mptk.tasks.inputs.base import PIXELS
from mptk.tasks.inputs.images import SHAPES
from mptk.tasks.model_form import MODEL_FORM
from mptk.tasks.numbers import Numbers
from mptk.tasks.onnx_export import is_same_output
from mptk.tasks.onnx_proof import list_whole_cases
from mptk.tasks.padding import IDS, MASK, describe_padding, pad_by_metadata
from passes.frontend.trace import Flat, trace_to_program

SIMILARITIES = ("logits_per_image", "logits_per_text")
EMBEDS = ("text_embeds", "image_embeds")
"""transformers' and optimum's names of the scaled similarities, and of the embeddings."""
OUTPUTS = (*SIMILARITIES, *EMBEDS)
FEATURE_METHODS = ("get_text_features", "get_image_features")
"""Methods of a class that embed only texts, and only images."""


@dataclass(frozen=True)
class DualEncoder(Numbers):
    """Fields as in ``Numbers``."""

    priority = 30  # before the bare encoder, which also takes one
    sequences = False

    def explain_refusal(self, config: PreTrainedConfig, classes: set[type[PreTrainedModel]]) -> str | None:
        if classes and all(has_embeddings(each) for each in classes):
            return None
        return f"{min((c.__name__ for c in classes), default=type(config).__name__)} does not give {self.gives}"

    def choose_wrapper(self, model: nn.Module, example: Samples) -> Callable[[nn.Module, Sequence[str]], Flat]:
        return partial(NamedOutputs, outputs=EMBEDS)

    def read(self, called: Any) -> tuple[Tensor, ...]:
        return tuple(called[name] for name in EMBEDS)

    def open_sizes(self, example: Samples) -> Mapping[str, tuple[int, ...]]:
        return open_sizes(example.inputs)

    def name_parts(self, model: nn.Module) -> Mapping[str, Sequence[str]]:
        """The towers, by what they read; what else has parameters is the projector."""
        parts: dict[str, list[str]] = {"vision_tower": [], "text_tower": [], "projector": []}
        for name, child in model.named_children():
            reads = signature(child.forward).parameters
            part = "vision_tower" if "pixel_values" in reads else "text_tower" if IDS in reads else "projector"
            parts[part].append(name)
        return {part: names for part, names in parts.items() if names}

    def find_inputs(self, model: nn.Module) -> Inputs:
        return Captioned()

    def measure_quality(self, runs: Runs, sets: SampleSets, progress: Progress) -> Json:
        # One pair at a time; all embeddings are kept, since retrieval compares each image with all texts.
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


class NamedOutputs(Flat):
    """A model called with texts and images, which gives the ``outputs`` of these names."""

    def __init__(self, module: nn.Module, names: Sequence[str], outputs: Sequence[str]) -> None:
        super().__init__(module, names)
        self.outputs = tuple(outputs)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        found = self.module(**dict(zip(self.names, inputs, strict=True)), **self.keywords, return_dict=True)
        return tuple(found[name] for name in self.outputs)


def trace_pairs(dense: Dense, samples: Samples | None) -> Traced:
    """The model for any numbers of texts and images, with all its outputs."""
    assert dense.program is not None
    step(0, 0, "trace with all outputs")
    model, example = dense.loaded.model, Captioned().make_example(dense.loaded.model)
    # One text more than images: a trace of equal numbers would take them for one size.
    apart = {name: torch.cat([x, x[:1]]) if is_text_input(name) else x for name, x in example.items()}
    program = trace_to_program(model, apart, dynamic=open_sizes(apart), wrap=partial(NamedOutputs, outputs=OUTPUTS))
    traced = Traced(dense.put_weights(program), list(apart))
    # Whole texts: some classes embed a text at its end token.
    inputs = example if samples is None else samples.shorten(PROOF_SHAPE[0], sys.maxsize).inputs
    expected = join_outputs(next(dense.executor.run_programs([dense.program], [list(inputs.values())])))
    if not is_same_output(run_traced(traced, dense, inputs), expected):
        raise TargetError(
            f"{type(model).__name__} computes other embeddings if texts are more than images", name=type(model).__name__
        )
    said = describe_padding(model)
    longer, rows = pad_by_metadata(inputs, said)
    same = is_same_output(run_traced(traced, dense, longer)[rows], expected)
    return replace(traced, padding=said if same else {})


def compute_embeddings(graph: OrtGraph, inputs: Mapping[str, Tensor]) -> list[Tensor]:
    """The embeddings of texts and of images."""
    return graph.run_all(inputs)[len(SIMILARITIES) :]


def run_traced(traced: Traced, dense: Dense, inputs: Mapping[str, Tensor]) -> Tensor:
    """The embeddings of the traced program, in one row for each sample."""
    return join_outputs(traced.run_all(dense.executor, inputs)[len(SIMILARITIES) :])


def is_text_input(name: str) -> bool:
    """Whether an input has a row for each text, and not for each image."""
    return name in (IDS, MASK)


def open_sizes(inputs: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """The numbers of texts, of images, of tokens, and of patches if the class reads them. Images have one size."""
    patches = SHAPES in inputs
    return {name: (0, 1) if is_text_input(name) or (patches and name != SHAPES) else (0,) for name in inputs}


CAPTION_AXES = ("text_batch_size", "sequence_length")
DUAL_ENCODER_FORM = replace(
    MODEL_FORM,
    trace=trace_pairs,
    cases=list_whole_cases(compute_embeddings),
    outputs=OUTPUTS,
    axes={IDS: CAPTION_AXES, MASK: CAPTION_AXES, PIXELS: ("image_batch_size", "num_channels", "height", "width")},
    other_axes=("image_batch_size",),
)
DUAL_ENCODER = DualEncoder("dual-encoder", "dual encoder", (), "embeddings of texts and images", DUAL_ENCODER_FORM)
