"""reach: which values the model's output depends on, and so which axes a cut would be seen in at all.

An axis of values that never reach the output (a compressor whose window is longer than the example, an unused branch)
could be cut without any effect on the example, which proves nothing: such axes are not offered.
"""

from __future__ import annotations

from torch import Tensor, fx

from mptk.axes import Axis, leaves
from passes.propagate import Walk, mutated, shape_of


def live_axes(walk: Walk) -> set[Axis]:
    """Axes of values that depend on the input and reach the output, and axes that are summed over on the way."""
    reached = reaching(walk.program.graph.graph)
    found = {leaf for c in walk.contractions if c.node in reached for leaf in leaves(c.axis)}
    found |= {leaf for r in walk.reductions if r.node in reached for leaf in leaves(r.axis)}
    for node, dims in walk.dims.items():
        if node in walk.activation and node in reached:
            several = dims if isinstance(dims, list) else [dims]
            found |= {leaf for value in several if value is not None for d in value for leaf in leaves(d)}
    return found


def reaching(graph: fx.Graph) -> set[fx.Node]:
    """The nodes whose value, not being empty, reaches the output: through calls, and through writes in place."""
    writers: dict[fx.Node, list[fx.Node]] = {}
    for node in graph.nodes:
        pending = mutated(node)
        while pending:
            target = pending.pop()
            writers.setdefault(target, []).append(node)
            pending += mutated(target, views=True)
    found: set[fx.Node] = set()
    pending = [node for node in graph.nodes if node.op == "output"]
    while pending:
        node = pending.pop()
        if node not in found and not _empty(node):
            found.add(node)
            pending += [*node.all_input_nodes, *writers.get(node, [])]
    return found


def _empty(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and 0 in shape_of(value)
