"""scopes: the axes along which the choice of an axis's units may vary, as query heads' choice may in each KV group.

Every value that holds the axis must hold its scope (attention scores included), and every weight too: at one coordinate
(of a Gram matrix Σ_k x_ik x_jk, the choice of k would be that of i or that of j). Of two axes that accompany each
other, the inner one varies along the outer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mptk.ir.axes import Axis, Term, axes_in, coordinates, encloses, leaves
from mptk.ir.axis_facts import AxisFacts, Dims
from mptk.ir.families import Place

Members = Mapping[Axis, Sequence[Place]]
"""Axis → the weights' dimensions that hold it."""

Holder = tuple[Term, set[Term]]
"""A dimension of a weight or a constant, and the terms of that weight's dimensions (of a constant: none)."""


def find_scopes(
    facts: AxisFacts, weights: Mapping[str, Dims], members: Members, offered: Sequence[Axis]
) -> dict[Axis, tuple[Axis, ...]]:
    """The scope of each axis in ``offered``, in the order of ``members``."""
    beside = _companions(facts, set(offered))
    holders = _holders(facts, weights)
    scopes: dict[Axis, tuple[Axis, ...]] = {}
    for axis in reversed(offered):
        present = beside.get(axis, set())
        outer = [other for other in members if other in present and axis not in scopes.get(other, ())]
        scopes[axis] = tuple(other for other in outer if _can_vary(axis, other, holders[axis]))
    return scopes


def _companions(facts: AxisFacts, wanted: set[Axis]) -> dict[Axis, set[Axis]]:
    """Axis → the other axes that every value that holds it has, at one coordinate."""
    found: dict[Axis, set[Axis]] = {}
    for counts in {frozenset(coordinates(dims, each=True).items()) for dims in _values(facts)}:
        held = {axis for axis, _ in counts}
        routed = axes_in(r.expert for r in facts.routes if axes_in([r.rows]) <= held)
        present = {axis for axis, count in counts if count == 1} | routed
        for axis in (held | routed) & wanted:
            found[axis] = (found[axis] & present if axis in found else present) - {axis}
    return found


def _values(facts: AxisFacts) -> set[Dims]:
    """The dimensions of every value, of what calls make inside and of constants where they are used; each kind once."""
    found = set(facts.inner).union(*(facts.tensors(node) for node in facts.results))
    return found.union(dims for uses in facts.constant_uses.values() for _, dims in uses)


def _holders(facts: AxisFacts, weights: Mapping[str, Dims]) -> dict[Axis, list[Holder]]:
    """Axis → the dimensions of weights and constants that hold it."""
    constants = [dims for uses in facts.constant_uses.values() for _, dims in uses]
    tensors = [*((dims, set(dims)) for dims in weights.values()), *((dims, set[Term]()) for dims in constants)]
    found: dict[Axis, list[Holder]] = {}
    for dims, apart in tensors:
        for term in dims:
            for axis in dict.fromkeys(leaves(term)):
                found.setdefault(axis, []).append((term, apart))
    return found


def _can_vary(axis: Axis, scope: Axis, holders: Sequence[Holder]) -> bool:
    """In every dimension the scope must enclose the axis, or be another dimension of the same weight."""
    return all(encloses(term, scope, axis) or scope in apart for term, apart in holders)
