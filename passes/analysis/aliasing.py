"""aliasing: find the values of a graph that may share memory, and the values that a write in place may change.

A write in place changes its target, every value of which the target is a view, and every view of either, made before or
after the write. So values that may share memory form classes, and a write counts for the whole class.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Sequence

import networkx as nx
from torch import fx
from torch.fx.node import Argument

from mptk.ir.ops import find_aliased_arguments, name_base_op

MAY_BE_ITS_OPERAND = frozenset({"dropout", "feature_dropout", "alpha_dropout", "type_as", "broadcast_tensors"})
"""Ops that may return their operand itself, although it is not in their schema."""


def find_writes(graph: fx.Graph) -> Mapping[fx.Node, Sequence[fx.Node]]:
    """Each call that writes in place → all values whose memory it may change, in the graph's order."""
    targets = {node: found for node in graph.nodes if (found := _find_aliased_nodes(node, writes=True))}
    if not targets:
        return {}
    classes = find_memory_classes(graph)
    return {node: [alias for target in found for alias in classes[target]] for node, found in targets.items()}


def find_memory_classes(graph: fx.Graph) -> Mapping[fx.Node, Sequence[fx.Node]]:
    """Node → all nodes that may share its memory, itself included, in the graph's order.

    These are views, single results of views with several results, and results of writes in place.
    """
    shares: nx.Graph[fx.Node] = nx.Graph()
    shares.add_nodes_from(graph.nodes)
    for node in graph.nodes:
        shares.add_edges_from((node, source) for source in _find_memory_sources(node))
    order = {node: i for i, node in enumerate(graph.nodes)}
    classes = (sorted(found, key=order.__getitem__) for found in nx.connected_components(shares))
    return {node: found for found in classes for node in found}


def _find_memory_sources(node: fx.Node) -> list[fx.Node]:
    """The arguments whose memory the result may share."""
    if node.target is operator.getitem:
        source = node.args[0]
        assert isinstance(source, fx.Node)
        return [source] if _find_memory_sources(source) else []
    if node.op == "call_function" and name_base_op(node.target) in MAY_BE_ITS_OPERAND:
        return node.all_input_nodes[:1]
    return _find_aliased_nodes(node, writes=False)


def _find_aliased_nodes(node: fx.Node, *, writes: bool) -> list[fx.Node]:
    """The nodes in arguments to which the call writes, or in those whose memory its result may share."""
    positions = find_aliased_arguments(node.target, writes=writes)
    return [a for p in positions if p < len(node.args) for a in list_nodes(node.args[p])]


def list_nodes(value: Argument) -> Iterator[fx.Node]:
    """The nodes in an argument, which may be nested lists, in order and with repeats."""
    if isinstance(value, fx.Node):
        yield value
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from list_nodes(part)
