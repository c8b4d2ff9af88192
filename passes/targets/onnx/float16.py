"""float16: weights, activations and the KV cache in float16."""

from __future__ import annotations

import onnx_ir as ir
from onnxruntime.transformers.float16 import convert_float_to_float16


class Float16Pass(ir.passes.FunctionalPass):
    """Convert float32 to float16, except the logits and the inputs of the rotary angles."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        # float16 cannot hold every position above 2048.
        angles = _ancestors([node for node in model.graph if node.op_type in ("Cos", "Sin")])
        proto = convert_float_to_float16(
            ir.to_proto(model), keep_io_types=["logits"], node_block_list=[node.name for node in angles]
        )
        return ir.passes.PassResult(ir.from_proto(proto), True)

    def ensures(self, model: ir.Model) -> None:
        """The logits are float32."""
        if model.graph.outputs[0].dtype is not ir.DataType.FLOAT:
            raise ir.passes.PostconditionError(f"the logits are {model.graph.outputs[0].dtype}")


def _ancestors(nodes: list[ir.Node]) -> list[ir.Node]:
    found: dict[ir.Node, None] = {}
    waiting = list(nodes)
    while waiting:
        node = waiting.pop()
        if node not in found:
            found[node] = None
            waiting += [p for value in node.inputs if value is not None and (p := value.producer()) is not None]
    return list(found)
