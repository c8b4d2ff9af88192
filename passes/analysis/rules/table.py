"""The rule table: ATen op → what it does to axes. Rules are data; this file is their form, the others hold them.

A rule is a function ``(ctx, node, *args, **kwargs) → dims``. It receives the call's own arguments, with each tensor
replaced by a ``Value``. It unifies terms through ``ctx`` and returns the dimensions of the result, a list of them for
several results. A rule that has more to say returns a ``Result``. ``Rule`` holds what else is known of an op.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

from torch import fx

from mptk.ir.axes import Axis, Term, axes_in, coordinates
from mptk.ir.axis_facts import AxisFacts, Dims, Positions, Results
from mptk.ir.ops import target_name
from passes.analysis.rules.context import Resizer, RuleContext, Value


@dataclass(frozen=True)
class Result:
    """What a rule returns if dimensions are not all.

    ``note`` is kept for the op's ``resize`` and ``zero``. ``positions``: the result holds positions of this axis; of
    several results a list.
    """

    dims: Results
    note: object = None
    positions: Positions = None


Propagate = Callable[..., Results | Result]
F = TypeVar("F", bound=Propagate)
ZeroOf = Callable[[object], set[Axis]]
"""The axes along which an operand is zero where the weights of that axis are."""
Zero = Literal["keep", "any", "all", "join", "drop"] | Callable[[fx.Node, ZeroOf, AxisFacts], set[Axis]]
OnPositions = Literal["freeze", "carry", "own"]
Dim = int | Sequence[int] | None
"""A dimension argument: one, several, or all."""
Order = float | str | None
"""The order of a norm."""
Resize = Callable[[Resizer, fx.Node], None]


@dataclass(frozen=True)
class Rule:
    """What one op does to axes.

    ``zero``: along which axes the result is zero, given those of its operands (``zero_propagation.py``). ``keep``: as
    the first tensor (f(0) = 0); ``any``: if any operand is (a product); ``all``: if every operand is (a sum);
    ``join``: if every operand that has the axis is (a concatenation); ``drop``: nowhere; or a function of the node.
    ``resize``: how the call's own size arguments follow when axes shrink.
    ``positions``: what happens to an operand that holds positions of an axis, as an argmax does. ``freeze``: they are
    computed with, so their axis cannot be cut; ``carry``: the first operand's values only move, so they stay
    positions; ``own``: the rule says.
    """

    propagate: Propagate
    zero: Zero = "drop"
    resize: Resize | None = None
    positions: OnPositions = "freeze"


RULES: dict[str, Rule] = {}


def rule(
    *ops: str, zero: Zero = "drop", resize: Resize | None = None, positions: OnPositions = "freeze"
) -> Callable[[F], F]:
    """Register a function as the rule of ``ops``: ``"aten.view"`` (all overloads) or ``"aten.add.Tensor"`` (one)."""

    def register(propagate: F) -> F:
        for op in ops:
            RULES[op.replace("::", ".")] = Rule(propagate, zero, resize, positions)
        return propagate

    return register


def find_rule(node: fx.Node) -> Rule | None:
    """The rule of a call: its overload's, else its op's."""
    name = target_name(node.target)
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


def single(results: Results) -> Dims:
    """The dimensions of a call that has one result."""
    assert isinstance(results, tuple)
    return results


def lone(dims: Dims, d: int) -> set[Axis]:
    """The axes of dimension d that no other coordinate runs along: zeros along d are zeros along them."""
    counts = coordinates(dims, each=True)
    return {a for a in axes_in([dims[d]]) if counts[a] == 1}


def freeze_positions(ctx: RuleContext, node: fx.Node, *values: object) -> None:
    """Positions are used as numbers: the axis that they were drawn from cannot be cut."""
    for value in values:
        if isinstance(value, Value) and (domain := ctx.positions(value)) is not None:
            ctx.freeze(domain, "its positions are computed with", node)


def zero_of_first(node: fx.Node, zero: ZeroOf, facts: AxisFacts) -> set[Axis]:
    """Of several results the first is zero where the operand is: known if no other is used (positions are not zero)."""
    return zero(node.args[0]) if all(user.args[1] == 0 for user in node.users) else set()


def meet(ctx: RuleContext, dims: Dims, along: Iterable[int]) -> None:
    """Positions along these dimensions meet or change places: no other axis' choice of units may vary along them.

    A value without them is recorded. A fresh axis of the result is not enough, as it may be tied to the operand's
    later (x + x.roll(1, 2)).
    """
    gone = set(along)
    ctx.inner(tuple(t for d, t in enumerate(dims) if d not in gone))


def align(ctx: RuleContext, node: fx.Node, dims: Sequence[Term], onto: Sequence[Term]) -> None:
    """Dimensions of equal size, counted from the last, are the same axis; the others broadcast."""
    for a, b in zip(reversed(dims), reversed(onto), strict=False):
        if a.size == b.size:
            ctx.unify(a, b, node)
