"""float16: weights, activations and the KV cache in float16, with ONNX Runtime's converter, one weight at a time."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common
from onnxruntime.transformers.float16 import DEFAULT_OP_BLOCK_LIST, convert_float_to_float16, convert_np_to_float16

from mptk.ir import find_reachable
from passes.targets.onnx.names import CACHE
from passes.targets.onnx.tensors import Array, get_constant_tensor, name_nodes, read_tensor_shape, slice_in_parts

LARGE = 1 << 10
"""Weights of more numbers than this are converted when they are written."""


class Float16Pass(ir.passes.FunctionalPass):
    """Convert float32 to float16, except what comes from outside, the outputs, and the inputs of the rotary angles.

    A KV cache goes in and out in float16: only the graph itself reads it.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        # float16 cannot hold every position above 2048, so what leads to the rotary angles stays float32.
        angles = _find_ancestors([node for node in model.graph if node.op_type in ("Cos", "Sin")])
        name_nodes(model)
        # The logits and all inputs but the cache keep their types.
        inputs = [str(value.name) for value in model.graph.inputs]
        kept = [str(model.graph.outputs[0].name), *(name for name in inputs if not name.startswith(CACHE))]
        # The converter reads a protobuf with all its constants in memory: large weights pass it by as inputs.
        names, weights = list(model.graph.initializers), _to_inputs(model.graph, angles)
        proto = convert_float_to_float16(
            ir.to_proto(model), keep_io_types=kept, node_block_list=[node.name for node in angles]
        )
        converted = ir.from_proto(proto)
        _to_constants(converted.graph, names, weights)
        converted.graph.sort()
        _drop_detours(converted)
        return ir.passes.PassResult(converted, True)

    def ensures(self, model: ir.Model) -> None:
        """The logits are float32."""
        if model.graph.outputs[0].dtype is not ir.DataType.FLOAT:
            raise ir.passes.PostconditionError(f"the logits are {model.graph.outputs[0].dtype}")


def _find_ancestors(nodes: list[ir.Node]) -> set[ir.Node]:
    def list_producers(node: ir.Node) -> list[ir.Node]:
        return [p for value in node.inputs if value is not None and (p := value.producer()) is not None]

    return find_reachable(nodes, list_producers)


def _drop_detours(model: ir.Model) -> None:
    """Drop casts to float16 and back. The converter puts one between any two nodes that stay float32."""
    graph = model.graph
    for node in list(graph):
        there = _cast(node, ir.DataType.FLOAT) and _cast(node.inputs[0].producer(), ir.DataType.FLOAT16)  # type: ignore[union-attr]
        source = there.inputs[0] if there else None
        if source is not None and source.dtype is ir.DataType.FLOAT:
            ir.convenience.replace_all_uses_with(node.outputs[0], source)
            graph.remove(node, safe=True)
    common.RemoveUnusedNodesPass()(model)


def _cast(node: ir.Node | None, target: ir.DataType) -> ir.Node | None:
    """``node`` if it is a cast to ``target``."""
    return node if node is not None and node.op_type == "Cast" and node.attributes["to"].as_int() == target else None


def _to_inputs(graph: ir.Graph, angles: set[ir.Node]) -> dict[str, ir.TensorProtocol]:
    """Make the large weights inputs of the graph, and return them by name.

    A constant that a node in float32 reads stays: the converter decides about its type.
    """
    weights = {}
    for name, value in list(graph.initializers.items()):
        tensor, readers = get_constant_tensor(value), {use.node for use in value.uses()}
        blocked = not readers.isdisjoint(angles) or any(node.op_type in DEFAULT_OP_BLOCK_LIST for node in readers)
        if tensor.dtype is ir.DataType.FLOAT and tensor.size > LARGE and not blocked:
            weights[name] = tensor
            graph.initializers.pop(name)
            value.const_value, value.shape, value.type = (
                None,
                ir.Shape(read_tensor_shape(tensor)),
                ir.TensorType(tensor.dtype),
            )
            graph.inputs.append(value)
    return weights


def _to_constants(graph: ir.Graph, names: list[str], weights: dict[str, ir.TensorProtocol]) -> None:
    """Make the inputs ``weights`` constants again, in float16. ``names``: the order of all constants.

    The converter also gives a constant that stays float32 the type float16, which is put right.
    """
    # ``_to_inputs`` put the weights behind the graph's own inputs, so the last inputs are theirs.
    held = {str(value.name): value for value in graph.inputs if value.name in weights} | dict(graph.initializers)
    del graph.inputs[len(graph.inputs) - len(weights) :]
    graph.initializers.clear()
    for name in names:
        if name in weights:
            held[name].const_value = _round_to_float16(weights[name])
        held[name].type = ir.TensorType(get_constant_tensor(held[name]).dtype)
        graph.register_initializer(held[name])


def _round_to_float16(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    def halve() -> ir.TensorProtocol:
        numbers = tensor.numpy()
        halves: Array = np.empty(numbers.shape, np.float16)
        for part in slice_in_parts(numbers.shape):
            halves[part] = convert_np_to_float16(numbers[part])
        return ir.Tensor(halves)

    return ir.LazyTensor(halve, ir.DataType.FLOAT16, ir.Shape(read_tensor_shape(tensor)), name=tensor.name)
