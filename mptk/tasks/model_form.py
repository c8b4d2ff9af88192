"""model_form: a model without a decoder as ONNX: one graph, whose inputs the processor makes.

A text model is traced again, with the mask of its padding as an input, and cut to the same plan.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mptk.config import Settings
from mptk.ir import Log, Plan, Samples, join_outputs
from mptk.ort.sessions import OrtGraph
from mptk.progress import step
from mptk.protocols import PROOF_SHAPE, Checks, Dense, OnnxForm, Use
from mptk.tasks.exporting import (
    CHANGED,
    HALF,
    Traced,
    compare_features,
    compare_logits,
    cut_to_plan,
    draw_row_counts,
    draw_texts,
    is_half,
    list_proof_stages,
    make_graph_metadata,
    scale_pixels,
    trace_named,
    write_quantized_graphs,
)
from mptk.tasks.inputs import choose_inputs
from mptk.tasks.inputs.image_forms import PIXELS
from mptk.tasks.padding import IDS, has_token_ids, with_mask
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
        # A second trace of the model has the same families, so the plan fits it, too.
        traced, padding = self.trace_model(dense, samples)
        program = cut_to_plan(traced.program, dense, plan, log)
        axes = {name: self.name_axes(name, rank) for name, rank in traced.ranks.items()}
        step(0, 0, "translate the graph")
        file = emit_onnx(
            program,
            folder,
            Interface(axes, traced.outputs or (self.output, *self.more)),
            objective="prefill",
            half=settings.onnx_dtype == HALF,
            metadata=make_graph_metadata(dense, plan) | padding,
            log=log,
        )
        notes = write_quantized_graphs(dense, [file], None, log)
        return notes + ([CHANGED] if IDS in traced.names and not padding else [])

    def trace_model(self, dense: Dense, samples: Samples | None) -> tuple[Traced, dict[str, str]]:
        """The model with the inputs that its graph has, and what the graph's metadata says of padding."""
        example = choose_inputs(dense.loaded.model).make_example(dense.loaded.model)
        # Without text there is no padding: the analysed program itself is the graph.
        if not has_token_ids(example):
            assert dense.program is not None
            traced = Traced(dense.program, list(example))
            traced.check_sizes()
            return traced, {}
        # The trace is checked on another size than the example's: by default on each text twice in a row.
        longer = {name: torch.cat([x, x], 1) if name == IDS else x for name, x in example.items()}
        samples = Samples(longer) if samples is None else samples.shorten(*PROOF_SHAPE)
        return trace_named(dense, Flat, example, samples, self.remove_padding)

    def name_axes(self, name: str, rank: int) -> Axes:
        """The names of an input's axes."""
        known = AXES.get(name, TOKEN_AXES)
        return known if len(known) == rank else ("batch_size", *(f"{name}_{i}" for i in range(1, rank)))

    def list_stages(self, folder: Path, use: Use, device: torch.device, settings: Settings) -> Checks:
        graph = OrtGraph(use.find_graph(folder / ONNX_FILE), device)
        return list_proof_stages(graph.run_all if graph.several else graph, graph, self.remove_padding)

    def make_batches(self, samples: Samples, seed: str, longer: bool) -> list[Samples]:
        if has_token_ids(samples.inputs):
            return list(draw_texts(samples, seed)) if longer else []
        found = list(draw_row_counts(samples, seed))
        # A finder of objects takes the best of many boxes: images without objects have none that is clearly best.
        images = PIXELS in samples.inputs and self.output in (LOGITS, FEATURES) and not self.more
        return list(map(scale_pixels, found)) if images else found

    def make_runner(self, file: Path, device: torch.device) -> Callable[[Samples], Tensor]:
        graph = OrtGraph(file, device)
        if graph.several:
            return lambda samples: join_outputs(graph.run_all(with_mask(samples.inputs)))
        return lambda samples: graph(with_mask(samples.inputs))

    def measure_rounding(self, scheme: str, pairs: Sequence[tuple[Tensor, Tensor]]) -> Difference:
        return (compare_logits if self.output == LOGITS else compare_features)(scheme, pairs)

    def remove_padding(self, output: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
        """An output [samples, positions, channels] at the positions of ``inputs``; one of whole samples stays."""
        return output[:, : inputs[IDS].shape[1]] if output.ndim > 2 else output

    def is_half(self, folder: Path) -> bool:
        return is_half(OrtGraph(folder / ONNX_FILE))
