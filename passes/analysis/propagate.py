"""propagate: give every tensor dimension its axis term, in one walk over the graph.

Values that depend on no parameter (rotary tables, masks, position ids, alibi slopes) are *polymorphic*, like let-bound
values in Hindley–Milner inference: each use gets fresh axes. So a shared table does not tie all layers' heads together.
If the axes of a use are cut, that use selects from the table (``passes/transforms/rewrite.py``).
"""

from __future__ import annotations

import operator

import torch
from torch import Tensor, fx
from torch.fx.node import Argument

from mptk.errors import AnalysisError
from mptk.ir import (
    ArgumentPath,
    AxisFacts,
    Dims,
    Program,
    Results,
    SourceLocation,
    find_argument_at,
    make_axis,
    name_op,
    resolve_result_shape,
    resolve_shape,
    resolve_size,
)
from passes.analysis.dependence import find_dependence, find_writes, list_nodes
from passes.analysis.rules import POINTWISE, load_rules
from passes.analysis.rules.context import RuleContext, Value
from passes.analysis.rules.table import Result, Rule, find_rule, get_single_dims


def propagate(program: Program) -> AxisFacts:
    """Give every dimension of every value of ``program`` its axis term.

    Raises:
        MptkError: an op has no rule. The message names the op, its module, and how to register a rule.
    """
    load_rules()
    return _Walk(program).run()


class _Walk:
    """The state of one walk: the terms of the visited values, and the rules' findings."""

    def __init__(self, program: Program) -> None:
        self.program, self.graph = program, program.graph.graph
        self.writes = find_writes(self.graph)
        self.depends = find_dependence(program, self.writes)
        self.context = RuleContext(program, self.depends)
        self.results: dict[fx.Node, Results] = {}
        self.weights: dict[str, Dims] = {}
        self.constant_uses: dict[fx.Node, list[tuple[ArgumentPath, Dims]]] = {}
        self.notes: dict[fx.Node, object] = {}

    def run(self) -> AxisFacts:
        # All others are constants, which get their axes where they are used (``_convert_argument``).
        for node in self.graph.nodes:
            if node in self.depends.variables:
                self.results[node] = self._visit(node)
        self._freeze_outputs()
        return AxisFacts(
            graph=self.graph,
            results=self.results,
            weights=self.weights,
            constant_uses=self.constant_uses,
            zeros=self._find_zeros(),
            contractions=self.context.contractions,
            reductions=self.context.reductions,
            inner=self.context.inner_values,
            routes=self.context.routes,
            notes=self.notes,
            activations=self.depends.activations,
            caches=self.depends.caches,
            writes=self.writes,
        )

    def _visit(self, node: fx.Node) -> Results:
        if node.op == "placeholder":
            return self._make_input_dims(node)
        if node.target is operator.getitem:
            return self._take(node)
        return self._apply(_choose_rule(node), node)

    def _make_input_dims(self, node: fx.Node) -> Dims:
        """The terms of a weight, of a cache, or of a user's input to which the model writes."""
        # A weight under two placeholders (a tied one) has the same terms for both.
        dims = tuple(make_axis(size) for size in resolve_result_shape(node))
        if node.name in self.program.weights:
            return self.weights.setdefault(self.program.weights[node.name], dims)
        if node not in self.depends.caches:
            self.context.freeze_input(dims, node)
        return dims

    def _take(self, node: fx.Node) -> Dims:
        """One of a call's several results."""
        source, i = node.args
        assert isinstance(source, fx.Node)
        assert isinstance(i, int)
        positions = self.context.positions_in.get(source)
        if isinstance(positions, list):
            self.context.positions_in[node] = positions[i]
        dims = self.results[source][i]
        assert isinstance(dims, tuple)
        return dims

    def _apply(self, rule: Rule, node: fx.Node) -> Results:
        """Apply the rule: return the results' terms, and store its note and positions."""
        if rule.positions == "freeze":
            self.context.freeze_positions(node)
        arguments = [self._convert_argument(node, (i,), a) for i, a in enumerate(node.args)]
        keywords = {name: self._convert_argument(node, (name,), a) for name, a in node.kwargs.items()}
        result = rule.propagate(self.context, node, *arguments, **keywords)
        result = result if isinstance(result, Result) else Result(result)
        _check(node, result.dims)  # a plugin's rule may be wrong
        if result.note is not None:
            self.notes[node] = result.note
        positions = result.positions
        if positions is None and rule.positions == "carry":
            positions = self.context.find_carried_positions(node, result.dims)
        if positions is not None:
            self.context.positions_in[node] = positions
        return result.dims

    def _convert_argument(self, node: fx.Node, path: ArgumentPath, argument: Argument) -> object:
        """An argument as the rule sees it: tensors are values, symbolic sizes are integers."""
        if isinstance(argument, (list, tuple)):
            return [self._convert_argument(node, (*path, i), a) for i, a in enumerate(argument)]
        if not isinstance(argument, fx.Node):
            return argument
        # A size that the graph computes: rules see its value in the example.
        value = argument.meta.get("val")
        if not isinstance(value, Tensor):
            return resolve_size(value) if isinstance(value, (int, torch.SymInt)) else value
        if argument in self.depends.variables:
            return Value(argument, get_single_dims(self.results[argument]))
        # A constant: fresh axes for this use. The user's data cannot be cut; tables and masks can.
        dims = tuple(make_axis(size) for size in resolve_shape(value))
        if argument in self.depends.data:
            self.context.freeze_input(dims, node)
        self.constant_uses.setdefault(node, []).append((path, dims))
        return Value(argument, dims)

    def _find_zeros(self) -> set[fx.Node]:
        """The constants that calls use and that are zero everywhere."""
        used = {find_argument_at(node, path) for node, uses in self.constant_uses.items() for path, _ in uses}
        written = set[fx.Node]().union(*self.writes.values())
        return {node for node in used if self.context.is_zero(node, written)}

    def _freeze_outputs(self) -> None:
        """Freeze the axes of every output except caches, which come back as inputs."""
        for value in list_nodes(self.graph.output_node().args[0]):
            if value in self.depends.variables and value not in self.depends.caches.values():
                positions = self.context.find_positions(value)
                for d in (*get_single_dims(self.results[value]), *([] if positions is None else [positions])):
                    self.context.freeze(d, "it is the model's output", value)


def _choose_rule(node: fx.Node) -> Rule:
    """The op's rule. An op that torch tags as pointwise needs no rule of its own: it ties broadcast axes."""
    found = find_rule(node)
    if found is not None:
        return found
    if torch.Tag.pointwise in getattr(node.target, "tags", ()):
        return POINTWISE
    raise AnalysisError(
        f"no axis rule for {name_op(node)} ({SourceLocation(node)}); register one with mptk.rule, "
        "see docs/adding-an-op.md",
        name=name_op(node),
    )


def _check(node: fx.Node, results: Results) -> None:
    """Check that each result has a term of the traced size for every dimension."""
    value = node.meta.get("val")
    pairs = zip(results, value or (), strict=False) if isinstance(results, list) else [(results, value)]
    for dims, tensor in pairs:
        if dims is not None and isinstance(tensor, Tensor):
            sizes = tuple([d.size for d in dims])
            assert sizes == resolve_shape(tensor), f"rule of {name_op(node)}: {sizes}, not {resolve_shape(tensor)}"
