"""dependence: find the values that depend on a program's weights, and the values that depend on the user's inputs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import networkx as nx
from torch import Tensor, fx
from torch.export.graph_signature import InputKind, InputSpec, OutputKind

from mptk.ir.ops import name_op
from mptk.ir.program import Program


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
    flow.add_edges_from(("start", source) for source in sources)
    found = nx.descendants(flow, "start") if "start" in flow else set()
    flow.remove_nodes_from(["start"])
    return {node for node in found if isinstance(node, fx.Node)}


def _is_weight(program: Program, spec: InputSpec) -> bool:
    """Whether an input is a parameter or a saved floating-point buffer."""
    if spec.kind is InputKind.PARAMETER:
        return True
    weight = program.state.like(program.weights[spec.arg.name]) if spec.kind is InputKind.BUFFER else None
    return weight is not None and bool(spec.persistent) and weight.is_floating_point()


def _is_floating(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.is_floating_point()


def find_caches(program: Program) -> dict[fx.Node, fx.Node]:
    """Input → the output that continues it: a concatenation of the input with new values.

    Such an input holds the model's own earlier values, so it has the axes of the weights that made them.
    """
    outputs = [s.arg.name for s in program.signature.output_specs if s.kind is OutputKind.USER_OUTPUT][1:]
    inputs = set(program.user_inputs)
    found: dict[fx.Node, fx.Node] = {}
    for node in program.graph.graph.nodes:
        if node.name in outputs and name_op(node).startswith("aten.cat"):
            found |= {source: node for source in node.all_input_nodes if source.name in inputs}
    return found
