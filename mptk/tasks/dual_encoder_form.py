"""dual_encoder_form: a dual encoder as ONNX: one graph with optimum's names, for any numbers of texts and of images."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from mptk.config.settings import Settings
from mptk.errors import MptkError
from mptk.ir.samples import Samples, join_outputs
from mptk.ort.sessions import OrtGraph
from mptk.progress import step
from mptk.protocols.onnx_form import Dense, Use
from mptk.protocols.values import PROOF_SHAPE, Checks
from mptk.tasks.exporting import Traced, is_same_output, list_proof_stages
from mptk.tasks.inputs.captioned import Captioned
from mptk.tasks.inputs.images import SHAPES
from mptk.tasks.model_form import AXES, ModelForm
from mptk.tasks.padding import IDS, MASK, describe_padding, pad_by_metadata
from passes.frontend.trace import Flat, trace_to_program
from passes.targets.onnx.emit import Axes
from passes.targets.onnx.names import ONNX_FILE

SIMILARITIES = ("logits_per_image", "logits_per_text")
EMBEDS = ("text_embeds", "image_embeds")
"""transformers' and optimum's names of the scaled similarities, and of the embeddings."""
OUTPUTS = (*SIMILARITIES, *EMBEDS)


class NamedOutputs(Flat):
    """A model called with texts and images, which gives the ``outputs`` of these names."""

    def __init__(self, module: nn.Module, names: Sequence[str], outputs: Sequence[str]) -> None:
        super().__init__(module, names)
        self.outputs = tuple(outputs)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        found = self.module(**dict(zip(self.names, inputs, strict=True)), **self.keywords, return_dict=True)
        return tuple(found[name] for name in self.outputs)


class DualEncoderForm(ModelForm):
    """``model.onnx`` with the similarities of all texts with all images, and the embeddings."""

    def traced(self, dense: Dense, samples: Samples | None) -> tuple[Traced, dict[str, str]]:
        """The model for any numbers of texts and images, with all its outputs, and what is said of padding.

        Raises:
            MptkError: it computes other embeddings so than the dense program does.
        """
        assert dense.program is not None
        step(0, 0, "trace with all outputs")
        model, example = dense.loaded.model, Captioned().make_example(dense.loaded.model)
        apart = {name: torch.cat([x, x[:1]]) if is_text_input(name) else x for name, x in example.items()}
        program = trace_to_program(model, apart, dynamic=open_sizes(apart), wrap=partial(NamedOutputs, outputs=OUTPUTS))
        traced = Traced(dense.put_weights(program), list(apart), OUTPUTS)
        inputs = example if samples is None else samples.shorten(PROOF_SHAPE[0], sys.maxsize).inputs
        expected = join_outputs(next(dense.executor.outputs([dense.program], [list(inputs.values())])))
        if not is_same_output(run_traced(traced, dense, inputs), expected):
            raise MptkError(f"{type(model).__name__} computes other embeddings if texts are more than images")
        said = describe_padding(model)
        longer, rows = pad_by_metadata(inputs, said)
        return traced, said if is_same_output(run_traced(traced, dense, longer)[rows], expected) else {}

    def axes(self, name: str, rank: int) -> Axes:
        if is_text_input(name):
            return ("text_batch_size", "sequence_length")
        known = AXES.get(name, ())[1:]
        return ("image_batch_size", *(known if len(known) == rank - 1 else (f"{name}_{i}" for i in range(1, rank))))

    def stages(self, folder: Path, use: Use, device: torch.device, settings: Settings) -> Checks:
        graph = OrtGraph(use.graph(folder / ONNX_FILE), device)
        return list_proof_stages(partial(compute_embeddings, graph), graph, self.remove_padding)

    def outputs(self, file: Path, device: torch.device) -> Callable[[Samples], Tensor]:
        graph = OrtGraph(file, device)
        return lambda samples: join_outputs(compute_embeddings(graph, samples.inputs))


def compute_embeddings(graph: OrtGraph, inputs: Mapping[str, Tensor]) -> list[Tensor]:
    """The embeddings of texts and of images."""
    return graph.all(inputs)[len(SIMILARITIES) :]


def run_traced(traced: Traced, dense: Dense, inputs: Mapping[str, Tensor]) -> Tensor:
    """The embeddings of the traced program, in one row for each sample."""
    found = next(dense.executor.outputs([traced.program], [[inputs[name] for name in traced.names]]))
    return join_outputs(found[len(SIMILARITIES) :])


def is_text_input(name: str) -> bool:
    """Whether an input has a row for each text, and not for each image."""
    return name in (IDS, MASK)


def open_sizes(inputs: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """The numbers of texts, of images, of tokens, and of patches if the class reads them. Images have one size."""
    patches = SHAPES in inputs
    return {name: (0, 1) if is_text_input(name) or (patches and name != SHAPES) else (0,) for name in inputs}
