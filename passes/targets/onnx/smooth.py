"""smooth: rescale the channels between an ONNX decoder's norms and products, so that their blocks quantise well.

A norm ends in a scale for each channel. If only products with weights read its result, channel i can be divided by s_i
in the norm and row i of the weights multiplied by s_i. The logits do not change (SmoothQuant, Xiao et al. 2023).
``s = sqrt(a / w)``, divided by its geometric mean, with the root mean square a of the channel and w of its row in all
those weights. A channel is then as large in the activations as in the weights, so it is not an outlier in either.

``a`` is measured on prompts of random tokens in ONNX Runtime, since the large channels depend on the model and hardly
on the text. It is measured on the CPU, whatever the device of a run, so that the check of the
quantised graph finds the same scales on any machine.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir

from passes.targets.onnx.balance import compute_equal_scales, get_product_weight, is_product
from passes.targets.onnx.measure import measure_onnx, takes_text_inputs
from passes.targets.onnx.plain_products import add_constant, find_logit_products, is_token_lookup
from passes.targets.onnx.tensors import Floats, get_constant_tensor, make_lazy_tensor, slice_in_parts

PROMPTS = (16, 32)
"""The number of prompts, and of tokens in each: few enough for any table of positions."""


@dataclass(frozen=True)
class SmoothPass(ir.passes.InPlacePass):
    """Move scales of channels from norms into the products that read them, except the output projection.

    A graph that reads more than text stays as it is: random numbers in place of images say nothing of its channels.

    ``source``: the file of the same graph. It is run.
    """

    source: Path

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        if not takes_text_inputs([str(value.name) for value in model.graph.inputs]):
            return ir.passes.PassResult(model, False)
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
    """s by channel, from the activations' root mean squares [inputs] and their weights, each [inputs, outputs].

    A channel that is zero in either keeps its scale.
    """
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
    constants = [_get_constant(node.inputs[i]) for i in indices]
    return indices if all(c is not None and c.size == _count_channels(node.outputs[0]) for c in constants) else []


def _get_constant(value: ir.Value | None) -> ir.TensorProtocol | None:
    return value.const_value if value is not None else None


def _change_input(graph: ir.Graph, node: ir.Node, index: int, scale: Floats, change: Callable[..., Floats]) -> None:
    """Replace an input of a node by ``change(input, scale)``. Other nodes may still read the old one."""
    old = get_constant_tensor(node.inputs[index])
    name = f"{node.outputs[0].name}.smooth.{index}"
    node.replace_input_with(index, add_constant(graph, name, make_lazy_tensor(old, lambda: change(old.numpy(), scale))))
