"""plain_products: every product with a weight becomes ``MatMul(x, weight [inputs, outputs])``.

Quantisers support no other form.

1. ``Transpose(weight)`` becomes a weight.
2. ``Gemm(x, weight, bias)`` becomes ``MatMul`` and ``Add``.

Below are the questions that the passes on such products ask: which products have weights, which one gives the logits,
which node looks tokens up.
"""

from __future__ import annotations

import onnx_ir as ir

from passes.targets.onnx.tensors import get_constant_tensor, make_lazy_tensor, read_tensor_shape


class PlainProductsPass(ir.passes.InPlacePass):
    """Make every product with a weight a MatMul."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        # ``FoldTransposesPass`` leaves the transpose of a weight that has other uses, such as a tied embedding table.
        graph, modified = model.graph, False
        for node in list(graph):
            if node.op_type == "Transpose" and is_constant(node.inputs[0]):
                folded = _transpose_weight(graph, node.inputs[0])  # type: ignore[arg-type]
                ir.convenience.replace_all_uses_with(node.outputs[0], folded)
                graph.remove(node, safe=True)
                modified = True
            elif node.op_type == "Gemm" and is_constant(node.inputs[1]):
                modified |= _split_gemm(graph, node)
        return ir.passes.PassResult(model, modified)

    def ensures(self, model: ir.Model) -> None:
        """No matrix of constants is transposed in the graph."""
        left = [n.name for n in model.graph if n.op_type == "Transpose" and is_constant(n.inputs[0])]
        if left:
            raise ir.passes.PostconditionError(f"{left[0]} transposes a constant")


def _split_gemm(graph: ir.Graph, gemm: ir.Node) -> bool:
    # A MatMul and an Add have no factors.
    settings = {name: attribute.value for name, attribute in gemm.attributes.items()}
    if settings.get("transA", 0) or settings.get("alpha", 1.0) != 1 or settings.get("beta", 1.0) != 1:
        return False
    data, weight, *bias = gemm.inputs
    steps = ir.tape.Tape()
    result = steps.op("MatMul", [data, _transpose_weight(graph, weight) if settings.get("transB", 0) else weight])  # type: ignore[arg-type]
    if bias and bias[0] is not None:
        result.shape, result.type = gemm.outputs[0].shape, gemm.outputs[0].type
        result = steps.op("Add", [result, bias[0]])
    put(graph, gemm, steps, result)
    return True


def put(graph: ir.Graph, old: ir.Node, steps: ir.tape.Tape, result: ir.Value) -> None:
    """Replace ``old`` by ``steps``, which end in ``result`` and take its name: it may be an output of the graph."""
    graph.insert_before(old, steps.nodes)
    result.shape, result.type = old.outputs[0].shape, old.outputs[0].type
    replaced = old.outputs[0]
    ir.convenience.replace_all_uses_with(replaced, result, replace_graph_outputs=True)
    result.name, replaced.name = replaced.name, f"{replaced.name}_earlier"
    graph.remove(old, safe=True)


def _transpose_weight(graph: ir.Graph, weight: ir.Value) -> ir.Value:
    """The transpose of a matrix as a new weight, made once for all its readers."""
    name = f"{weight.name}.T"
    if name in graph.initializers:
        return graph.initializers[name]
    old = get_constant_tensor(weight)
    return add_constant(graph, name, make_lazy_tensor(old, lambda: old.numpy().T, read_tensor_shape(old)[::-1]))


def is_constant(value: ir.Value | None) -> bool:
    """Whether a value is a matrix of constants."""
    return value is not None and value.const_value is not None and value.const_value.shape.rank() == 2


def add_constant(graph: ir.Graph, name: str, tensor: ir.TensorProtocol) -> ir.Value:
    """A new constant of the graph."""
    tensor.name = name
    value = ir.Value(name=name, const_value=tensor, shape=ir.Shape(read_tensor_shape(tensor)))
    value.type = ir.TensorType(tensor.dtype)
    graph.register_initializer(value)
    return value


def find_weight_products(model: ir.Model) -> dict[str, ir.TensorProtocol]:
    """Name of each product with a weight → the weight, [inputs, outputs]."""
    return {
        str(node.name): get_constant_tensor(node.inputs[1])
        for node in model.graph
        if node.op_type == "MatMul" and is_constant(node.inputs[1])
    }


def is_token_lookup(graph: ir.Graph, node: ir.Node) -> bool:
    """Whether a node looks token ids up in a table."""
    ids = next((value for value in graph.inputs if value.name == "input_ids"), None)
    return node.op_type == "Gather" and is_constant(node.inputs[0]) and ids is not None and node.inputs[1] is ids


def find_logit_products(model: ir.Model) -> set[str]:
    """Names of the products that give the logits: their outputs are the vocabulary. Empty if features come out."""
    # Its result may go through a scale or a cap, so the product is known by its size and not by the output.
    output = model.graph.outputs[0]
    vocabulary = output.shape if output.name == "logits" else None
    return {
        name for name, weight in find_weight_products(model).items() if vocabulary and weight.shape[1] == vocabulary[-1]
    }
