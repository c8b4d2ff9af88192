"""rewrite: Program + plan → a smaller Program with sliced weights and corrected shape constants."""

from __future__ import annotations

import operator
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, fx
from torch.fx.node import Argument

from mptk.compat.torch import FakeTensorMode, enable_python_dispatcher
from mptk.errors import ProofError
from mptk.ir.axes import Term, resolve
from mptk.ir.axis_facts import AxisFacts, Dims, Note, Path, argument_at
from mptk.ir.families import Analysis
from mptk.ir.passes import Pass, Result, shapes
from mptk.ir.plan import Plan
from mptk.ir.program import Program
from mptk.ir.resolved_plan import Cut, resolve_plan
from mptk.ir.source_location import SourceLocation
from mptk.staged.partition import levels
from passes.analysis.rules.table import find_rule

_SCALE = "mptk_scale"
"""The key of ``scale_of`` in a node's metadata, which copies of the graph keep."""


def rewrite(analysis: Analysis, plan: Plan) -> Program:
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

    def run(self, program: Program) -> Result:
        resizer = Resizer(self.analysis.facts, self.cut, program.copy_graph())
        resizer.run()
        cut = {
            name: partial(self.cut.slice, dims=dims)
            for name, dims in self.analysis.weights.items()
            if any(map(self.cut.touches, dims))
        }
        state = program.state.changed(cut, moves=True)
        result = replace(program, graph=resizer.graph, state=state)
        propagate_shapes(result, resizer.untouched(), resizer.cut_caches())
        sliced = sum(like.shape != state.like(name).shape for name, like in program.state.likes.items())
        return Result(result, self.cut.removes, (f"{sliced} weights sliced",) if sliced else ())

    def ensures(self, before: Program, after: Program) -> None:
        """Each weight has the shape that the plan gives it; weights outside the plan keep theirs."""
        planned = {n: tuple(map(self.cut.size, dims)) for n, dims in self.analysis.weights.items()}
        assert shapes(after) == {**shapes(before), **planned}, "a weight's shape is not the planned shape"


@dataclass
class Resizer:
    """Edits a copy of the graph. The rules' ``resize`` functions get it as their argument."""

    facts: AxisFacts
    cut: Cut
    graph: fx.GraphModule

    def __post_init__(self) -> None:
        self.original = {n.name: n for n in self.facts.graph.nodes}

    def run(self) -> None:
        written_to = {value for changed in self.facts.writes.values() for value in changed}
        for node in list(self.graph.graph.nodes):
            original = self.original.get(node.name)
            if original is None or original not in self.facts.results or node.op != "call_function":
                continue
            self._select_constants(node, original)
            found = find_rule(node)
            if found is not None and found.resize is not None:
                found.resize(self, node)
            if str(node.target) == "aten.view.default" and original not in written_to:
                node.target = torch.ops.aten.reshape.default
        self.graph.graph.lint()
        self.graph.recompile()

    def untouched(self) -> set[str]:
        """Names of the calls that did not change: same target, same arguments."""
        return {n.name for n in self.graph.graph.nodes if n.name in self.original and self._same(n)}

    def cut_caches(self) -> set[str]:
        """Give the cache inputs that lose channels their new shape. Returns their names."""
        names = set()
        for node in self.graph.graph.find_nodes(op="placeholder"):
            original = self.original[node.name]
            if original in self.facts.caches and any(map(self.changed, self.facts.dims(original))):
                value = node.meta["val"]
                pairs = zip(value.shape, self.facts.dims(original), strict=True)
                sizes = [self.size(term) if self.changed(term) else size for size, term in pairs]
                with value.fake_mode:
                    node.meta["val"] = value.new_empty(sizes)
                names.add(node.name)
        return names

    def _same(self, node: fx.Node) -> bool:
        original = self.original[node.name]
        names = [fx.map_arg((n.args, n.kwargs), lambda source: source.name) for n in (node, original)]
        viewed = node.target is torch.ops.aten.reshape.default and str(original.target) == "aten.view.default"
        return names[0] == names[1] and (node.target == original.target or viewed)

    # ---- for rules ----

    def dims(self, node: fx.Node) -> Dims:
        """The terms of a node's result in the dense graph."""
        return self.facts.dims(self.original[node.name])

    def note(self, node: fx.Node, kind: type[Note]) -> Note | None:
        """What the op's axis rule noted for its resizing, if it is of this kind."""
        return self.facts.note(self.original[node.name], kind)

    def size(self, term: Term) -> int:
        """The size of a dimension after the cut."""
        return self.cut.size(term)

    def changed(self, term: Term) -> bool:
        return self.cut.size(term) != term.size

    def scaled(self, argument: Argument, term: Term) -> Argument:
        """A size argument after the cut. −1 stays; a symbolic size that also counts channels is scaled."""
        if not self.changed(term) or argument == -1:
            return argument
        if isinstance(argument, int):
            return self.size(term)
        if isinstance(argument, fx.Node):
            with self.graph.graph.inserting_after(argument):
                scaled = self.graph.graph.call_function(operator.mul, (argument, self.size(term)))
            with self.graph.graph.inserting_after(scaled):
                return self.graph.graph.call_function(operator.floordiv, (scaled, term.size))
        return argument

    def replace(self, node: fx.Node, op: str, arguments: tuple[Argument, ...]) -> None:
        """Make ``node`` another call."""
        _, name, overload = op.split(".")
        node.target = getattr(getattr(torch.ops.aten, name), overload)
        node.args, node.kwargs = arguments, {}

    def scale(self, node: fx.Node, factor: float) -> None:
        """Multiply the result of ``node`` by ``factor`` for all its users."""
        with self.graph.graph.inserting_after(node):
            scaled = self.graph.graph.call_function(torch.ops.aten.mul.Tensor, (node, factor))
        scaled.meta[_SCALE] = factor
        node.replace_all_uses_with(scaled, delete_user_cb=lambda user: user is not scaled)

    def index(self, before: fx.Node, positions: Sequence[int]) -> fx.Node:
        """A constant index of ``positions``, for use in ``before``."""
        with self.graph.graph.inserting_before(before):
            return _index_of(self.graph.graph, positions)

    def copy(self, before: fx.Node, source: fx.Node) -> fx.Node:
        """A contiguous copy of ``source``, for use in ``before``."""
        with self.graph.graph.inserting_before(before):
            return self.graph.graph.call_function(
                torch.ops.aten.clone.default, (source,), {"memory_format": torch.contiguous_format}
            )

    def epsilon(self, node: fx.Node) -> float:
        """The default epsilon of a norm: that of the type in which it computes, float32 or wider."""
        dtype = self.original[node.name].meta["val"].dtype
        return torch.finfo(torch.promote_types(dtype, torch.float32)).eps

    # ---- constants ----

    def _select_constants(self, node: fx.Node, original: fx.Node) -> None:
        """If the cut shortens the axes of a constant, index the constant at this use."""
        for path, dims in self.facts.constant_uses.get(original, []):
            for d, term in enumerate(dims):
                if self.cut.touches(term):
                    source = argument_at(node, path)
                    _put(node, path, self._select(node, source, d, term))

    def _select(self, before: fx.Node, source: fx.Node, dim: int, term: Term) -> fx.Node:
        index = self.index(before, self.cut.positions(resolve(term)).tolist())
        with self.graph.graph.inserting_before(before):
            return self.graph.graph.call_function(torch.ops.aten.index_select.default, (source, dim, index))


def scale_of(node: fx.Node) -> float | None:
    """The number that ``Resizer.scale`` multiplies by in ``node``; None for any other node."""
    factor: float | None = node.meta.get(_SCALE)
    return factor


def _index_of(graph: fx.Graph, positions: Sequence[int]) -> fx.Node:
    """A constant index as graph nodes: one range if the positions are contiguous, else a concatenation of ranges."""
    ranges: list[list[int]] = []
    for position in positions:
        if ranges and position == ranges[-1][1]:
            ranges[-1][1] = position + 1
        else:
            ranges.append([position, position + 1])
    parts = [
        graph.call_function(torch.ops.aten.arange.start, (a, b), {"dtype": torch.int64, "device": torch.device("cpu")})
        for a, b in ranges
    ]
    return parts[0] if len(parts) == 1 else graph.call_function(torch.ops.aten.cat.default, (parts,))


def _put(node: fx.Node, path: Path, new: fx.Node) -> None:
    def put(value: Argument, steps: Path) -> Argument:
        if not steps:
            return new
        assert isinstance(value, (list, tuple))
        return [put(v, steps[1:]) if i == steps[0] else v for i, v in enumerate(value)]

    if isinstance(path[0], str):
        node.update_kwarg(path[0], put(node.kwargs[path[0]], path[1:]))
    else:
        node.update_arg(path[0], put(node.args[path[0]], path[1:]))


def propagate_shapes(program: Program, untouched: Collection[str] = (), changed: Collection[str] = ()) -> None:
    """Recompute every node's example value (``meta["val"]``) from the program's weights.

    Args:
        program: changed in place.
        untouched: names of calls that are skipped if none of their inputs has changed.
        changed: names of user inputs whose example value has changed.

    Raises:
        ProofError: the sizes do not fit together.
    """
    placeholders = list(program.placeholders())
    modes = [n.meta["val"].fake_mode for n in placeholders if hasattr(n.meta.get("val"), "fake_mode")]
    mode: FakeTensorMode = modes[0]
    values: list[object] = []
    weights = program.weights
    unchanged: set[fx.Node] = set()
    for node in placeholders:
        tensor = program.state.like(weights[node.name]) if node.name in weights else None
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
        with torch.no_grad(), mode, enable_python_dispatcher():  # some kernels know symbolic sizes in Python alone
            interpreter.run(*values)
    except RuntimeError as error:
        reason, place = str(error).strip().partition("\n")[0], SourceLocation(interpreter.node)
        raise ProofError(f"the cut graph does not fit together at {place}: {reason}; please report it") from error


class _ShapeInterpreter(fx.Interpreter):
    def __init__(self, graph: fx.GraphModule, untouched: Collection[str], unchanged: set[fx.Node]) -> None:
        super().__init__(graph)
        self.untouched, self.unchanged = untouched, unchanged
        self.node: fx.Node = next(iter(graph.graph.nodes))
        self.levels = {level[0]: level for level in levels(graph.graph)}
        self.opened: set[fx.Node] = set()
        """Calls under a ``torch.vmap`` that is run: each is, since their old values are of a level that is closed."""

    def run_node(self, n: fx.Node) -> object:
        self.node = n
        if n.op != "call_function":
            return super().run_node(n)
        if not self._rests(self.levels.get(n, [n])):
            self.opened.update(self.levels.get(n, ()))
        if n not in self.opened and self._rests([n]):
            self.unchanged.add(n)
            return n.meta.get("val")
        result = super().run_node(n)
        if n not in self.opened and _equivalent(result, n.meta.get("val")):
            self.unchanged.add(n)
        n.meta["val"] = result
        return result

    def _rests(self, calls: Sequence[fx.Node]) -> bool:
        """Whether calls that follow each other need not be run: neither they nor what they get from others changed."""
        own = set(calls)
        return all(
            n.name in self.untouched and all(s in self.unchanged or s in own for s in n.all_input_nodes) for n in calls
        )


def _equivalent(a: object, b: object) -> bool:
    """Whether a call does the same with either example value: tensors of one layout, or equal numbers."""
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(_equivalent, a, b))
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)
    return type(a) is type(b) and not isinstance(a, torch.SymInt) and bool(a == b)
