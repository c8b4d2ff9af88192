"""graph_work: count the operations and bytes that one step of an ONNX decoder needs, from its graph."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnx_ir as ir
from onnx import ModelProto, NodeProto, ValueInfoProto

from mptk.errors import MptkError

PASS_THEIR_INPUT = {"Transpose", "Identity", "Cast"}


@dataclass(frozen=True)
class StepWork:
    """One step's lower bounds.

    ``flops``: operations in matrix products and attention, 2 for a multiply-add. Attention counts in full, since no
    runtime here skips the masked triangle. ``bytes``: weights and KV cache, read once. A table that is only looked up
    counts as 0; if it is also the output projection, it counts once.
    """

    flops: int
    bytes: int


def graph_work(file: Path, *, sequence: int, past: int, batch: int = 1) -> StepWork:
    """Work of ``sequence`` new tokens after ``past`` cached ones, for each of ``batch`` sequences.

    Sizes come from the graph's shapes at these lengths. So if a graph gives logits of the last position, only these
    count.
    """
    lengths = {
        "batch_size": batch,
        "sequence_length": sequence,
        "past_sequence_length": past,
        "total_sequence_length": past + sequence,
    }
    model = _at_lengths(onnx.load(file, load_external_data=False), lengths)
    graph = model.graph
    shapes = {w.name: list(w.dims) for w in graph.initializer}
    shapes |= {v.name: _shape(v) for v in (*graph.input, *graph.value_info, *graph.output)}
    flops = sum(_flops(node, shapes, past + sequence) for node in graph.node)
    cache = sum(
        math.prod(shapes[v.name]) * _bits(v.type.tensor_type.elem_type)
        for v in graph.input
        if v.name.startswith("past_key_values.")
    )
    return StepWork(flops, (cache + _weight_bits(model)) // 8)


def _at_lengths(model: ModelProto, lengths: Mapping[str, int]) -> ModelProto:
    for value in (*model.graph.input, *model.graph.value_info, *model.graph.output):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param in lengths:
                dim.dim_value = lengths[dim.dim_param]
    return onnx.shape_inference.infer_shapes(model, data_prop=True)


def _flops(node: NodeProto, shapes: Mapping[str, Sequence[int]], positions: int) -> int:
    if node.op_type == "Attention":
        flops = 2 * positions * (math.prod(shapes[node.input[0]]) + math.prod(shapes[node.output[0]]))
    elif node.op_type == "MatMulNBits":
        flops = 2 * next(a.i for a in node.attribute if a.name == "K") * math.prod(shapes[node.output[0]])
    elif node.op_type == "GroupQueryAttention":
        flops = 4 * positions * math.prod(shapes[node.output[0]])
    elif node.op_type in ("MatMul", "Gemm"):
        transposed = any(a.name == "transA" and a.i for a in node.attribute)
        flops = 2 * shapes[node.input[0]][0 if transposed else -1] * math.prod(shapes[node.output[0]])
    else:
        return 0
    if not flops:
        raise MptkError(f"cannot count the operations of {node.name}: its shape is unknown; export the model again")
    return flops


def _weight_bits(model: ModelProto) -> int:
    """Bits of the initialisers that a node reads in full, directly or through a transpose or a cast."""
    graph = model.graph
    weights = {w.name: math.prod(w.dims) * _bits(w.data_type) for w in graph.initializer}
    behind = {node.output[0]: node.input[0] for node in graph.node if node.op_type in PASS_THEIR_INPUT}
    read: set[str] = set()
    for node in graph.node:
        if node.op_type not in PASS_THEIR_INPUT:
            read.update(_origins(node.input[1:] if node.op_type == "Gather" else node.input, behind))
    return sum(size for name, size in weights.items() if name in read)


def _origins(names: Iterable[str], behind: Mapping[str, str]) -> Iterable[str]:
    for name in names:
        while name in behind:
            name = behind[name]
        yield name


def _shape(value: ValueInfoProto) -> list[int]:
    return [dim.dim_value for dim in value.type.tensor_type.shape.dim]


def _bits(data_type: int) -> int:
    return ir.DataType(data_type).bitwidth
