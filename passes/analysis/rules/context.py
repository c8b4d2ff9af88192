"""context: the interface of rules while axes are propagated: the tensors of a call, and what a rule may record."""

from __future__ import annotations

from collections.abc import Set as AbstractSet
from dataclasses import dataclass

from torch import Tensor, fx

from mptk.ir import (
    Contraction,
    Dims,
    Positions,
    Program,
    Reduction,
    ReductionKind,
    Results,
    Route,
    SourceLocation,
    Term,
    add_role,
    freeze,
    list_axes,
    make_axis,
    name_base_op,
    name_op,
    unify,
)
from passes.analysis.dependence import Dependence

ID_MOVES = ("view", "reshape", "to", "_to_copy", "unsqueeze", "flatten", "contiguous", "clone", "slice", "detach")
"""Calls through which token ids stay token ids."""
UNCHANGED = ("aten.lift_fresh_copy", "aten.to", "aten.clone")
"""What export puts between a constant of the model's code and its use."""


@dataclass(frozen=True)
class Value:
    """A tensor argument of a rule: its node, and one term for each dimension."""

    node: fx.Node
    dims: Dims

    @property
    def ndim(self) -> int:
        return len(self.dims)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(d.size for d in self.dims)


class RuleContext:
    """The methods for a rule, and its findings. ``node`` is always the rule's own call.

    ``positions_in``: value that holds positions → the axis of these positions.
    """

    def __init__(self, program: Program, depends: Dependence) -> None:
        self.program, self.depends = program, depends
        self.contractions: list[Contraction] = []
        self.reductions: list[Reduction] = []
        self.inner_values: list[Dims] = []
        self.routes: list[Route] = []
        self.positions_in: dict[fx.Node, Positions] = {}

    # ---- for rules ----

    def unify(self, a: Term, b: Term, node: fx.Node) -> None:
        """Make the two dimensions one axis: they are cut together."""
        unify(a, b, SourceLocation(node))

    def freeze(self, term: Term, reason: str, node: fx.Node) -> None:
        """Forbid a cut of ``term``. The user sees the reason with the call's module and source line."""
        if list_axes(term):
            freeze(term, f"{reason} ({SourceLocation(node)})")

    def make_frozen(self, size: int, reason: str, node: fx.Node) -> Term:
        """A fresh axis that cannot be cut."""
        term = make_axis(size)
        self.freeze(term, reason, node)
        return term

    def note_role(self, term: Term, role: str) -> None:
        """Note a use of an axis. It serves only the family's name for people."""
        add_role(term, role)

    def contract(self, node: fx.Node, left: Value, i: int, right: Value, j: int, out: Dims, also: Dims = ()) -> None:
        """Record a sum of products over dimension ``i`` of ``left`` and ``j`` of ``right``, and tie the two.

        ``out``: the result's dimensions. ``also``: further dimensions that the same call sums over.
        """
        # A layer on the user's inputs (a patch embedding): its other dimensions are the inputs' own, which stay.
        for value, dim, other in ((left, i, right), (right, j, left)):
            if self.is_weight(other.node):
                self.pin_input(node, Value(value.node, tuple(t for d, t in enumerate(value.dims) if d != dim)))
        # The products before the sum are a value of their own, on which scopes depend.
        self.unify(left.dims[i], right.dims[j], node)
        self.note_inner((*out, left.dims[i], *also))
        self.contractions.append(Contraction(node, left.dims[i], (left.node, i), (right.node, j), out))

    def reduce(self, node: fx.Node, term: Term, kind: ReductionKind, source: fx.Node | None = None) -> None:
        """Record that the call reduces ``source`` (default: its first operand) over ``term``."""
        self.reductions.append(Reduction(node, term, kind, source or node.all_input_nodes[0]))

    def note_inner(self, dims: Dims) -> None:
        """Record a value of these dimensions inside the call, such as attention scores."""
        self.inner_values.append(dims)

    def route(self, rows: Term, expert: Term) -> None:
        """Record that ``rows`` were sorted by expert: a row determines its ``expert``."""
        self.routes.append(Route(rows, expert))

    def find_position_axis(self, value: Value) -> Term | None:
        """The axis whose positions the integers in ``value`` are; None if it is not known."""
        return self.find_positions(value.node)

    def index(self, node: fx.Node, indices: Value, indexed: Term) -> None:
        """Record that ``indexed`` is read or written at ``indices``: tie it to their axis, or freeze it."""
        domain = self.find_position_axis(indices)
        if domain is not None and domain.size == indexed.size:
            self.unify(domain, indexed, node)
            return
        # Positions of unknown origin, or of another axis: neither may lose any.
        computed = indices.node in self.depends.variables
        source = "positions computed in the model" if computed else "the model's input or a constant"
        self.freeze(indexed, f"indexed by {source}", node)
        if domain is not None:
            self.freeze(domain, "its positions index another axis", node)

    def pin_input(self, node: fx.Node, value: Value) -> None:
        """Freeze an operand that is combined with a weight, if it depends only on the user's inputs."""
        if value.node in self.depends.activations and value.node not in self.depends.variables:
            self.freeze_input(value.dims, node)

    def is_input(self, node: fx.Node) -> bool:
        """Whether a value is one of the user's inputs, perhaps in another shape."""
        while node.op == "call_function" and name_base_op(node.target) in ID_MOVES:
            node = node.all_input_nodes[0]
        return node.op == "placeholder" and node.name in self.program.user_inputs

    def is_weight(self, node: fx.Node) -> bool:
        """Whether a value depends on weights only."""
        return node in self.depends.variables and node not in self.depends.activations

    def read_constant(self, node: fx.Node) -> Tensor | None:
        """The tensor of a constant in the model's code; None for any other value."""
        *_, node = self._origins(node)
        if node.op != "placeholder" or node.name not in self.program.signature.inputs_to_lifted_tensor_constants:
            return None
        return self.program.state[self.program.weights[node.name]]

    @staticmethod
    def _origins(node: fx.Node) -> list[fx.Node]:
        """A value, what it is a copy of, what that is a copy of, …"""
        found = [node]
        while node.op == "call_function" and name_op(node).startswith(UNCHANGED):
            node = node.all_input_nodes[0]
            found.append(node)
        return found

    # ---- for the walk ----

    def is_zero(self, node: fx.Node, written: AbstractSet[fx.Node]) -> bool:
        """Whether a constant holds zeros only, and is in no memory that a call writes to.

        A call made it so, or it is a buffer of known values that no checkpoint holds.
        """
        # The value, what it is a copy of, …; a write to any of them may have made it other than zero.
        *copies, node = self._origins(node)
        if not written.isdisjoint([*copies, node]):
            return False
        if node.op == "call_function":
            return name_base_op(node.target) in ("zeros", "new_zeros", "zeros_like")
        name = self.program.weights.get(node.name)
        known = None if name is None else self.program.state.find_in_memory(name)
        return known is not None and not known.any()

    def freeze_input(self, dims: Dims, node: fx.Node) -> None:
        """Freeze dimensions of the user's inputs."""
        for d in dims:
            self.freeze(d, "comes from the model's input", node)

    def find_positions(self, node: fx.Node) -> Term | None:
        """The axis whose positions a value holds, which must be one tensor; None if it holds none."""
        found = self.positions_in.get(node)
        assert not isinstance(found, list), f"{node} has several results"
        return found

    def freeze_positions(self, node: fx.Node) -> None:
        """Freeze the axes whose positions the operands hold, since the call computes with the positions."""
        for source in node.all_input_nodes:
            if (domain := self.find_positions(source)) is not None:
                self.freeze(domain, "its positions are computed with", node)

    def find_carried_positions(self, node: fx.Node, results: Results) -> Positions:
        """The axes whose positions the results hold, if the call only moves the first operand's values."""
        source = node.args[0] if node.args else None
        domain = self.find_positions(source) if isinstance(source, fx.Node) else None
        return [domain] * len(results) if domain is not None and isinstance(results, list) else domain
