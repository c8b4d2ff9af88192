"""liveness: find the values on which the model's output depends, and so the axes whose cut has an effect.

Some values never reach the output (a compressor whose window is longer than the example, an unused branch). A cut of
their axes would have no effect on the example, so it could not be proven. Such axes are not offered.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence

from torch import Tensor, fx

from mptk.ir.axes import Axis, collect_axes
from mptk.ir.axis_facts import AxisFacts
from mptk.ir.ops import find_reachable, get_argument, name_base_op, resolve_result_shape, resolve_shape


def find_live_axes(facts: AxisFacts) -> set[Axis]:
    """Axes of values between the input and the output, and axes that calls between them sum over."""
    reached = find_live_nodes(facts.graph, facts.writes)
    found = collect_axes(product.axis for product in facts.contractions if {product.node, product.left[0]} <= reached)
    found |= collect_axes(reduction.axis for reduction in facts.reductions if reduction.node in reached)
    seen = facts.activations & reached
    return found.union(*(facts.axes(node) for node in facts.results if node in seen))


def find_live_nodes(graph: fx.Graph, writes: Mapping[fx.Node, Sequence[fx.Node]]) -> set[fx.Node]:
    """The nodes with a value that is not empty and reaches the output through calls and ``writes`` in place."""
    writers: dict[fx.Node, list[fx.Node]] = {}
    for node, changed in writes.items():
        for value in changed:
            writers.setdefault(value, []).append(node)

    def sources(node: fx.Node) -> list[fx.Node]:
        return [
            source for source in (*_find_value_sources(node), *writers.get(node, ())) if not _is_empty_tensor(source)
        ]

    return find_reachable([graph.output_node()], sources)


SHAPE_ONLY = ("zeros_like", "ones_like", "full_like", "empty_like", "new_zeros", "new_ones", "new_full", "new_empty")


def _find_value_sources(node: fx.Node) -> list[fx.Node]:
    """The operands whose values change the result: not if only the shape counts, or if the call chooses from one."""
    if node.target is operator.getitem and node.args[1] == 1:
        source = node.all_input_nodes[0]
        return [] if _name_op(source) in ("topk", "sort", "max", "min") and _has_one_position(source) else [source]
    op = _name_op(node)
    if op in SHAPE_ONLY or (op in ("softmax", "argmax", "argmin") and _has_one_position(node)):
        return []
    if op == "scaled_dot_product_attention" and resolve_result_shape(get_argument(node, "key"))[-2] == 1:
        return [get_argument(node, "value")]
    return node.all_input_nodes


def _name_op(node: fx.Node) -> str:
    return name_base_op(node.target) if node.op == "call_function" else ""


def _has_one_position(node: fx.Node) -> bool:
    """Whether the dimension from which the call chooses has one position."""
    value, dim = node.all_input_nodes[0].meta["val"], get_argument(node, "dim", -1)
    return isinstance(value, Tensor) and isinstance(dim, int) and value.ndim > 0 and resolve_shape(value)[dim] == 1


def _is_empty_tensor(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and 0 in resolve_shape(value)
