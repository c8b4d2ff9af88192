"""propagate: one walk over the graph that gives every tensor dimension its axis term.

Values that depend on no parameter (rotary tables, masks, position ids, alibi slopes) are *polymorphic*, as a
let-bound value is in Hindley–Milner inference: each use gets fresh axes, so that one shared table does not tie all
layers' heads together. A use whose axes are cut later selects from the table (``passes/transforms/rewrite.py``).
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.export.graph_signature import InputKind, OutputKind

from mptk.compat.torch import size_hint
from mptk.errors import MptkError
from mptk.ir.axes import Axis, Term, add_role, axis, freeze, leaves, unify
from mptk.ir.families import Contraction
from mptk.ir.ops import op_name
from mptk.ir.program import Program
from mptk.ir.source_location import SourceLocation
from passes.analysis.aliasing import Memory, flatten, memory_classes, written
from passes.analysis.rules import POINTWISE
from passes.analysis.rules.table import Dims, Rule, Value, find_rule

Path = tuple[Any, ...]


@dataclass(frozen=True)
class Reduction:
    """An axis that an op reduces over, and how: ``sum``, ``mean``, ``statistic`` (mean and variance) or ``max``.

    ``source`` is the operand that is reduced.
    """

    node: fx.Node
    axis: Term
    kind: str
    source: fx.Node


@dataclass
class Walk:
    """The state of one walk and, when it is over, its result.

    ``domains``: a value that holds positions → the axis that they were drawn from; of a call with several results, a
    list that has None for each that holds none.
    """

    program: Program
    memory: Memory = field(default_factory=dict, repr=False)
    dims: dict[fx.Node, Any] = field(default_factory=dict)
    weights: dict[str, Dims] = field(default_factory=dict)
    constant_uses: dict[fx.Node, list[tuple[Path, Dims]]] = field(default_factory=dict)
    domains: dict[fx.Node, Any] = field(default_factory=dict)
    contractions: list[Contraction] = field(default_factory=list)
    reductions: list[Reduction] = field(default_factory=list)
    hidden: list[Dims] = field(default_factory=list)
    routed: list[tuple[Term, Term]] = field(default_factory=list)
    notes: dict[fx.Node, Any] = field(default_factory=dict)
    variable: set[fx.Node] = field(default_factory=set)
    activation: set[fx.Node] = field(default_factory=set)
    data: set[fx.Node] = field(default_factory=set)
    caches: dict[fx.Node, fx.Node] = field(default_factory=dict)

    repeated: dict[fx.Node, dict[Axis, int]] = field(default_factory=dict, repr=False)
    _axes: dict[fx.Node, frozenset[Axis]] = field(default_factory=dict, repr=False)

    def axes_of(self, node: fx.Node) -> frozenset[Axis]:
        """All axes of a value's dimensions. Only when the walk is over: the answer is kept."""
        found = self._axes.get(node)
        if found is None:
            dims = self.dims[node]
            several = dims if isinstance(dims, list) else [dims]
            found = frozenset(leaf for value in several if value is not None for d in value for leaf in leaves(d))
            self._axes[node] = found
        return found

    # ---- for rules ----

    def shape(self, node: fx.Node) -> tuple[int, ...]:
        """Sizes of a node's result; a symbolic size counts as its example value."""
        return shape_of(node.meta["val"])

    @staticmethod
    def sizes(value: Tensor) -> tuple[int, ...]:
        return shape_of(value)

    def leaves_of(self, term: Term) -> set[Axis]:
        return set(leaves(term))

    def constant(self, node: fx.Node) -> Tensor | None:
        """The value of a constant that export lifted (an index list written in the model), if ``node`` is one."""
        while node.op == "call_function" and op_name(node).startswith(
            ("aten.lift_fresh_copy", "aten.to", "aten.clone")
        ):
            node = node.all_input_nodes[0]
        if node.op != "placeholder" or node.name not in self.program.signature.inputs_to_lifted_tensor_constants:
            return None
        return self._weight(node.name)

    def unify(self, a: Term, b: Term, node: fx.Node) -> None:
        unify(a, b, SourceLocation(node))

    def freeze(self, term: Term, reason: str, node: fx.Node) -> None:
        """Forbid cutting ``term``: ``reason``, with the place in the model's source."""
        if leaves(term):
            freeze(term, f"{reason} ({self.where(node)})")

    def role(self, term: Term, role: str) -> None:
        add_role(term, role)

    def frozen(self, size: int, reason: str, node: fx.Node) -> Term:
        """A fresh axis that cannot be cut."""
        term = axis(size)
        self.freeze(term, reason, node)
        return term

    def contract(self, node: fx.Node, left: Value, i: int, right: Value, j: int, out: Dims, also: Dims = ()) -> None:
        """Tie dimension ``i`` of ``left`` to ``j`` of ``right`` and record the sum over it (``also`` over others)."""
        for value, dim, other in ((left, i, right), (right, j, left)):
            if self.is_weight(other.node):
                self.pin_input(node, Value(value.node, tuple(t for d, t in enumerate(value.dims) if d != dim)))
        self.unify(left.dims[i], right.dims[j], node)
        self.hidden.append((*out, left.dims[i], *also))
        self.contractions.append(Contraction(node, left.dims[i], (left.node, i), (right.node, j), out))

    def reduce(self, node: fx.Node, term: Term, kind: str, source: fx.Node | None = None) -> None:
        """Record a reduction of ``source``, the first operand if none is given."""
        self.reductions.append(Reduction(node, term, kind, source or node.all_input_nodes[0]))

    def index(self, node: fx.Node, indices: Value, indexed: Term) -> None:
        """``indexed`` is read at positions that ``indices`` holds: tie it to the axis they were drawn from."""
        domain = self.domains.get(indices.node)
        if domain is not None and domain.size == indexed.size:
            self.unify(domain, indexed, node)
            return
        source = (
            "positions computed in the model" if indices.node in self.variable else "the model's input or a constant"
        )
        self.freeze(indexed, f"indexed by {source}", node)
        if domain is not None:
            self.freeze(domain, "its positions index another axis", node)

    def pin_input(self, node: fx.Node, value: Value) -> None:
        """A value computed from the user's inputs alone meets a weight: its dimensions (tokens) are the caller's."""
        if value.node in self.activation and value.node not in self.variable:
            for d in value.dims:
                self.freeze(d, "comes from the model's input", node)

    def where(self, node: fx.Node) -> str:
        """``op in module.path, file.py:12``: the place of a node, as far as export recorded it."""
        return str(SourceLocation(node))

    def is_weight(self, node: fx.Node) -> bool:
        """Whether a value is made of weights alone (a weight, its transpose, a merge of several)."""
        return node in self.variable and node not in self.activation

    # ---- the walk ----

    def run(self) -> Walk:
        self.memory = memory_classes(self.program.graph.graph)
        self._classify()
        for node in self.program.graph.graph.nodes:
            if node in self.variable:
                self.dims[node] = self._visit(node)
            if node.op == "output":
                self._outputs(node)
        return self

    def _classify(self) -> None:
        """Mark what depends on weights (``variable``), on the user's inputs (``activation``) and on float inputs."""
        weights = set()
        for spec in self.program.signature.input_specs:
            floating = spec.target is not None and self._weight(spec.arg.name).is_floating_point()
            if spec.kind is InputKind.PARAMETER or (spec.kind is InputKind.BUFFER and spec.persistent and floating):
                weights.add(spec.arg.name)
        user = set(self.program.user_inputs)
        self.caches = cache_inputs(self.program)
        for node in self.program.placeholders():
            if node.name in weights or node in self.caches:
                self.variable.add(node)
            if node.name in user:
                self.activation.add(node)
                value = node.meta.get("val")
                if node not in self.caches and isinstance(value, Tensor) and value.is_floating_point():
                    self.data.add(node)
        while sum(self._inherit(node) for node in self.program.graph.graph.nodes):
            pass

    def _inherit(self, node: fx.Node) -> bool:
        """Mark a call as its operands are, and with it all that it writes to. Whether that marked anything new."""
        if node.op == "placeholder" or not _holds_tensor(node):
            return False
        reached = [node, *(alias for target in written(node) for alias in self.memory[target])]
        before = len(self.variable) + len(self.activation) + len(self.data)
        for marked in (self.variable, self.activation, self.data):
            if not marked.isdisjoint(node.all_input_nodes):
                marked.update(reached)
        return len(self.variable) + len(self.activation) + len(self.data) > before

    def _weight(self, placeholder: str) -> Tensor:
        return self.program.state[self.program.weights[placeholder]]

    def _visit(self, node: fx.Node) -> Any:
        if node.op == "placeholder":
            return self._placeholder(node)
        if node.target is operator.getitem:
            source, position = node.args
            assert isinstance(source, fx.Node)
            assert isinstance(position, int)
            domains = self.domains.get(source)
            if domains is not None and domains[position] is not None:
                self.domains[node] = domains[position]
            return self.dims[source][position]
        found = find_rule(node) or _pointwise(node)
        if found is None:
            raise MptkError(
                f"no axis rule for {op_name(node)} ({self.where(node)}); register one with mptk.rule, "
                "see docs/adding-an-op.md"
            )
        if self.domains and found.zero != "move" and not found.positions:
            for source in node.all_input_nodes:
                if source in self.domains:
                    self.freeze(self.domains[source], "its positions are computed with", node)
        result = found.propagate(self, node, *self._arguments(node), **self._keywords(node))
        self._check(node, result)
        source = node.args[0] if node.args else None
        if found.zero == "move" and isinstance(source, fx.Node) and source in self.domains:
            domain = self.domains[source]
            self.domains.setdefault(node, [domain] * len(result) if isinstance(result, list) else domain)
        return result

    def _placeholder(self, node: fx.Node) -> Dims:
        """A weight, a cache, or an input of the user's that the model writes to."""
        dims = tuple(axis(size) for size in self.shape(node))
        if node.name in self.program.weights:
            return self.weights.setdefault(self.program.weights[node.name], dims)
        if node not in self.caches:
            for d in dims:
                self.freeze(d, "comes from the model's input", node)
        return dims

    def _arguments(self, node: fx.Node) -> list[Any]:
        return [self._argument(node, (i,), a) for i, a in enumerate(node.args)]

    def _keywords(self, node: fx.Node) -> dict[str, Any]:
        return {k: self._argument(node, (k,), a) for k, a in node.kwargs.items()}

    def _argument(self, node: fx.Node, path: Path, argument: Any) -> Any:
        if isinstance(argument, (list, tuple)):
            return [self._argument(node, (*path, i), a) for i, a in enumerate(argument)]
        if not isinstance(argument, fx.Node):
            return argument
        value = argument.meta.get("val")
        if not isinstance(value, Tensor):
            return example_size(value) if isinstance(value, (int, torch.SymInt)) else value
        if argument in self.variable:
            return Value(argument, self.dims[argument])
        dims = tuple(axis(size) for size in shape_of(value))
        if argument in self.data:
            for d in dims:
                self.freeze(d, "comes from the model's input", node)
        self.constant_uses.setdefault(node, []).append((path, dims))
        return Value(argument, dims)

    def _check(self, node: fx.Node, result: Any) -> None:
        value = node.meta.get("val")
        if not isinstance(result, list):
            result, value = [result], [value]
        for dims, tensor in zip(result, value or (), strict=False):
            if dims is not None and isinstance(tensor, Tensor):
                sizes = tuple([d.size for d in dims])
                assert sizes == shape_of(tensor), f"rule of {op_name(node)}: {sizes}, not {shape_of(tensor)}"

    def _outputs(self, node: fx.Node) -> None:
        """Every output's axes are the caller's, but for those of caches, which come back as inputs."""
        for value in flatten(node.args):
            if isinstance(value, fx.Node) and value in self.variable and value not in self.caches.values():
                positions = [self.domains[value]] if value in self.domains else []
                for d in (*self.dims[value], *positions):
                    self.freeze(d, "it is the model's output", value)


def cache_inputs(program: Program) -> dict[fx.Node, fx.Node]:
    """Inputs that a further output continues (a concatenation of the input with new values), with that output.

    These hold the model's own earlier values, so their axes are those of the weights that made them.
    """
    outputs = [s.arg.name for s in program.signature.output_specs if s.kind is OutputKind.USER_OUTPUT][1:]
    inputs = set(program.user_inputs)
    found: dict[fx.Node, fx.Node] = {}
    for node in program.graph.graph.nodes:
        if node.name in outputs and op_name(node).startswith("aten.cat"):
            found |= {source: node for source in node.all_input_nodes if source.name in inputs}
    return found


def shape_of(value: Tensor) -> tuple[int, ...]:
    """Sizes of a traced tensor; a symbolic size counts as the size of the example."""
    sizes = tuple(value.shape)
    for size in sizes:
        if type(size) is not int:
            return tuple(example_size(s) for s in sizes)
    return sizes


def example_size(size: Any) -> int:
    if not isinstance(size, torch.SymInt):
        return int(size)
    hint = size_hint(size)
    if hint is None:
        raise MptkError(f"a size depends on data ({size}), so axes cannot be followed; use a traceable implementation")
    return int(hint)


def propagate(program: Program) -> Walk:
    """Give every dimension of every value of ``program`` its axis term.

    Raises:
        MptkError: an op has no rule; the message names the op, its module and how to register one.
    """
    return Walk(program).run()


def _holds_tensor(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, (Tensor, list, tuple))


def _pointwise(node: fx.Node) -> Rule | None:
    """Ops that torch tags as pointwise need no rule of their own: they tie broadcast axes."""
    tags = getattr(node.target, "tags", ())
    return POINTWISE if torch.Tag.pointwise in tags else None


__all__ = ["Contraction", "Reduction", "Value", "Walk", "propagate"]
