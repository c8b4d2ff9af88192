"""equalize: make the channels of an ONNX decoder equally large, so that blocks of its weights round well.

Both passes keep the logits. ``SmoothPass`` moves scales from norms into the products that read them; ``BalancePass``
scales and sorts the channels within gated products. The smoothing comes first: it changes the weights that the other
pass measures.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from passes.targets.onnx.measure import measure_onnx, takes_text_inputs
from passes.targets.onnx.plain_products import add_constant, find_logit_products, is_token_lookup
from passes.targets.onnx.tensors import Floats, change_tensor, get_constant_tensor, make_lazy_tensor, slice_in_parts

PROMPTS = (16, 32)
"""The number of prompts, and of tokens in each: few enough for any table of positions."""


@dataclass(frozen=True)
class SmoothPass(ir.passes.InPlacePass):
    """Move scales of channels from norms into the products that read them, except the output projection.

    A norm ends in a scale for each channel. If only products with weights read its result, channel i can be divided by
    s_i in the norm and row i of the weights multiplied by s_i (SmoothQuant, Xiao et al. 2023). ``s = sqrt(a / w)``,
    divided by its geometric mean, with the root mean square a of the channel and w of its row in all those weights. A
    channel is then as large in the activations as in the weights, so it is not an outlier in either.

    ``a`` is measured on prompts of random tokens in ONNX Runtime, since the large channels depend on the model and
    hardly on the text. A graph that reads more than text stays as it is: random numbers in place of images say nothing
    of its channels.

    ``source``: the file of the same graph. It is run.
    """

    source: Path

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        if not takes_text_inputs([str(value.name) for value in model.graph.inputs]):
            return ir.passes.PassResult(model, False)
        # The norms, by the names of their results, which are also the values to measure.
        head = find_logit_products(model)
        found = {
            str(node.outputs[0].name): (node, products)
            for node in model.graph
            if _find_scale_inputs(node) and (products := _find_readers(node.outputs[0], head))
        }
        channels = {
            name: get_constant_tensor(node.inputs[_find_scale_inputs(node)[0]]).size
            for name, (node, _) in found.items()
        }
        # On the CPU, whatever the device of the run, and with a fixed seed: the check of the quantised graph must find
        # the same scales on any machine.
        text = np.random.default_rng(0).integers(0, _count_tokens(model), PROMPTS)
        for name, squares in measure_onnx(self.source, channels, text, "squares"):
            node, products = found[name]
            scale = compute_smoothing(np.sqrt(squares / text.size), list(map(get_product_weight, products)))
            for index in _find_scale_inputs(node):
                _change_input(model.graph, node, index, scale, np.divide)
            for product in products:
                _change_input(model.graph, product, 1, scale[:, None], np.multiply)
        return ir.passes.PassResult(model, bool(found))


def _count_tokens(model: ir.Model) -> int:
    """The number of tokens: rows of the table in which the first input is looked up, else the logits' last axis."""
    tables = [get_constant_tensor(node.inputs[0]).shape for node in model.graph if is_token_lookup(model.graph, node)]
    return int(tables[0][0] if tables else model.graph.outputs[0].shape[-1])  # type: ignore[arg-type, index]


def compute_smoothing(size: Floats, weights: Collection[Floats]) -> Floats:
    """s by channel, from the activations' root mean squares [inputs] and their weights, each [inputs, outputs]."""
    sizes = (len(size), sum(weight.shape[1] for weight in weights))
    squares = [
        np.square(np.concatenate([w[rows] for w in weights], axis=1)).mean(axis=1) for rows in slice_in_parts(sizes)
    ]
    return compute_equal_scales(size, np.sqrt(np.concatenate(squares)))


def _find_readers(value: ir.Value, without: Collection[str]) -> list[ir.Node]:
    """The products that read ``value`` [..., channels], also after reshapes of [...]; none if it has other readers."""
    readers: list[ir.Node] = []
    for node in (use.node for use in value.uses()):
        if node.op_type == "Reshape" and _count_channels(node.outputs[0]) == _count_channels(value) is not None:
            # The channels are still the last axis, so the scales fit behind the reshape, too.
            behind = _find_readers(node.outputs[0], without)
            if not behind:
                return []
            readers += behind
        elif is_product(node) and node.inputs[0] is value and node.name not in without:
            readers.append(node)
        else:
            return []
    return [] if value.is_graph_output() else readers


def _count_channels(value: ir.Value) -> int | None:
    size = value.shape[-1] if value.shape is not None and value.shape.rank() else None
    return size if isinstance(size, int) else None


def _find_scale_inputs(node: ir.Node) -> list[int]:
    """The inputs by which a norm scales or shifts its result, if all are constants with one number for each channel."""
    if node.op_type not in ("RMSNormalization", "LayerNormalization"):
        return []
    indices = [i for i, value in enumerate(node.inputs) if i > 0 and value is not None]
    constants = [value.const_value for value in node.inputs[1:] if value is not None]
    return indices if all(c is not None and c.size == _count_channels(node.outputs[0]) for c in constants) else []


def _change_input(graph: ir.Graph, node: ir.Node, index: int, scale: Floats, change: Callable[..., Floats]) -> None:
    """Replace an input of a node by ``change(input, scale)``. Norms of several layers may share the old constant."""
    old = get_constant_tensor(node.inputs[index])
    name = f"{node.outputs[0].name}.smooth.{index}"
    node.replace_input_with(index, add_constant(graph, name, make_lazy_tensor(old, lambda: change(old.numpy(), scale))))


ELEMENTWISE_OPS = {"Sigmoid", "Mul", "Gelu", "Relu", "Tanh", "Erf", "Add", "Sub", "Div", "Pow", "HardSigmoid", "Swish"}
"""What activations consist of. Through these a channel stays a channel, so reordering commutes with them."""


class BalancePass(ir.passes.InPlacePass):
    """Scale and sort the channels of gated products, so that blocks of them quantise well.

    In ``(f(x·G) ∘ (x·U))·D`` the logits do not change if U's columns are scaled by 1/s and D's rows by s, or if the
    channels of G, U and D are reordered. Two steps, without data:

    1. Scale: make each channel's expected size ``a = |G column| · |U column|`` and the size of its row in D equal, like
       cross-layer equalisation (Nagel et al. 2019): ``s = sqrt(a / |D row|)``, divided by the geometric mean.
    2. Order: sort the channels by ``a / s``, so that channels in one block, which share a scale, have similar sizes.

    The pattern is found by its operators. D's input is a Mul. One side is a product with U that has no other use; the
    other side comes from a product with G only through element-wise operators and scalars. No other product changes.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        found = [parts for node in model.graph if (parts := match_gated_product(node)) is not None]
        for parts in found:
            # The scales are computed now, from the old weights; the new weights only when the file is written.
            balance = balance_channels(*(get_constant_tensor(part.inputs[1]) for part in parts))
            for part, change in zip(parts, (balance.scale_gate, balance.scale_up, balance.scale_down), strict=True):
                change_tensor(part.inputs[1], change)
        return ir.passes.PassResult(model, bool(found))


@dataclass(frozen=True)
class Balance:
    """New scales and a new order of the channels of a gated product. Both arrays are [channels].

    G is only reordered: it goes through the activation, so a scale would not cancel.
    """

    scale: Floats
    order: npt.NDArray[np.int64]

    def scale_gate(self, weight: Floats) -> Floats:
        """G in the new order, [hidden, channels]."""
        return weight[:, self.order]

    def scale_up(self, weight: Floats) -> Floats:
        """U, whose columns are divided by the scales, in the new order, [hidden, channels]."""
        ordered = weight[:, self.order]  # a copy, which may change in place
        ordered /= self.scale[self.order]
        return ordered

    def scale_down(self, weight: Floats) -> Floats:
        """D, whose rows are multiplied by the scales, in the new order, [channels, out]."""
        ordered = weight[self.order]
        ordered *= self.scale[self.order, None]
        return ordered


def balance_channels(gate: ir.TensorProtocol, up: ir.TensorProtocol, down: ir.TensorProtocol) -> Balance:
    """How to scale and sort the channels of ``gate``, ``up`` [hidden, channels] and ``down`` [channels, out]."""
    size = np.linalg.norm(gate.numpy(), axis=0) * np.linalg.norm(up.numpy(), axis=0)
    scale = compute_equal_scales(size, np.linalg.norm(down.numpy(), axis=1))
    # Stable, so that equal channels keep their order: the check of the quantised graph sorts them again.
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
    for left, right in (mul.inputs, mul.inputs[::-1]):  # exporters put the activation on either side
        up = right.producer() if right is not None else None
        if up is None or not is_product(up) or _list_uses(up.outputs[0]) != {mul}:
            continue
        gate = _find_source_product(left, mul)
        if gate is not None and gate is not up:
            return gate, up, down
    return None


def _find_source_product(value: ir.Value | None, end: ir.Node) -> ir.Node | None:
    """The one product from which ``value`` comes through element-wise operators that only ``end`` uses; else None."""
    # Walk back from ``value`` to the products. A constant on the way must be a scalar: one with a number for each
    # channel would have to be reordered, too.
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
    # Nothing outside may read what is reordered.
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
    """The nodes that read a value, and None if the graph returns it."""
    return {use.node for use in value.uses()} | ({None} if value.is_graph_output() else set())  # type: ignore[arg-type]


def get_product_weight(product: ir.Node) -> Floats:
    """The weight of a product, [inputs, outputs]."""
    return get_constant_tensor(product.inputs[1]).numpy()
