"""table: the rules by ATen op. Rules are data: this file defines their form, the other files hold the rules.

A rule is a function ``(ctx, node, *args, **kwargs) → dims``. It gets the call's own arguments, with each tensor
replaced by a ``Value``. It unifies terms through ``ctx`` and returns the result's dimensions, or a list of them for
several results. A ``Result`` holds more than dimensions. ``Rule`` holds all other facts about an op.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

from torch import fx

from mptk.arguments import guard_arguments
from mptk.ir import Axis, AxisFacts, Dims, Positions, Results, Term, collect_axes, count_coordinates, name_target
from passes.analysis.rules.context import RuleContext, Value
from passes.analysis.rules.resizer import Resize


@dataclass(frozen=True)
class Result:
    """What a rule returns if it has more than dimensions.

    ``note``: for the op's ``resize`` and ``zero``. ``positions``: the axis whose positions the result holds; a list for
    several results.
    """

    dims: Results
    note: object = None
    positions: Positions = None


Propagate = Callable[..., Results | Result]
F = TypeVar("F", bound=Propagate)
ZeroOf = Callable[[object], set[Axis]]
"""Operand → the axes along which it is zero if the weights of that axis are."""
Zero = Literal["keep", "any", "all", "join", "drop"] | Callable[[fx.Node, ZeroOf, AxisFacts], set[Axis]]
OnPositions = Literal["freeze", "carry", "own"]
Dim = int | Sequence[int] | None
"""A dimension argument: one, several, or None for all."""
Order = float | str | None
"""The order of a norm."""


@dataclass(frozen=True)
class Rule:
    """The effect of one op on axes.

    Attributes:
        zero: the axes along which the result is zero, given its operands' (``zero_propagation.py``). ``keep``:
            if the first tensor is (f(0) = 0); ``any``: if any operand is (a product); ``all``: if every operand is (a
            sum); ``join``: if every operand with the axis is (a concatenation); ``drop``: none; or a function of the
            node.
        resize: adapts the call's own size arguments if axes shrink.
        positions: the effect on an operand that holds positions of an axis (after an argmax). ``freeze``: the call
            computes with them, so their axis cannot be cut; ``carry``: the first operand's values only move, so they
            stay positions; ``own``: the rule itself decides.
    """

    propagate: Propagate
    zero: Zero = "drop"
    resize: Resize | None = None
    positions: OnPositions = "freeze"


RULES: dict[str, Rule] = {}
"""Op, or op and overload → its rule."""


@guard_arguments
def rule(
    *ops: str, zero: Zero = "drop", resize: Resize | None = None, positions: OnPositions = "freeze"
) -> Callable[[F], F]:
    """Register a function as the rule of operators (``docs/adding-an-op.md``). A rule that exists is replaced.

    The function takes a ``RuleContext``, the node and the call's arguments, with a ``Value`` in the place of each
    tensor. It returns the terms of the result's dimensions, or a ``Result``; a list of terms for several results.

    Args:
        ops: ``"aten.view"`` or ``"my_ops::gated"`` (all overloads), ``"aten.add.Tensor"`` (one).
        zero: where the result is zero: ``"drop"`` claims nothing; ``"keep"``, ``"any"``, ``"all"``, ``"join"``, or a
            function of the node.
        resize: changes the call's own sizes when axes are cut.
        positions: what happens to positions of an axis in an operand: ``"freeze"``, ``"carry"`` or ``"own"``.
    """

    def register(propagate: F) -> F:
        for op in ops:
            RULES[op.replace("::", ".")] = Rule(propagate, zero, resize, positions)
        return propagate

    return register


def find_rule(node: fx.Node) -> Rule | None:
    """The rule of a call: its overload's rule, else its op's."""
    name = name_target(node.target)  # aten.add.Tensor
    return RULES.get(name) or RULES.get(name.rsplit(".", 1)[0])


# ---- helpers for the common kinds ----


def normalize(dim: int, ndim: int) -> int:
    """A dimension argument (or a position along one) as a non-negative number."""
    return dim + ndim if dim < 0 else dim


def normalize_all(dims: int | Sequence[int] | None, ndim: int) -> list[int]:
    """Dimension arguments as non-negative numbers; None and [] mean all."""
    if dims is None or (not isinstance(dims, int) and len(dims) == 0):
        return list(range(ndim))
    return [normalize(d, ndim) for d in ([dims] if isinstance(dims, int) else dims)]


def get_single_dims(results: Results) -> Dims:
    """The dimensions of a call with one result."""
    assert isinstance(results, tuple)
    return results


def find_lone_axes(dims: Dims, d: int) -> set[Axis]:
    """The axes of dimension d that have no other coordinate: a value that is zero along d is zero along them."""
    counts = count_coordinates(dims, each=True)
    return {a for a in collect_axes([dims[d]]) if counts[a] == 1}


def freeze_positions(ctx: RuleContext, node: fx.Node, *values: object) -> None:
    """Freeze the axis of positions that are used as numbers."""
    for value in values:
        if isinstance(value, Value) and (domain := ctx.find_position_axis(value)) is not None:
            ctx.freeze(domain, "its positions are computed with", node)


def zero_of_first(node: fx.Node, zero: ZeroOf, facts: AxisFacts) -> set[Axis]:
    """The first of several results is zero if the operand is. Holds if no other is used: positions are not zero."""
    return zero(node.args[0]) if all(user.args[1] == 0 for user in node.users) else set()


def record_meeting(ctx: RuleContext, dims: Dims, along: Iterable[int]) -> None:
    """Record that positions along these dimensions are combined or reordered.

    The choice of another axis's units must not vary along them, so a value without them is recorded. A fresh axis in
    the result is not enough: it may be tied to the operand's axis later (x + x.roll(1, 2)).
    """
    gone = set(along)
    ctx.note_inner(tuple(t for d, t in enumerate(dims) if d not in gone))


def align(ctx: RuleContext, node: fx.Node, dims: Sequence[Term], onto: Sequence[Term]) -> None:
    """Tie dimensions of equal size, counted from the last. Dimensions of 1 broadcast."""
    for a, b in zip(reversed(dims), reversed(onto), strict=False):
        if a.size == b.size:
            ctx.unify(a, b, node)
