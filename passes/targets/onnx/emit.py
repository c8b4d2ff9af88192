"""emit: a traced program → ONNX files in standard operators, with given names of inputs, outputs and axes.

The graph is the program's own; the model's class is not exported again. ``decoder_interface`` has the names and axes of
a decoder with its KV cache as optimum and onnxruntime-genai have them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
from passes.targets.onnx.names import data_file
from passes.targets.onnx.run import run_onnx
from passes.targets.onnx.translate import translations

OPSET = 23
"""The first opset with Attention, RMSNormalization and RotaryEmbedding. The fusions are written for it."""

Axes = tuple[str | None, ...]
TOKEN_AXES: Axes = ("batch_size", "sequence_length")
MASK_AXES: Axes = ("batch_size", "total_sequence_length")
PAST_AXES: Axes = ("batch_size", None, "past_sequence_length", None)


@dataclass(frozen=True)
class Interface:
    """Names of a program's inputs and outputs, in order, and of the inputs' axes (None: no name).

    An axis of fixed size keeps its number. Any other axis of the graph that has an input's size has its name.
    """

    inputs: Mapping[str, Axes]
    outputs: Sequence[str]


def decoder_interface(program: Program) -> Interface:
    """The names of a traced decoding step.

    Inputs: input_ids and position_ids int64 [batch_size, sequence_length], attention_mask int64 [batch_size,
    total_sequence_length] (1 for a token, 0 for padding on either side), past_key_values.N.key and .value
    [batch_size, heads, past_sequence_length, dim]; past_sequence_length may be 0. Outputs: logits [batch_size,
    sequence_length or 1, vocabulary] and present.N.key and .value, of total_sequence_length = past + sequence.

    Raises:
        MptkError: the program is no traced decoder.
    """
    layers, rest = divmod(len(program.user_inputs) - 3, 2)
    if layers < 1 or rest:
        raise MptkError("cannot write ONNX: the program has no KV cache inputs; make it with trace_decoder")
    parts = [f"{layer}.{part}" for layer in range(layers) for part in ("key", "value")]
    tokens = {"input_ids": TOKEN_AXES, "attention_mask": MASK_AXES, "position_ids": TOKEN_AXES}
    past = {f"past_key_values.{part}": PAST_AXES for part in parts}
    return Interface({**tokens, **past}, ["logits", *(f"present.{part}" for part in parts)])


def write_onnx(
    program: Program,
    folder: Path,
    interface: Interface,
    lowering: Sequence[Pass],
    optimization: Sequence[ir.passes.PassBase],
    files: Mapping[str, Sequence[ir.passes.PassBase]],
    metadata: Mapping[str, str],
    log: Log,
) -> None:
    """Write ``program`` as ONNX into ``folder``; the weights of each are in its ``data_file``.

    The files get their names only when they are complete and ``onnx.checker`` accepts them.

    Args:
        program: any program with real weights.
        folder: made if missing; other files in it stay.
        interface: names of its inputs and outputs.
        lowering: passes that leave only ops that the exporter can translate.
        optimization: passes over the ONNX graph.
        files: name of a file → passes that make its graph of the whole one.
        metadata: goes into each model's ``metadata_props`` (plan hash, versions).
        log: is given a record of each pass.

    Raises:
        MptkError: the program has no real weights, or the ONNX exporter lacks one of its operators.
    """
    model = translate(program, lowering, log)
    _name(model, interface)
    whole = run_onnx(model, optimization, log)
    folder.mkdir(parents=True, exist_ok=True)
    for file, passes in files.items():
        model = run_onnx(whole.clone() if len(files) > 1 else whole, passes, log)
        model.metadata_props.update(metadata)
        data = data_file(file)
        with write_together(folder, data, file) as temporary:
            ir.save(model, temporary / file, external_data=data)
            onnx.checker.check_model(temporary / file, full_check=True)


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


def _name(model: ir.Model, interface: Interface) -> None:
    """Give inputs, outputs and symbolic axes their names."""
    inputs, outputs = model.graph.inputs, model.graph.outputs
    for names, values in ((interface.inputs, inputs), (interface.outputs, outputs)):
        for name, value in zip(names, values, strict=True):
            value.name = name
    axes: dict[object, str] = {}
    for value, axis_names in zip(inputs, interface.inputs.values(), strict=True):
        assert value.shape is not None
        pairs = zip(value.shape, axis_names, strict=True)
        axes = {size: name for size, name in pairs if name} | axes
    for value in (*inputs, *(result for node in model.graph for result in node.outputs)):
        if value.shape is not None:
            value.shape = ir.Shape([_named(size, axes) for size in value.shape])


def _named(size: int | ir.SymbolicDim, axes: Mapping[object, str]) -> int | str | None:
    """A size that varies by the name of its axis. The exporter writes a size that export has fixed as a symbol."""
    text = str(size if isinstance(size, int) else size.value)
    return int(text) if text.isdigit() else axes.get(size)


def _first_cause(error: BaseException) -> str:
    """The first line of the first exception in the chain: the exporter wraps it several times."""
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error).strip().split("\n")[0]
