"""emit: a traced decoder → ``model.onnx`` in standard operators, with the KV cache as inputs and outputs.

The graph is the program's own; the model's class is not exported again. Names and axes are those of the ONNX ecosystem
(optimum, onnxruntime-genai), see :func:`input_names` and :func:`output_names`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import onnx
import onnx_ir as ir
import torch
from torch.export import ExportedProgram

from mptk.compat.torch import quiet_exporter
from mptk.errors import MptkError
from mptk.files import write_together
from mptk.ir.passes import Log, Pass, run
from mptk.ir.program import Program
from passes.targets.onnx.lazy_weights import with_weights, without_weights
from passes.targets.onnx.lower import to_exporter
from passes.targets.onnx.run import run_onnx
from passes.targets.onnx.translate import translations

OPSET = 23
"""The first opset with Attention, RMSNormalization and RotaryEmbedding. The fusions are written for it."""

FILE, DATA = "model.onnx", "model.onnx.data"
Axes = tuple[str | None, ...]
TOKEN_AXES: Axes = ("batch_size", "sequence_length")
MASK_AXES: Axes = ("batch_size", "total_sequence_length")
PAST_AXES: Axes = ("batch_size", None, "past_sequence_length", None)


def input_names(layers: int) -> list[str]:
    """Names of the inputs, in order: tokens, then each layer's past."""
    past = [f"past_key_values.{layer}.{part}" for layer in range(layers) for part in ("key", "value")]
    return ["input_ids", "attention_mask", "position_ids", *past]


def output_names(layers: int) -> list[str]:
    """Names of the outputs, in order: logits, then each layer's present (past and new tokens)."""
    return ["logits", *(f"present.{layer}.{part}" for layer in range(layers) for part in ("key", "value"))]


def write_onnx(
    program: Program,
    folder: Path,
    lowering: Sequence[Pass],
    optimization: Sequence[ir.passes.PassBase],
    metadata: Mapping[str, str],
    log: Log,
) -> Path:
    """Write ``program`` as ``folder/model.onnx`` and its weights as ``folder/model.onnx.data``. Returns the first path.

    Inputs: input_ids and position_ids int64 [batch_size, sequence_length], attention_mask int64 [batch_size,
    total_sequence_length] (1 for a token, 0 for padding on either side), past_key_values.N.key and .value
    [batch_size, heads, past_sequence_length, dim]; past_sequence_length may be 0. Outputs: logits [batch_size,
    sequence_length or 1, vocabulary] and present.N.key and .value, of total_sequence_length = past + sequence.

    The files get their names only when they are complete and ``onnx.checker`` accepts them.

    Args:
        program: the result of ``trace_decoder``, or a rewrite of it, with real weights.
        folder: made if missing; other files in it stay.
        lowering: passes that leave only ops that the exporter can translate.
        optimization: passes over the ONNX graph.
        metadata: goes into the model's ``metadata_props`` (plan hash, versions).
        log: is given a record of each pass.

    Raises:
        MptkError: the program is no traced decoder, or it has no real weights, or the ONNX exporter lacks one of its
            operators.
    """
    layers, rest = divmod(len(program.user_inputs) - 3, 2)
    if layers < 1 or rest:
        raise MptkError("cannot write ONNX: the program has no KV cache inputs; make it with trace_decoder")
    model = run_onnx(translate(program, lowering, log), optimization, log)
    _name(model, layers)
    model.metadata_props.update(metadata)
    folder.mkdir(parents=True, exist_ok=True)
    with write_together(folder, DATA, FILE) as temporary:
        ir.save(model, temporary / FILE, external_data=DATA)
        onnx.checker.check_model(temporary / FILE, full_check=True)
    return folder / FILE


def translate(program: Program, lowering: Sequence[Pass], log: Log) -> ir.Model:
    """The lowered program in the ONNX operators of torch.onnx.export, without any optimisation.

    If the exporter lacks an operator, torch decomposes the whole graph into simpler ones. That takes ten times as long.
    """
    lowered = run(program, lowering, log)[-1].program
    try:
        return with_weights(_exported(to_exporter(without_weights(lowered))), lowered)
    except torch.onnx.OnnxExporterError as error:
        first = error
    try:
        return with_weights(_exported(without_weights(program).to_exported()), program)
    except torch.onnx.OnnxExporterError:
        raise MptkError(f"torch.onnx cannot write this model: {_first_cause(first)}; see docs/onnx.md") from first


def _exported(program: ExportedProgram) -> ir.Model:
    with quiet_exporter():
        exported = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=OPSET,
            optimize=False,
            verbose=False,
            custom_translation_table=translations(),
        )
    assert exported is not None
    return exported.model


def _name(model: ir.Model, layers: int) -> None:
    """Give inputs, outputs and symbolic axes the ecosystem's names."""
    inputs, outputs = model.graph.inputs, model.graph.outputs
    for names, values in ((input_names(layers), inputs), (output_names(layers), outputs)):
        for name, value in zip(names, values, strict=True):
            value.name = name
    axes: dict[object, str] = {}
    for value, axis_names in ((inputs[0], TOKEN_AXES), (inputs[1], MASK_AXES), (inputs[3], PAST_AXES)):
        assert value.shape is not None
        axes |= {size: name for size, name in zip(value.shape, axis_names, strict=True) if name}
    for value in (*inputs, *(result for node in model.graph for result in node.outputs)):
        if value.shape is not None:
            value.shape = ir.Shape([size if isinstance(size, int) else axes.get(size) for size in value.shape])


def _first_cause(error: BaseException) -> str:
    """The first line of the first exception in the chain: the exporter wraps it several times."""
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error).strip().split("\n")[0]
