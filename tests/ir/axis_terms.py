"""Axis terms for tests: printed by letter, drawn at random, enumerated position by position."""

from __future__ import annotations

import itertools

from hypothesis import strategies as st

from mptk.ir import Axis, Product, Sum, Term, concat, list_axes, make_axis, make_product, resolve


def shape(term: Term, names: dict[Axis, str] | None = None) -> str:
    """A term as text: axes by order of appearance (a, b, …), the same letter for the same axis, and their sizes."""
    names = {} if names is None else names
    term = resolve(term)
    if isinstance(term, Axis):
        return names.setdefault(term, "abcdefghij"[len(names)]) + str(term.size)
    parts = [shape(p, names) for p in (term.factors if isinstance(term, Product) else term.segments)]
    if not parts:
        return str(term.size)
    return "(" + ("·" if isinstance(term, Product) else " + ").join(parts) + ")"


def frozen(*terms: Term) -> bool:
    return all(leaf.frozen for term in terms for leaf in list_axes(term))


def free(*terms: Term) -> bool:
    return not any(leaf.frozen for term in terms for leaf in list_axes(term))


@st.composite
def terms(draw: st.DrawFn, size: int, depth: int = 2) -> Term:
    """A term of ``size`` positions over fresh axes."""
    kind = draw(st.sampled_from(["axis", "product", "sum"])) if depth and size > 3 else "axis"
    divisors = [d for d in range(2, size) if size % d == 0]
    if kind == "product" and divisors:
        first = draw(st.sampled_from(divisors))
        return make_product((draw(terms(first, depth - 1)), draw(terms(size // first, depth - 1))))
    if kind == "sum":
        first = draw(st.integers(1, size - 1))
        return concat((draw(terms(first, depth - 1)), draw(terms(size - first, depth - 1))))
    return make_axis(size)


def enumerate_positions(term: Term) -> list[tuple[tuple[Axis, int], ...]]:
    """Brute force: the (axis, coordinate) pairs of each position."""
    term = resolve(term)
    if isinstance(term, Axis):
        return [((term, i),) for i in range(term.size)]
    if isinstance(term, Sum):
        return [p for segment in term.segments for p in enumerate_positions(segment)]
    parts = [enumerate_positions(f) for f in term.factors]
    return [tuple(itertools.chain(*combination)) for combination in itertools.product(*parts)]
