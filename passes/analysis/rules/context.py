"""context: the interface of rules: the tensors of a call, and the two protocols that rules use.

``RuleContext`` is given to a rule while axes are propagated (``passes/analysis/recorder.py`` implements it).
``Resizer`` is given to a rule's ``resize`` when the graph is cut (``passes/transforms/rewrite.py`` implements it).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, fx
from torch.fx.node import Argument

from mptk.ir.axes import Term
from mptk.ir.axis_facts import Dims, Note, ReductionKind


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


class RuleContext(Protocol):
    """The methods for a rule. ``node`` is always the rule's own call."""

    def unify(self, a: Term, b: Term, node: fx.Node) -> None:
        """Make the two dimensions one axis: they are cut together."""

    def freeze(self, term: Term, reason: str, node: fx.Node) -> None:
        """Forbid a cut of ``term``. The user sees the reason with the call's module and source line."""

    def frozen(self, size: int, reason: str, node: fx.Node) -> Term:
        """A fresh axis that cannot be cut."""

    def role(self, term: Term, role: str) -> None:
        """Note a use of an axis. It serves only the family's name for people."""

    def contract(self, node: fx.Node, left: Value, i: int, right: Value, j: int, out: Dims, also: Dims = ()) -> None:
        """Record a sum of products over dimension ``i`` of ``left`` and ``j`` of ``right``, and tie the two.

        ``out``: the result's dimensions. ``also``: further dimensions that the same call sums over.
        """

    def reduce(self, node: fx.Node, term: Term, kind: ReductionKind, source: fx.Node | None = None) -> None:
        """Record that the call reduces ``source`` (default: its first operand) over ``term``."""

    def inner(self, dims: Dims) -> None:
        """Record a value of these dimensions inside the call, such as attention scores."""

    def route(self, rows: Term, expert: Term) -> None:
        """Record that ``rows`` were sorted by expert: a row determines its ``expert``."""

    def positions(self, value: Value) -> Term | None:
        """The axis whose positions the integers in ``value`` are; None if it is not known."""

    def index(self, node: fx.Node, indices: Value, indexed: Term) -> None:
        """Record that ``indexed`` is read or written at ``indices``: tie it to their axis, or freeze it."""

    def pin_input(self, node: fx.Node, value: Value) -> None:
        """Freeze an operand that is combined with a weight, if it depends only on the user's inputs."""

    def is_weight(self, node: fx.Node) -> bool:
        """Whether a value depends on weights only."""

    def constant(self, node: fx.Node) -> Tensor | None:
        """The tensor of a constant in the model's code; None for any other value."""


class Resizer(Protocol):
    """The methods for ``resize``. ``node`` is the call in the graph that is being cut."""

    def dims(self, node: fx.Node) -> Dims:
        """The terms of the call's result in the dense graph."""

    def note(self, node: fx.Node, kind: type[Note]) -> Note | None:
        """The note of the call's rule, if it is of this kind."""

    def size(self, term: Term) -> int:
        """The size of a dimension after the cut."""

    def changed(self, term: Term) -> bool:
        """Whether the cut changes the size of a dimension."""

    def scaled(self, argument: Argument, term: Term) -> Argument:
        """A size argument after the cut. −1 stays; a symbolic size that also counts channels is scaled."""

    def replace(self, node: fx.Node, op: str, arguments: tuple[Argument, ...]) -> None:
        """Make ``node`` a call of another op."""

    def scale(self, node: fx.Node, factor: float) -> None:
        """Multiply the result of ``node`` by ``factor`` for all its users."""

    def index(self, before: fx.Node, positions: Sequence[int]) -> fx.Node:
        """A constant index of ``positions``, for use in ``before``."""

    def copy(self, before: fx.Node, source: fx.Node) -> fx.Node:
        """A contiguous copy of ``source``, for use in ``before``."""

    def epsilon(self, node: fx.Node) -> float:
        """The default epsilon of a norm: that of the type in which it computes, float32 or wider."""
