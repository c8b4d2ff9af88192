"""balance: scale and sort the channels of an ONNX decoder's gated products, so that their blocks quantise well.

In ``(f(x·G) ∘ (x·U))·D`` the logits do not change if U's columns are scaled by 1/s and D's rows by s, or if the
channels of G, U and D are reordered. Two steps, without data:

1. Scale: make each channel's expected size ``a = |G column| · |U column|`` and the size of its row in D equal, as in
   cross-layer equalisation (Nagel et al. 2019): ``s = sqrt(a / |D row|)``, divided by the geometric mean.
2. Order: sort the channels by ``a / s``, so that channels in one block, which share a scale, have similar sizes.

The pattern is found by its operators. D's input is a Mul. One side is a product with U that has no other use; the other
side comes from a product with G through element-wise operators and scalars only. Other products do not change.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from passes.targets.onnx.tensors import Floats, change_tensor, get_constant_tensor

ELEMENTWISE_OPS = {"Sigmoid", "Mul", "Gelu", "Relu", "Tanh", "Erf", "Add", "Sub", "Div", "Pow", "HardSigmoid", "Swish"}


class BalancePass(ir.passes.InPlacePass):
    """Scale and sort the channels of gated products, so that blocks of them quantise well."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        found = [parts for node in model.graph if (parts := match_gated_product(node)) is not None]
        for parts in found:
            balance = balance_channels(*(get_constant_tensor(part.inputs[1]) for part in parts))
            for part, change in zip(parts, (balance.gate, balance.up, balance.down), strict=True):
                change_tensor(part.inputs[1], change)
        return ir.passes.PassResult(model, bool(found))


@dataclass(frozen=True)
class Balance:
    """New scales and a new order of the channels of a gated product. Both arrays are [channels]."""

    scale: Floats
    order: npt.NDArray[np.int64]

    def gate(self, weight: Floats) -> Floats:
        """G in the new order, [hidden, channels]."""
        return weight[:, self.order]

    def up(self, weight: Floats) -> Floats:
        """U, whose columns are divided by the scales, in the new order, [hidden, channels]."""
        ordered = weight[:, self.order]
        ordered /= self.scale[self.order]
        return ordered

    def down(self, weight: Floats) -> Floats:
        """D, whose rows are multiplied by the scales, in the new order, [channels, out]."""
        ordered = weight[self.order]
        ordered *= self.scale[self.order, None]
        return ordered


def balance_channels(gate: ir.TensorProtocol, up: ir.TensorProtocol, down: ir.TensorProtocol) -> Balance:
    """How to scale and sort the channels of ``gate``, ``up`` [hidden, channels] and ``down`` [channels, out].

    A channel that is zero somewhere keeps its scale.
    """
    size = np.linalg.norm(gate.numpy(), axis=0) * np.linalg.norm(up.numpy(), axis=0)
    scale = compute_equal_scales(size, np.linalg.norm(down.numpy(), axis=1))
    return Balance(scale, np.argsort(size / scale, kind="stable"))


def compute_equal_scales(size: Floats, rows: Floats) -> Floats:
    """``sqrt(size / rows)`` by channel, divided by its geometric mean; 1 for a channel that is zero in either."""
    nonzero = (size > 0) & (rows > 0)
    scale = np.ones_like(size)
    scale[nonzero] = np.sqrt(size[nonzero] / rows[nonzero])
    scale[nonzero] /= np.exp(np.log(scale[nonzero]).mean()) if nonzero.any() else 1
    return scale


def match_gated_product(down: ir.Node) -> tuple[ir.Node, ir.Node, ir.Node] | None:
    """(G, U, D) if ``down`` is the D of a gated product and the three weights have no other use."""
    if not is_product(down) or down.inputs[0] is None:
        return None
    mul = down.inputs[0].producer()
    if mul is None or mul.op_type != "Mul" or _list_uses(mul.outputs[0]) != {down}:
        return None
    for left, right in (mul.inputs, mul.inputs[::-1]):
        up = right.producer() if right is not None else None
        if up is None or not is_product(up) or _list_uses(up.outputs[0]) != {mul}:
            continue
        gate = _find_source_product(left, mul)
        if gate is not None and gate is not up:
            return gate, up, down
    return None


def _find_source_product(value: ir.Value | None, end: ir.Node) -> ir.Node | None:
    """The one product from which ``value`` comes through element-wise operators that only ``end`` uses; else None."""
    inside, waiting, products = {end}, [value], set[ir.Node]()
    while waiting:
        current = waiting.pop()
        node = current.producer() if current is not None else None
        if node is None:
            if current is not None and (current.const_value is None or current.const_value.size != 1):
                return None
        elif is_product(node):
            products.add(node)
        elif node.op_type in ELEMENTWISE_OPS and node not in inside:
            inside.add(node)
            waiting += node.inputs
        elif node not in inside:
            return None
    outputs = [n.outputs[0] for n in (*inside - {end}, *products)]
    closed = all(_list_uses(output) <= inside for output in outputs)
    return products.pop() if len(products) == 1 and closed else None


def is_product(node: ir.Node) -> bool:
    """Whether a node multiplies by a matrix of weights that has no other use."""
    weight = node.inputs[1] if node.op_type == "MatMul" else None
    return (
        weight is not None
        and weight.const_value is not None
        and weight.const_value.shape.rank() == 2
        and _list_uses(weight) == {node}
    )


def _list_uses(value: ir.Value) -> set[ir.Node]:
    return {use.node for use in value.uses()} | ({None} if value.is_graph_output() else set())  # type: ignore[arg-type]


def get_product_weight(product: ir.Node) -> Floats:
    """The weight of a product, [inputs, outputs]."""
    return get_constant_tensor(product.inputs[1]).numpy()
