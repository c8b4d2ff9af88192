"""scopes: find the axes along which the choice of an axis's units may vary (query heads, in each KV group).

Every value with the axis must have its scope, attention scores included, and every weight, too. It must have the scope
at one coordinate only: in a Gram matrix Σ_k x_ik x_jk, the choice of k could be the choice of i or of j. If two axes
always occur together, the inner one varies along the outer one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mptk.ir.axes import Axis, Term, collect_axes, count_coordinates, is_nested, list_axes
from mptk.ir.axis_facts import AxisFacts, Dims
from mptk.ir.families import Place

Members = Mapping[Axis, Sequence[Place]]
"""Axis → the weights' dimensions that hold it."""

Holder = tuple[Term, set[Term]]
"""A dimension of a weight or a constant, and the terms of the weight's dimensions (for a constant: none)."""


def find_scopes(
    facts: AxisFacts, weights: Mapping[str, Dims], members: Members, offered: Sequence[Axis]
) -> dict[Axis, tuple[Axis, ...]]:
    """The scope of each axis in ``offered``, in the order of ``members``."""
    beside = _find_companions(facts, set(offered))
    holders = _find_holders(facts, weights)
    scopes: dict[Axis, tuple[Axis, ...]] = {}
    for axis in reversed(offered):
        present = beside.get(axis, set())
        outer = [other for other in members if other in present and axis not in scopes.get(other, ())]
        scopes[axis] = tuple(other for other in outer if _can_vary(axis, other, holders[axis]))
    return scopes


def _find_companions(facts: AxisFacts, wanted: set[Axis]) -> dict[Axis, set[Axis]]:
    """Axis → the other axes that every value with this axis has at one coordinate."""
    found: dict[Axis, set[Axis]] = {}
    for counts in {frozenset(count_coordinates(dims, each=True).items()) for dims in _collect_value_dims(facts)}:
        held = {axis for axis, _ in counts}
        routed = collect_axes(r.expert for r in facts.routes if collect_axes([r.rows]) <= held)
        present = {axis for axis, count in counts if count == 1} | routed
        for axis in (held | routed) & wanted:
            found[axis] = (found[axis] & present if axis in found else present) - {axis}
    return found


def _collect_value_dims(facts: AxisFacts) -> set[Dims]:
    """The dimensions of all values, of values inside calls, and of constants at their uses, without repeats."""
    found = set(facts.inner).union(*(facts.tensors(node) for node in facts.results))
    return found.union(dims for uses in facts.constant_uses.values() for _, dims in uses)


def _find_holders(facts: AxisFacts, weights: Mapping[str, Dims]) -> dict[Axis, list[Holder]]:
    """Axis → the dimensions of weights and constants that hold it."""
    constants = [dims for uses in facts.constant_uses.values() for _, dims in uses]
    tensors = [*((dims, set(dims)) for dims in weights.values()), *((dims, set[Term]()) for dims in constants)]
    found: dict[Axis, list[Holder]] = {}
    for dims, apart in tensors:
        for term in dims:
            for axis in dict.fromkeys(list_axes(term)):
                found.setdefault(axis, []).append((term, apart))
    return found


def _can_vary(axis: Axis, scope: Axis, holders: Sequence[Holder]) -> bool:
    """Whether in every dimension the scope encloses the axis or is another dimension of the same weight."""
    return all(is_nested(term, scope, axis) or scope in apart for term, apart in holders)
