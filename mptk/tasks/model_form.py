"""model_form: a model without a decoder as ONNX: one graph, whose inputs the processor makes.

A text model is traced again, with the mask of its padding as an input, and cut to the same plan.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mptk.config.settings import Settings
from mptk.ir.passes import Log
from mptk.ir.plan import Plan
from mptk.ir.samples import Samples, joined
from mptk.ort.sessions import OrtGraph
from mptk.progress import step
from mptk.protocols.onnx_form import Dense, OnnxForm, Use
from mptk.protocols.values import PROOF_SHAPE, Checks
from mptk.tasks import sizes
from mptk.tasks.exporting import (
    CHANGED,
    HALF,
    Traced,
    about,
    cut,
    features_apart,
    is_half,
    logits_apart,
    quantised,
    stages_of,
    traced_as,
)
from mptk.tasks.inputs import inputs_of
from mptk.tasks.inputs.image_forms import PIXELS
from mptk.tasks.padding import IDS, is_text, with_mask
from passes.frontend.trace import Flat
from passes.pipelines import emit_onnx
from passes.targets.onnx.emit import TOKEN_AXES, Axes, Interface
from passes.targets.onnx.names import ONNX_FILE
from passes.verify import Difference

LOGITS, FEATURES = "logits", "last_hidden_state"
AXES = {
    "pixel_values": ("batch_size", "num_channels", "height", "width"),
    "input_features": ("batch_size", "feature_size", "sequence_length"),
    "past_values": ("batch_size", "sequence_length", "num_channels"),
}
"""Optimum's names of the axes; other inputs have the axes of tokens."""


@dataclass(frozen=True)
class ModelForm(OnnxForm):
    """``model.onnx`` with one output, ``logits``, ``last_hidden_state`` or another. ``more``: further ones."""

    output: str
    more: tuple[str, ...] = ()

    def export(self, dense: Dense, plan: Plan | None, samples: Samples | None, folder: Path, log: Log) -> list[str]:
        settings = dense.settings
        traced, padding = self.traced(dense, samples)
        program = cut(traced.program, dense, plan, log)
        axes = {name: self.axes(name, rank) for name, rank in traced.ranks.items()}
        step(0, 0, "translate the graph")
        file = emit_onnx(
            program,
            folder,
            Interface(axes, traced.outputs or (self.output, *self.more)),
            objective="prefill",
            half=settings.onnx_dtype == HALF,
            metadata=about(dense, plan) | padding,
            log=log,
        )
        notes = quantised(dense, [file], None, log)
        return notes + ([CHANGED] if IDS in traced.names and not padding else [])

    def traced(self, dense: Dense, samples: Samples | None) -> tuple[Traced, dict[str, str]]:
        """The model with the inputs that its graph has, and what the graph's metadata says of padding."""
        example = inputs_of(dense.loaded.model).example(dense.loaded.model)
        if not is_text(example):
            assert dense.program is not None
            traced = Traced(dense.program, list(example))
            traced.check_sizes()
            return traced, {}
        samples = Samples(longer(example)) if samples is None else samples.shortened(*PROOF_SHAPE)
        return traced_as(dense, Flat, example, samples, self.unpadded)

    def axes(self, name: str, rank: int) -> Axes:
        """The names of an input's axes."""
        known = AXES.get(name, TOKEN_AXES)
        return known if len(known) == rank else ("batch_size", *(f"{name}_{i}" for i in range(1, rank)))

    def stages(self, folder: Path, use: Use, device: torch.device, settings: Settings) -> Checks:
        graph = OrtGraph(use.graph(folder / ONNX_FILE), device)
        return stages_of(graph.all if graph.several else graph, graph, self.unpadded)

    def batches(self, samples: Samples, seed: str, longer: bool) -> list[Samples]:
        if is_text(samples.inputs):
            return list(sizes.texts(samples, seed)) if longer else []
        found = list(sizes.rows(samples, seed))
        # A finder of objects takes the best of many boxes: images without objects have none that is clearly best.
        images = PIXELS in samples.inputs and self.output in (LOGITS, FEATURES) and not self.more
        return list(map(sizes.values, found)) if images else found

    def outputs(self, file: Path, device: torch.device) -> Callable[[Samples], Tensor]:
        graph = OrtGraph(file, device)
        if graph.several:
            return lambda samples: joined(graph.all(with_mask(samples.inputs)))
        return lambda samples: graph(with_mask(samples.inputs))

    def rounding(self, scheme: str, pairs: Sequence[tuple[Tensor, Tensor]]) -> Difference:
        return (logits_apart if self.output == LOGITS else features_apart)(scheme, pairs)

    def unpadded(self, output: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
        """An output [samples, positions, channels] at the positions of ``inputs``; one of whole samples stays."""
        return output[:, : inputs[IDS].shape[1]] if output.ndim > 2 else output

    def half(self, folder: Path) -> bool:
        return is_half(OrtGraph(folder / ONNX_FILE))


def longer(example: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Example inputs of another size: token ids twice in a row."""
    return {name: torch.cat([x, x], 1) if name == IDS else x for name, x in example.items()}
