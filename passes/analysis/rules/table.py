"""The rule table: ATen op → what it does to axes. Rules are data; this file is their form, the others hold them.

A rule is a function ``(walk, node, *args, **kwargs) -> dims`` that receives the call's own arguments with each tensor
replaced by a ``Value`` and returns the dimensions of the result (a list of them for several results), unifying terms on
the way. Two facts accompany it:

- ``zero``: where the result is zero if its inputs are zero at the removed positions (see ``zero_propagation.py``);
- ``resize``: how the call's own size arguments follow when axes shrink (see ``passes/transforms/rewrite.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from torch import fx

from mptk.ir.axes import Axis, Term, coordinates
from mptk.ir.ops import target_name

if TYPE_CHECKING:
    from passes.analysis.propagate import Walk
    from passes.transforms.rewrite import Resizer

Dims = tuple[Term, ...]


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


Propagate = Callable[..., Any]
F = TypeVar("F", bound=Propagate)
Zero = str | Callable[[Any, Any, Any], Any]
Resize = Callable[["Resizer", fx.Node], None]


@dataclass(frozen=True)
class Rule:
    """What one op does to axes.

    ``zero`` is one of ``keep`` (zero where the first tensor is: f(0) = 0), ``move`` (likewise, since values only move;
    positions stay positions of their axis), ``any`` (where any
    operand is: a product), ``all`` (where every operand is: a sum), ``join`` (where every operand that has the axis
    is: a concatenation), ``drop`` (nowhere), or a function of the node.
    """

    propagate: Propagate
    zero: Zero = "drop"
    resize: Resize | None = None
    positions: bool = False


RULES: dict[str, Rule] = {}


def rule(*ops: str, zero: Zero = "drop", resize: Resize | None = None, positions: bool = False) -> Callable[[F], F]:
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


def carry(w: Walk, node: fx.Node, x: Value) -> None:
    """The result holds what x holds: if these are positions, they stay positions of their axis."""
    if x.node in w.domains:
        w.domains[node] = w.domains[x.node]


def lone(w: Walk, dims: Dims, d: int) -> set[Axis]:
    """The axes of dimension d that no other coordinate runs along: zeros along d are zeros along them."""
    counts = coordinates(dims, each=True)
    return {a for a in w.leaves_of(dims[d]) if counts[a] == 1}


def forget(w: Walk, node: fx.Node, *values: Any) -> None:
    """Positions that are used as numbers: the axis they were drawn from cannot be cut."""
    for value in values:
        if isinstance(value, Value) and value.node in w.domains:
            w.freeze(w.domains[value.node], "its positions are computed with", node)


def zero_of_first(node: fx.Node, zero: Any, w: Any) -> Any:
    """Of several results the first is zero where the operand is: known if no other is used (positions are not zero)."""
    return zero(node.args[0]) if all(user.args[1] == 0 for user in node.users) else set()


def meet(w: Walk, dims: Dims, along: Iterable[int]) -> None:
    """Positions along these dimensions meet or change places: no other axis' choice of units may vary along them.

    The walk takes note of a value without them. A fresh axis of the result is not enough, as it may be tied to the
    operand's later (x + x.roll(1, 2)).
    """
    gone = set(along)
    w.hidden.append(tuple(t for d, t in enumerate(dims) if d not in gone))


def align(w: Walk, node: fx.Node, dims: Dims, onto: Dims) -> None:
    """Dimensions of equal size, counted from the last, are the same axis; the others broadcast."""
    for a, b in zip(reversed(dims), reversed(onto), strict=False):
        if a.size == b.size:
            w.unify(a, b, node)
