"""matmul_nbits: turn a MatMul with a weight into MatMulNBits, ONNX Runtime's product with a weight in blocks."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from passes.targets.onnx.plain_products import constant
from passes.targets.onnx.tensors import shape_of, tensor_of

ACCURACY_LEVEL = 4
"""MatMulNBits multiplies in int8. Level 0 would unpack the weights to float32 first, which is 40 times slower in
decode."""


def set_blocks(
    graph: ir.Graph, product: ir.Node, bits: int, block: int, tensors: Mapping[str, ir.TensorProtocol]
) -> None:
    """Give ``product`` its weight in blocks of ``block`` inputs.

    ``tensors``: an ending of the constant's name → the constant. In order: ``Q8`` or ``Q4`` uint8 [outputs, blocks,
    bytes], ``scales`` and, if the zero is not the middle code, ``zero_points``, both flat.
    """
    weight = product.inputs[1]
    assert weight is not None
    inputs, outputs = shape_of(tensor_of(weight))
    sizes = {"K": inputs, "N": outputs, "bits": bits, "block_size": block, "accuracy_level": ACCURACY_LEVEL}
    product.op_type, product.domain = "MatMulNBits", "com.microsoft"
    product.attributes.update({name: ir.AttrInt64(name, size) for name, size in sizes.items()})
    product.resize_inputs(1 + len(tensors))
    for index, (ending, tensor) in enumerate(tensors.items(), 1):
        name = f"{weight.name}_{ending}"  # there already if two products share the weight
        product.replace_input_with(index, graph.initializers.get(name) or constant(graph, name, tensor))
    graph.opset_imports.setdefault("com.microsoft", 1)
