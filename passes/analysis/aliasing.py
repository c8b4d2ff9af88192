"""aliasing: which values of a graph may share memory, and which calls write to it.

A write in place changes the value that is written to, every value that it is a view of, and every view that was made
of either, before the write or after it. So views are gathered in classes, and a write counts for the whole class.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import networkx as nx
from torch import fx

from mptk.compat.torch import schema
from mptk.ir.ops import base_name

Memory = Mapping[fx.Node, Sequence[fx.Node]]
"""Node → all nodes that may share its memory, itself among them, in the graph's order."""

MAY_BE_ITS_OPERAND = frozenset({"dropout", "feature_dropout", "alpha_dropout", "type_as", "broadcast_tensors"})
"""Ops that may return their operand itself although their schema does not say so."""


def memory_classes(graph: fx.Graph) -> Memory:
    """The nodes that may share memory: views, results of writes in place, and what views with several results give."""
    shares: nx.Graph[fx.Node] = nx.Graph()
    shares.add_nodes_from(graph.nodes)
    for node in graph.nodes:
        shares.add_edges_from((node, source) for source in _shared(node))
    order = {node: i for i, node in enumerate(graph.nodes)}
    classes = (sorted(found, key=order.__getitem__) for found in nx.connected_components(shares))
    return {node: found for found in classes for node in found}


def written(node: fx.Node) -> list[fx.Node]:
    """The arguments that a call writes to."""
    return _at(node, _positions(node.target, writes=True))


def _shared(node: fx.Node) -> list[fx.Node]:
    """The arguments that the result may share memory with."""
    if node.target is operator.getitem:
        source = node.args[0]
        assert isinstance(source, fx.Node)
        return [source] if _shared(source) else []
    if node.op == "call_function" and base_name(node.target) in MAY_BE_ITS_OPERAND:
        return node.all_input_nodes[:1]
    return _at(node, _positions(node.target, writes=False))


def _at(node: fx.Node, positions: Sequence[int]) -> list[fx.Node]:
    flat = (a for p in positions if p < len(node.args) for a in flatten(node.args[p]))
    return [a for a in flat if isinstance(a, fx.Node)]


@functools.cache
def _positions(target: Any, *, writes: bool) -> tuple[int, ...]:
    """Positions of the arguments that the op's schema says are written to, or else shared with the result at all."""
    signature = schema(target)
    infos = [a.alias_info for a in signature.arguments] if signature is not None else []
    return tuple(i for i, info in enumerate(infos) if info is not None and (info.is_write or not writes))


def flatten(value: Any) -> Iterator[Any]:
    """What nested lists and tuples hold."""
    if isinstance(value, (list, tuple)):
        for part in value:
            yield from flatten(part)
    else:
        yield value
