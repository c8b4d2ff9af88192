"""rewrite: Program + plan → a smaller Program with sliced weights and corrected shape constants."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, fx

from mptk.compat.torch import FakeTensorMode, enable_python_dispatcher
from mptk.errors import ProofError, take_first_line
from mptk.ir import Analysis, Cut, Pass, PassResult, Plan, Program, SourceLocation, list_state_shapes, resolve_plan
from mptk.staged.partition import find_vmap_levels
from passes.analysis.rules.resizer import Resizer
from passes.analysis.rules.table import find_rule


def rewrite_program(analysis: Analysis, plan: Plan) -> Program:
    """Cut ``analysis.program`` to ``plan``.

    Each size in the graph is recomputed from the axis term of the value that it shapes. Weights are sliced. A constant
    that loses positions is indexed at each use. A family that keeps all its units changes nothing.

    Raises:
        MptkError: the plan does not fit the model (unknown family or layer, illegal width).
        ProofError: the cut graph's sizes do not fit together.
    """
    return Rewrite(analysis, resolve_plan(analysis, plan))(analysis.program).program


@dataclass(frozen=True)
class Rewrite(Pass):
    """Cut the graph's sizes and the weights to a plan."""

    analysis: Analysis
    cut: Cut
    name: ClassVar[str] = "rewrite"

    def requires(self, program: Program) -> None:
        """The program is the analysed one."""
        assert program.graph is self.analysis.program.graph, "the analysis is of another program"

    def run(self, program: Program) -> PassResult:
        # The graph's own numbers, then the weights, then the values' shapes, which check that both fit together.
        resizer = Resizer(self.analysis.facts, self.cut, program.copy_graph())
        _resize(resizer)
        cut = {
            name: partial(self.cut.slice, dims=dims)
            for name, dims in self.analysis.weights.items()
            if any(map(self.cut.has_choice, dims))
        }
        state = program.state.with_edits(cut, moves=True)
        result = replace(program.with_graph(resizer.graph), state=state)
        propagate_shapes(result, resizer.find_untouched(), resizer.cut_caches())
        sliced = sum(like.shape != state.find_like(name).shape for name, like in program.state.likes.items())
        return PassResult(result, self.cut.removes, (f"{sliced} weights sliced",) if sliced else ())

    def ensures(self, before: Program, after: Program) -> None:
        """Each weight has the shape that the plan gives it; weights outside the plan keep theirs."""
        planned = {n: tuple(map(self.cut.size, dims)) for n, dims in self.analysis.weights.items()}
        assert list_state_shapes(after) == {**list_state_shapes(before), **planned}, (
            "a weight's shape is not the planned shape"
        )


def _resize(resizer: Resizer) -> None:
    """Let the rule of each call adapt it, and select from constants that lose positions."""
    facts, graph = resizer.facts, resizer.graph
    written_to = {value for changed in facts.writes.values() for value in changed}
    for node in list(graph.graph.nodes):
        original = resizer.original.get(node.name)
        if original is None or original not in facts.results or node.op != "call_function":
            continue
        resizer.select_constants(node, original)
        found = find_rule(node)
        if found is not None and found.resize is not None:
            found.resize(resizer, node)
        # A slice of another width may have strides that no view takes. A view that is written to must stay one.
        if str(node.target) == "aten.view.default" and original not in written_to:
            node.target = torch.ops.aten.reshape.default
    graph.graph.lint()
    graph.recompile()


def propagate_shapes(program: Program, untouched: Collection[str] = (), changed: Collection[str] = ()) -> None:
    """Recompute every node's example value (``meta["val"]``) from the program's weights.

    Args:
        program: changed in place.
        untouched: names of calls that are skipped if none of their inputs has changed.
        changed: names of user inputs whose example value has changed.

    Raises:
        ProofError: the sizes do not fit together.
    """
    # All values are fake tensors of one mode, whose symbolic sizes they share.
    placeholders = list(program.list_placeholders())
    modes = [n.meta["val"].fake_mode for n in placeholders if hasattr(n.meta.get("val"), "fake_mode")]
    mode: FakeTensorMode = modes[0]
    values: list[object] = []
    weights = program.weights
    unchanged: set[fx.Node] = set()
    for node in placeholders:
        # A placeholder is unchanged if its shape is. Then calls on only such values keep theirs, and are not run.
        tensor = program.state.find_like(weights[node.name]) if node.name in weights else None
        if tensor is None:
            unchanged.update(() if node.name in changed else (node,))
        elif tensor.shape == node.meta["val"].shape:
            unchanged.add(node)
        else:
            with mode:
                node.meta["val"] = node.meta["val"].new_empty(tuple(tensor.shape))
        values.append(node.meta["val"])
    interpreter = _ShapeInterpreter(program.graph, untouched, unchanged)
    try:
        # Some kernels know symbolic sizes only in Python.
        with torch.no_grad(), mode, enable_python_dispatcher():
            interpreter.run(*values)
    except RuntimeError as error:
        reason, place = take_first_line(error), SourceLocation(interpreter.node)
        raise ProofError(
            f"the cut graph does not fit together at {place}: {reason}; please report it", name=place
        ) from error


class _ShapeInterpreter(fx.Interpreter):
    """Runs only the calls that a cut affects."""

    def __init__(self, graph: fx.GraphModule, untouched: Collection[str], unchanged: set[fx.Node]) -> None:
        super().__init__(graph)
        self.untouched, self.unchanged = untouched, unchanged
        self.node: fx.Node = next(iter(graph.graph.nodes))
        self.levels = {level[0]: level for level in find_vmap_levels(graph.graph)}
        self.opened: set[fx.Node] = set()
        """Calls under a ``torch.vmap`` that is run: each is, since their old values are of a level that is closed."""

    def run_node(self, n: fx.Node) -> object:
        self.node = n
        if n.op != "call_function":
            return super().run_node(n)
        # A level of ``torch.vmap`` runs whole or not at all.
        if not self._is_unaffected(self.levels.get(n, [n])):
            self.opened.update(self.levels.get(n, ()))
        if n not in self.opened and self._is_unaffected([n]):
            self.unchanged.add(n)
            return n.meta.get("val")
        # The result may be as before (a cut that a sum ends): then what reads it is not affected.
        result = super().run_node(n)
        if n not in self.opened and _is_equivalent(result, n.meta.get("val")):
            self.unchanged.add(n)
        n.meta["val"] = result
        return result

    def _is_unaffected(self, calls: Sequence[fx.Node]) -> bool:
        """Whether calls that follow each other need not be run: neither they nor what they get from others changed."""
        own = set(calls)
        return all(
            n.name in self.untouched and all(s in self.unchanged or s in own for s in n.all_input_nodes) for n in calls
        )


def _is_equivalent(a: object, b: object) -> bool:
    """Whether a call does the same with either example value: tensors of one layout, or equal numbers."""
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(_is_equivalent, a, b))
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)
    return type(a) is type(b) and not isinstance(a, torch.SymInt) and bool(a == b)
