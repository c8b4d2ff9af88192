"""reach: which values the model's output depends on, and so which axes a cut would be seen in at all.

An axis of values that never reach the output (a compressor whose window is longer than the example, an unused branch)
could be cut without any effect on the example, which proves nothing: such axes are not offered.
"""

from __future__ import annotations

import operator

from torch import Tensor, fx

from mptk.ir.axes import Axis, leaves
from mptk.ir.ops import base_name, named_argument
from passes.analysis.aliasing import memory_classes, written
from passes.analysis.propagate import Walk, shape_of


def live_axes(walk: Walk) -> set[Axis]:
    """Axes of values that depend on the input and reach the output, and axes that are summed over on the way."""
    reached = reaching(walk.program.graph.graph)
    summed = (c for c in walk.contractions if {c.node, c.left[0]} <= reached)
    found = {leaf for c in summed for leaf in leaves(c.axis)}
    found |= {leaf for r in walk.reductions if r.node in reached for leaf in leaves(r.axis)}
    for node in walk.dims:
        if node in walk.activation and node in reached:
            found |= walk.axes_of(node)
    return found


def reaching(graph: fx.Graph) -> set[fx.Node]:
    """The nodes whose value, not being empty, reaches the output: through calls, and through writes in place."""
    memory = memory_classes(graph)
    writers: dict[fx.Node, list[fx.Node]] = {}
    for node in graph.nodes:
        for target in written(node):
            for alias in memory[target]:
                writers.setdefault(alias, []).append(node)
    found: set[fx.Node] = set()
    pending = [node for node in graph.nodes if node.op == "output"]
    while pending:
        node = pending.pop()
        if node not in found and not _empty(node):
            found.add(node)
            pending += [*_sources(node), *writers.get(node, [])]
    return found


SHAPE_ONLY = ("zeros_like", "ones_like", "full_like", "empty_like", "new_zeros", "new_ones", "new_full", "new_empty")


def _sources(node: fx.Node) -> list[fx.Node]:
    """The operands on whose values the result depends: not those of which only the shape counts, or one choice."""
    if node.target is operator.getitem and node.args[1] == 1:
        source = node.args[0]
        assert isinstance(source, fx.Node)
        return [] if _op(source) in ("topk", "sort", "max", "min") and _lone(source) else [source]
    op = _op(node)
    if op in SHAPE_ONLY or (op in ("softmax", "argmax", "argmin") and _lone(node)):
        return []
    if op == "scaled_dot_product_attention" and shape_of(node.args[1].meta["val"])[-2] == 1:  # type: ignore[union-attr]
        return [node.args[2]]  # type: ignore[list-item]
    return node.all_input_nodes


def _op(node: fx.Node) -> str:
    return base_name(node.target) if node.op == "call_function" else ""


def _lone(node: fx.Node) -> bool:
    """Whether the dimension that is chosen from has one position."""
    value, dim = node.all_input_nodes[0].meta["val"], named_argument(node, "dim", -1)
    return isinstance(value, Tensor) and isinstance(dim, int) and value.ndim > 0 and shape_of(value)[dim] == 1


def _empty(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and 0 in shape_of(value)
