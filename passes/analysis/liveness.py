"""liveness: find the values on which the model's output depends, and so the axes whose cut has an effect.

Some values never reach the output (a compressor whose window is longer than the example, an unused branch). A cut of
their axes would have no effect on the example, so it could not be proven. Such axes are not offered.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence

from torch import Tensor, fx

from mptk.ir.axes import Axis, axes_in
from mptk.ir.axis_facts import AxisFacts
from mptk.ir.ops import base_name, named_argument, reached, result_shape, shape_of


def live_axes(facts: AxisFacts) -> set[Axis]:
    """Axes of values between the input and the output, and axes that calls between them sum over."""
    reached = reaching(facts.graph, facts.writes)
    found = axes_in(product.axis for product in facts.contractions if {product.node, product.left[0]} <= reached)
    found |= axes_in(reduction.axis for reduction in facts.reductions if reduction.node in reached)
    seen = facts.activations & reached
    return found.union(*(facts.axes(node) for node in facts.results if node in seen))


def reaching(graph: fx.Graph, writes: Mapping[fx.Node, Sequence[fx.Node]]) -> set[fx.Node]:
    """The nodes with a value that is not empty and reaches the output through calls and ``writes`` in place."""
    writers: dict[fx.Node, list[fx.Node]] = {}
    for node, changed in writes.items():
        for value in changed:
            writers.setdefault(value, []).append(node)

    def sources(node: fx.Node) -> list[fx.Node]:
        return [source for source in (*_sources(node), *writers.get(node, ())) if not _empty(source)]

    return reached([graph.output_node()], sources)


SHAPE_ONLY = ("zeros_like", "ones_like", "full_like", "empty_like", "new_zeros", "new_ones", "new_full", "new_empty")


def _sources(node: fx.Node) -> list[fx.Node]:
    """The operands whose values change the result: not if only the shape counts, or if the call chooses from one."""
    if node.target is operator.getitem and node.args[1] == 1:
        source = node.all_input_nodes[0]
        return [] if _op(source) in ("topk", "sort", "max", "min") and _lone(source) else [source]
    op = _op(node)
    if op in SHAPE_ONLY or (op in ("softmax", "argmax", "argmin") and _lone(node)):
        return []
    if op == "scaled_dot_product_attention" and result_shape(named_argument(node, "key"))[-2] == 1:
        return [named_argument(node, "value")]
    return node.all_input_nodes


def _op(node: fx.Node) -> str:
    return base_name(node.target) if node.op == "call_function" else ""


def _lone(node: fx.Node) -> bool:
    """Whether the dimension from which the call chooses has one position."""
    value, dim = node.all_input_nodes[0].meta["val"], named_argument(node, "dim", -1)
    return isinstance(value, Tensor) and isinstance(dim, int) and value.ndim > 0 and shape_of(value)[dim] == 1


def _empty(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and 0 in shape_of(value)
