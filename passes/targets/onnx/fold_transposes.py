"""fold_transposes: store large weights as they are multiplied, so that no node transposes them.

The exporter writes a linear layer as ``MatMul(x, Transpose(weight))``. onnxscript's constant folding removes the
Transpose, too, but it holds all new weights in memory.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from passes.targets.onnx.library import CONSTANT_SIZE
from passes.targets.onnx.plain_products import constant
from passes.targets.onnx.tensors import lazy, shape_of, tensor_of


class FoldTransposesPass(ir.passes.InPlacePass):
    """Transpose large weights that have one use when they are written, not in the graph."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph = model.graph
        found = [node for node in graph if node.op_type == "Transpose" and _is_large(node.inputs[0])]
        for node in found:
            _fold(graph, node)
        return ir.passes.PassResult(model, bool(found))


def _is_large(value: ir.Value | None) -> bool:
    tensor = value.const_value if value is not None and value.is_initializer() else None
    return value is not None and tensor is not None and len(value.uses()) == 1 and tensor.size > CONSTANT_SIZE


def _fold(graph: ir.Graph, transpose: ir.Node) -> None:
    weight, result = transpose.inputs[0], transpose.outputs[0]
    assert weight is not None
    old, name = tensor_of(weight), str(result.name)
    axes = transpose.attributes.get_ints("perm", tuple(reversed(range(len(old.shape)))))
    shape = [shape_of(old)[axis] for axis in axes]
    folded = constant(graph, name, lazy(old, lambda: np.transpose(old.numpy(), axes), shape))
    ir.convenience.replace_all_uses_with(result, folded)
    graph.remove(transpose, safe=True)
    graph.initializers.pop(str(weight.name))
