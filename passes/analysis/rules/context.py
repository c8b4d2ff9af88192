"""What rules see: the tensors of a call, and the two things that they may ask for.

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
    """A tensor as a rule sees it: the node that made it and one term a dimension."""

    node: fx.Node
    dims: Dims

    @property
    def ndim(self) -> int:
        return len(self.dims)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(d.size for d in self.dims)


class RuleContext(Protocol):
    """What a rule may do. ``node`` is always the call whose rule it is."""

    def unify(self, a: Term, b: Term, node: fx.Node) -> None:
        """The two dimensions are one: what is cut in one is cut in the other."""

    def freeze(self, term: Term, reason: str, node: fx.Node) -> None:
        """``term`` cannot be cut. The user sees the reason with the call's module and source line."""

    def frozen(self, size: int, reason: str, node: fx.Node) -> Term:
        """A fresh axis that cannot be cut."""

    def role(self, term: Term, role: str) -> None:
        """Note what an axis was seen to be. Only used to name its family for people."""

    def contract(self, node: fx.Node, left: Value, i: int, right: Value, j: int, out: Dims, also: Dims = ()) -> None:
        """A sum of products over dimension ``i`` of ``left`` and ``j`` of ``right``, which are tied.

        ``out`` are the result's dimensions. ``also`` are further dimensions that the same call sums over.
        """

    def reduce(self, node: fx.Node, term: Term, kind: ReductionKind, source: fx.Node | None = None) -> None:
        """The call reduces ``source`` (its first operand by default) over ``term``."""

    def inner(self, dims: Dims) -> None:
        """The call makes a value of these dimensions inside, such as attention scores."""

    def route(self, rows: Term, expert: Term) -> None:
        """``rows`` were sorted by expert: a row determines its ``expert``."""

    def positions(self, value: Value) -> Term | None:
        """The axis that the integers in ``value`` are positions of; None if they are no known positions."""

    def index(self, node: fx.Node, indices: Value, indexed: Term) -> None:
        """``indexed`` is read or written at the positions in ``indices``: ties it to their axis, or freezes it."""

    def pin_input(self, node: fx.Node, value: Value) -> None:
        """``value`` meets a weight: if it depends on the user's inputs alone, its dimensions are the caller's."""

    def is_weight(self, node: fx.Node) -> bool:
        """Whether a value is made of weights alone."""

    def constant(self, node: fx.Node) -> Tensor | None:
        """The tensor of a constant that is written in the model; None for any other value."""


class Resizer(Protocol):
    """What ``resize`` may ask and do. ``node`` is the call in the graph that is being cut."""

    def dims(self, node: fx.Node) -> Dims:
        """The terms of the call's result in the dense graph."""

    def note(self, node: fx.Node, kind: type[Note]) -> Note | None:
        """What the call's rule noted, if it is of this kind."""

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
        """The default epsilon of a norm: that of the type it computes in, float32 or more."""
