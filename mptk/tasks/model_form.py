"""model_form: a model without a decoder as ONNX: one graph, whose inputs the processor makes.

A text model is traced again, with the mask of its padding as an input, and cut to the same plan.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from mptk.ir import Samples
from mptk.ort.sessions import OrtGraph
from mptk.protocols import PROOF_SHAPE, Dense, OnnxForm, Traced
from mptk.tasks.inputs import choose_inputs
from mptk.tasks.inputs.base import PIXELS
from mptk.tasks.onnx_export import trace_named
from mptk.tasks.onnx_proof import compare_features, compare_logits, draw_batches, draw_scaled_batches, list_whole_cases
from mptk.tasks.padding import IDS, Unpadded, has_token_ids, remove_padding
from passes.frontend.trace import Flat
from passes.targets.onnx.emit import TOKEN_AXES
from passes.targets.onnx.names import Axes

LOGITS, FEATURES = "logits", "last_hidden_state"
AXES: dict[str, Axes] = {
    PIXELS: ("batch_size", "num_channels", "height", "width"),
    "input_features": ("batch_size", "feature_size", "sequence_length"),
    "past_values": ("batch_size", "sequence_length", "num_channels"),
}
"""Optimum's names of the axes; other inputs have the axes of tokens."""


def trace_model(dense: Dense, samples: Samples | None, unpad: Unpadded = remove_padding) -> Traced:
    """The model with the inputs that its graph has."""
    example = choose_inputs(dense.loaded.model).make_example(dense.loaded.model)
    # Without text there is no padding: the analysed program itself is the graph.
    if not has_token_ids(example):
        assert dense.program is not None
        traced = Traced(dense.program, list(example))
        traced.check_sizes()
        return traced
    # The trace is checked on another size than the example's: by default on each text twice in a row.
    longer = {name: torch.cat([x, x], 1) if name == IDS else x for name, x in example.items()}
    samples = Samples(longer) if samples is None else samples.shorten(*PROOF_SHAPE)
    return trace_named(dense, Flat, example, samples, unpad)


MODEL_FORM = OnnxForm(
    trace_model,
    OrtGraph,
    list_whole_cases(),
    compare_features,
    axes=AXES,
    other_axes=TOKEN_AXES,
    draw=draw_batches,
)
"""``model.onnx``. Each kind names its outputs."""
LOGITS_FORM = replace(MODEL_FORM, outputs=(LOGITS,), judge=compare_logits, draw=draw_scaled_batches)
