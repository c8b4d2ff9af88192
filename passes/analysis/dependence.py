"""dependence: which values depend on a program's weights and on the user's inputs, and which may share memory.

A write in place changes its target, every value of which the target is a view, and every view of either, made before or
after the write. So values that may share memory form classes, and a write counts for the whole class.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import networkx as nx
from torch import Tensor, fx
from torch.export.graph_signature import InputKind, InputSpec, OutputKind
from torch.fx.node import Argument

from mptk.ir import Program, find_aliased_arguments, name_base_op, name_op


@dataclass(frozen=True)
class Dependence:
    """The values of a program by what they depend on.

    Attributes:
        variables: values that depend on a weight or a cache. Only their axes can be cut.
        activations: values that depend on the user's inputs.
        data: values that depend on floating-point inputs other than caches.
        caches: input that the model continues → the output that continues it.
    """

    variables: set[fx.Node]
    activations: set[fx.Node]
    data: set[fx.Node]
    caches: Mapping[fx.Node, fx.Node]


def find_dependence(program: Program, writes: Mapping[fx.Node, Sequence[fx.Node]]) -> Dependence:
    """Follow weights and inputs through calls and ``writes`` in place (call → the values it may change)."""
    # Calls whose value is not a tensor (sizes) carry no dependence: they do not change with a weight's numbers. A write
    # makes all that shares its target's memory depend on it.
    flow: nx.DiGraph[fx.Node | str] = nx.DiGraph()
    for node in program.graph.graph.nodes:
        if node.op != "placeholder" and isinstance(node.meta.get("val"), (Tensor, list, tuple)):
            flow.add_edges_from((source, node) for source in node.all_input_nodes)
            flow.add_edges_from((node, changed) for changed in writes.get(node, ()))
    caches = find_caches(program)
    weights = {s.arg.name for s in program.signature.input_specs if _is_weight(program, s)}
    user = set(program.user_inputs)
    inputs = [n for n in program.list_placeholders() if n.name in user]
    return Dependence(
        variables=_find_dependents(flow, [n for n in program.list_placeholders() if n.name in weights or n in caches]),
        activations=_find_dependents(flow, inputs),
        data=_find_dependents(flow, [n for n in inputs if n not in caches and _is_floating(n)]),
        caches=caches,
    )


def _find_dependents(flow: nx.DiGraph[fx.Node | str], sources: Iterable[fx.Node]) -> set[fx.Node]:
    """The sources and all values that depend on them."""
    # One search from an extra node in place of one from each source.
    flow.add_edges_from(("start", source) for source in sources)
    found = nx.descendants(flow, "start") if "start" in flow else set()
    flow.remove_nodes_from(["start"])
    return {node for node in found if isinstance(node, fx.Node)}


def _is_weight(program: Program, spec: InputSpec) -> bool:
    """Whether an input is a parameter or a saved floating-point buffer, like the statistics of a batch norm.

    Buffers that are not saved are rotary tables, masks and the like: constants, which each use may cut in its own way.
    """
    if spec.kind is InputKind.PARAMETER:
        return True
    weight = program.state.find_like(program.weights[spec.arg.name]) if spec.kind is InputKind.BUFFER else None
    return weight is not None and bool(spec.persistent) and weight.is_floating_point()


def _is_floating(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.is_floating_point()


def find_caches(program: Program) -> dict[fx.Node, fx.Node]:
    """Input → the output that continues it: a concatenation of the input with new values.

    Such an input holds the model's own earlier values, so it has the axes of the weights that made them.
    """
    # The first output is the model's result; caches come after it.
    outputs = [s.arg.name for s in program.signature.output_specs if s.kind is OutputKind.USER_OUTPUT][1:]
    inputs = set(program.user_inputs)
    found: dict[fx.Node, fx.Node] = {}
    for node in program.graph.graph.nodes:
        if node.name in outputs and name_op(node).startswith("aten.cat"):
            found |= {source: node for source in node.all_input_nodes if source.name in inputs}
    return found


# ---- writes in place ----

MAY_BE_ITS_OPERAND = frozenset({"dropout", "feature_dropout", "alpha_dropout", "type_as", "broadcast_tensors"})
"""Ops that may return their operand itself, although their schema does not say so."""


def find_writes(graph: fx.Graph) -> Mapping[fx.Node, Sequence[fx.Node]]:
    """Each call that writes in place → all values whose memory it may change, in the graph's order."""
    # Most graphs write nothing, and the classes of large ones take a while.
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
    # Results of a call with several share the call's memory only if that shares memory with an operand (split, chunk).
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
