"""emit: a traced program → ONNX files in standard operators, with given names of inputs, outputs and axes.

The graph is the program's own; the model's class is not exported again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir
import onnxscript
import torch
from onnx_ir.tensor_adapters import TorchTensor
from torch.export import ExportedProgram

from mptk.compat.torch import hide_exporter_logs
from mptk.errors import TargetError, TraceError, take_first_line
from mptk.ir import Log, Pass, PassRecord, Program, run_passes
from mptk.progress import step_through
from passes.targets.onnx.check_sizes import CheckSizesPass
from passes.targets.onnx.lower import to_exporter
from passes.targets.onnx.names import Axes
from passes.targets.onnx.tensors import save_graph

OPSET = 23
"""The first opset with Attention, RMSNormalization and RotaryEmbedding. onnxscript's fusions are written for it."""

# The names of axes that optimum and onnxruntime-genai give a decoder's inputs.
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


def make_decoder_interface(program: Program, positions: Axes = TOKEN_AXES, before: int = 0) -> Interface:
    """The names of a traced decoding step, as optimum and onnxruntime-genai have them.

    Inputs: input_ids and position_ids int64 [batch_size, sequence_length], attention_mask int64 [batch_size,
    total_sequence_length] (1 for a token, 0 for padding on either side), past_key_values.N.key and .value
    [batch_size, heads, past_sequence_length, dim]; past_sequence_length may be 0. Outputs: logits [batch_size,
    sequence_length or 1, vocabulary] and present.N.key and .value, of total_sequence_length = past + sequence.

    ``positions``: the axes of position_ids. ``before``: how many inputs the program has before these.

    Raises:
        MptkError: the program is not a traced decoder.
    """
    # After the tokens, each layer has two inputs: its keys and its values.
    tokens = {"input_ids": TOKEN_AXES, "attention_mask": MASK_AXES, "position_ids": positions}
    layers, rest = divmod(len(program.user_inputs) - before - len(tokens), 2)
    if layers < 1 or rest:
        raise TraceError("cannot write ONNX: the program has no KV cache inputs; make it with trace_decoder")
    parts = [f"{layer}.{part}" for layer in range(layers) for part in ("key", "value")]
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
    """Write ``program`` as ONNX into ``folder``; the weights of each graph are in a file of their own beside it.

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
    # The checks of sizes come last: behind their Reshape an input would fit no pattern of the other passes.
    refuse = CheckSizesPass(program.sizes, dict(zip(program.user_inputs, interface.inputs, strict=True)))
    whole = run_onnx(model, [*optimization, refuse], log)
    folder.mkdir(parents=True, exist_ok=True)
    for file, passes in files.items():
        # A pass changes its graph in place, so several files need a copy each.
        model = run_onnx(whole.clone() if len(files) > 1 else whole, passes, log)
        model.metadata_props.update(metadata)
        save_graph(model, folder / file)


def translate(program: Program, lowering: Sequence[Pass], log: Log) -> ir.Model:
    """The lowered program in the ONNX operators of torch.onnx.export, without any optimisation.

    If the exporter lacks an operator, torch decomposes the whole graph into simpler ones. That takes ten times as long.
    """
    # The exporter gets fake weights, so that it holds none. The graph reads the real ones on demand.
    lowered = run_passes(program, lowering, log)[-1].program
    try:
        return with_weights(_export_model(to_exporter(with_fake_weights(lowered))), lowered)
    except torch.onnx.OnnxExporterError as error:
        first = error
    # torch decomposes the program as it was before the lowering. If that fails, too, the first error says more: it is
    # about an op of the model.
    try:
        return with_weights(_export_model(with_fake_weights(program).to_exported()), program)
    except torch.onnx.OnnxExporterError:
        raise TargetError(
            f"torch.onnx cannot write this model: {_find_first_cause(first)}; see docs/onnx.md", name="onnx"
        ) from first


def _export_model(program: ExportedProgram) -> ir.Model:
    with hide_exporter_logs():
        exported = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=OPSET,
            optimize=False,  # the passes do that, in a twentieth of the time
            verbose=False,
            custom_translation_table=list_translations(),
        )
    assert exported is not None
    return exported.model


def _name(model: ir.Model, interface: Interface) -> None:
    """Give inputs, outputs and symbolic axes their names."""
    inputs, outputs = model.graph.inputs, model.graph.outputs
    for names, values in ((interface.inputs, inputs), (interface.outputs, outputs)):
        for name, value in zip(names, values, strict=True):
            value.name = name
    # Equal symbols are one size. The first input that has a size names it: ``|`` lets earlier names win.
    axes: dict[object, str] = {}
    for value, axis_names in zip(inputs, interface.inputs.values(), strict=True):
        assert value.shape is not None
        pairs = zip(value.shape, axis_names, strict=True)
        axes = {size: name for size, name in pairs if name} | axes
    for value in (*inputs, *(result for node in model.graph for result in node.outputs)):
        if value.shape is not None:
            value.shape = ir.Shape([_name_size(size, axes) for size in value.shape])


def _name_size(size: int | ir.SymbolicDim, axes: Mapping[object, str]) -> int | str | None:
    """A size that varies by the name of its axis. The exporter writes a size that export has fixed as a symbol."""
    text = str(size if isinstance(size, int) else size.value)
    return int(text) if text.isdigit() else axes.get(size)


def _find_first_cause(error: BaseException) -> str:
    """The first line of the first exception in the chain: the exporter wraps it several times."""
    while error.__cause__ is not None:
        error = error.__cause__
    return take_first_line(error)


SMALL = 1 << 12
"""Largest constant, in numbers, that is read at once: passes look at the values of small ones."""


def with_fake_weights(program: Program) -> Program:
    """``program`` with the fake tensors of its trace in the place of its weights."""
    values = {node.name: node.meta["val"] for node in program.list_placeholders()}
    return program.with_state({name: values[node] for node, name in program.weights.items()})


def with_weights(model: ir.Model, program: Program) -> ir.Model:
    """Give ``model``, the export of ``with_fake_weights(program)``, the weights of ``program``, in the graph's types.

    An initialiser has the name of a weight, or of one that is tied to it.
    """
    held = set(program.state)
    for name, value in model.graph.initializers.items():
        source = program.aliases.get(name, name)
        if source in held:
            value.const_value = _make_lazy_weight(value, program, source)
    return model


def _make_lazy_weight(value: ir.Value, program: Program, name: str) -> ir.TensorProtocol:
    like = value.const_value
    assert isinstance(like, ir.Tensor)
    kind = like.raw.dtype

    def read() -> TorchTensor:
        tensor = program.state[name].detach()
        # ``LowerComplex`` has made pairs of complex numbers.
        return TorchTensor(torch.view_as_real(tensor) if tensor.is_complex() else tensor.to(kind), name=value.name)

    return read() if like.size <= SMALL else ir.LazyTensor(read, like.dtype, like.shape, name=value.name)


op: Any = onnxscript.opset23
"""Any: its methods are typed for tensors, but here they take and return the values of a graph."""


def translate_grouped_mm(x: object, weight: object, offs: object) -> object:
    """Multiply the rows of each expert by its weight.

    Rows ``offs[e - 1]`` to ``offs[e]`` of x [rows, in] times weight[e] of [experts, in, out]; ``offs[-1]`` = rows.
    Each expert has a MatMul of its own, so its weights are not copied for each row. In one step, many experts have no
    row.
    """
    assert isinstance(weight, ir.Value)
    assert weight.shape is not None
    experts = weight.shape[0]
    assert isinstance(experts, int)
    ends = op.Cast(offs, to=7)  # int64, the type of a Slice's bounds
    starts = op.Concat(op.Constant(value_ints=[0]), ends, axis=0)
    axis = op.Constant(value_ints=[0])
    parts = []
    for expert in range(experts):
        index, following = (op.Constant(value_ints=[i]) for i in (expert, expert + 1))
        rows = op.Slice(x, op.Gather(starts, index), op.Gather(starts, following), axis)
        parts.append(op.MatMul(rows, op.Gather(weight, op.Constant(value_int=expert), axis=0)))
    return op.Concat(*parts, axis=0)


def translate_diff(x: object, n: int = 1, dim: int = -1, prepend: object = None, append: object = None) -> object:
    """Each number minus the one before it along ``dim``, ``n`` times over, with ``prepend`` and ``append`` around x."""
    # Rows 1 … minus rows … −1. The largest int64 is how ONNX writes an open end of a Slice.
    parts = [part for part in (prepend, x, append) if part is not None]
    whole = op.Concat(*parts, axis=dim) if len(parts) > 1 else x
    axis, first, end = (op.Constant(value_ints=[i]) for i in (dim, 0, torch.iinfo(torch.int64).max))
    for _ in range(n):
        later = op.Slice(whole, op.Constant(value_ints=[1]), end, axis)
        whole = op.Sub(later, op.Slice(whole, first, op.Constant(value_ints=[-1]), axis))
    return whole


def translate_conv3d(
    x: object,
    weight: object,
    bias: object = None,
    stride: Sequence[int] = (1, 1, 1),
    padding: Sequence[int] = (0, 0, 0),
    dilation: Sequence[int] = (1, 1, 1),
    groups: int = 1,
) -> object:
    """A convolution over three dimensions. Without a bias, the exporter's own makes one of a wrong shape."""
    given = [x, weight] if bias is None else [x, weight, bias]
    sizes = {"strides": [*stride], "pads": [*padding, *padding], "dilations": [*dilation]}
    return op.Conv(*given, group=groups, **sizes)


def translate_rsub(x: object, other: float, alpha: float = 1.0) -> object:
    """``other - alpha * x``."""
    scaled = x if alpha == 1.0 else op.Mul(x, op.CastLike(op.Constant(value_float=float(alpha)), x))
    return op.Sub(op.CastLike(op.Constant(value_float=float(other)), x), scaled)


def translate_argsort(x: object, dim: int = -1, descending: bool = False) -> object:
    """The places of numbers along ``dim``, the lowest first or, if ``descending``, the highest."""
    count = op.Gather(op.Shape(x), op.Constant(value_ints=[dim]))
    return op.TopK(x, count, axis=dim, largest=int(descending))[1]


def list_translations() -> dict[Callable[..., object], Callable[..., object]]:
    """Op → the function that writes it. A library's op is included if the library is loaded."""
    # transformers registers its op when its module of mixtures of experts is imported.
    fallback = getattr(torch.ops.transformers, "grouped_mm_fallback", None)
    aten = torch.ops.aten
    own: dict[Callable[..., object], Callable[..., object]] = {
        aten.diff.default: translate_diff,
        aten.conv3d.default: translate_conv3d,
        aten.rsub.Scalar: translate_rsub,
        aten.argsort.default: translate_argsort,
    }
    return own if fallback is None else {**own, fallback.default: translate_grouped_mm}


def run_onnx(model: ir.Model, passes: Sequence[ir.passes.PassBase], log: Log) -> ir.Model:
    """Apply ``passes``, each with its conditions. ``log`` is given a record of every pass that changed the graph."""

    def name(step: ir.passes.PassBase) -> str:
        return str(getattr(step, "name", type(step).__name__))

    for step in step_through(passes, name):
        before, start = (len(model.graph), _count_weights(model)), time.perf_counter()
        result = step(model)
        model = result.model
        if result.modified:
            seconds = round(time.perf_counter() - start, 2)
            ops, parameters = zip(before, (len(model.graph), _count_weights(model)), strict=True)
            log.add(PassRecord(f"onnx: {name(step)}", seconds, ops, parameters, changed=True))
    return model


def _count_weights(model: ir.Model) -> int:
    """Numbers in the graph's initialisers."""
    return sum(value.const_value.size for value in model.graph.initializers.values() if value.const_value is not None)
