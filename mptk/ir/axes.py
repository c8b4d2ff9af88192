"""The axis algebra: every tensor dimension is a term over axes.

A term is one of
- an ``Axis`` of a size: ``ffn(1536)``;
- a ``Product``, row-major, when a view splits or merges: ``kv(3)·q_per_kv(3)·head_dim(64)``;
- a ``Sum``, when tensors are concatenated, split or sliced: ``gate(80) + up(80)``.

Ops make terms equal (``unify``), as type inference makes types equal.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt

Size = TypeVar("Size", int, float)
"""Sizes are integers in a model, and real numbers while widths are being learned."""


class Axis:
    """An index space of ``size`` positions: a union-find node, perhaps bound to a finer term.

    Attributes:
        frozen: the reasons why it cannot be cut; empty if it can.
        roles: how the graph uses it; serves only its name for people.
        minimum: the smallest width that its ops accept.
        multiple: the number that every accepted width is a multiple of.
    """

    __slots__ = ("bound", "frozen", "id", "minimum", "multiple", "parent", "roles", "size")
    _count = 0

    def __init__(self, size: int) -> None:
        # Later axes have larger numbers. ``_bind`` keeps the older of two, so that each run finds the same axes.
        Axis._count += 1
        self.id = Axis._count
        self.size = size
        self.parent: Axis | None = None
        self.bound: Term | None = None
        self.frozen: list[str] = []
        self.roles: set[str] = set()
        self.minimum = 1
        self.multiple = 1

    def __repr__(self) -> str:
        return f"{self.id}({self.size})"


@dataclass(frozen=True)
class Product:
    """Row-major product: the last factor varies fastest. No factor is 1 or a product."""

    factors: tuple[Term, ...]
    size: int

    def __repr__(self) -> str:
        return "(" + "·".join(map(repr, self.factors)) + ")" if self.factors else "1"


@dataclass(frozen=True)
class Sum:
    """Concatenation of segments in order. No segment is empty or a sum."""

    segments: tuple[Term, ...]
    size: int

    def __repr__(self) -> str:
        return "[" + " + ".join(map(repr, self.segments)) + "]"


Term = Axis | Product | Sum
ONE = Product((), 1)
ZERO = Sum((), 0)


def make_axis(size: int) -> Term:
    """A fresh axis. Sizes 0 and 1 leave no choice, so they are constants."""
    return ZERO if size == 0 else ONE if size == 1 else Axis(size)


def make_product(terms: Iterable[Term]) -> Term:
    """Row-major product of terms, flattened."""
    factors: list[Term] = []
    for term in terms:
        factors.extend(term.factors if isinstance(term, Product) else (term,))
    size = math.prod(f.size for f in factors)
    if size == 0:
        return ZERO
    return factors[0] if len(factors) == 1 else Product(tuple(factors), size)


def concat(terms: Iterable[Term]) -> Term:
    """Sum of terms, flattened."""
    segments: list[Term] = []
    for term in terms:
        segments.extend(term.segments if isinstance(term, Sum) else (term,))
    return segments[0] if len(segments) == 1 else Sum(tuple(segments), sum(s.size for s in segments))


def find_root(a: Axis) -> Axis:
    """The representative of an axis's class."""
    root = a
    while root.parent is not None:
        root = root.parent
    # Path compression: the next search from any axis on the way takes one step.
    while a.parent is not None:
        a.parent, a = root, a.parent
    return root


def resolve(term: Term) -> Term:
    """The normal form: representatives only, bindings replaced, products and sums flat."""
    if isinstance(term, Axis):
        root = term if term.parent is None else find_root(term)
        if root.bound is None:
            return root
        root.bound = resolve(root.bound)  # kept, so that a chain of bindings is followed only once
        return root.bound
    parts = term.factors if isinstance(term, Product) else term.segments
    resolved = [resolve(p) for p in parts]
    # A term in normal form is returned itself, so that ``unify`` can compare by identity.
    for old, new in zip(parts, resolved, strict=True):
        if old is not new:
            return make_product(resolved) if isinstance(term, Product) else concat(resolved)
    return term


def list_axes(term: Term) -> list[Axis]:
    """The axes of a term in order. An axis that occurs twice is listed twice."""
    term = resolve(term)
    if isinstance(term, Axis):
        return [term]
    # One normal form and one list for the whole term, since this is called for every value.
    found: list[Axis] = []
    _collect(term, found)
    return found


def collect_axes(terms: Iterable[Term]) -> set[Axis]:
    """All axes of some terms."""
    return {leaf for term in terms for leaf in list_axes(term)}


def _collect(term: Product | Sum, found: list[Axis]) -> None:
    """Append the axes of a term in normal form."""
    for part in term.factors if isinstance(term, Product) else term.segments:
        if isinstance(part, Axis):
            found.append(part)
        else:
            _collect(part, found)


def freeze(term: Term, reason: str) -> None:
    """Forbid cutting any axis of ``term``."""
    for leaf in list_axes(term):
        if reason not in leaf.frozen:
            leaf.frozen.append(reason)


def add_role(term: Term, role: str) -> None:
    """Note a use of the axes of ``term``."""
    for leaf in list_axes(term):
        leaf.roles.add(role)


def require_size(term: Term, minimum: int) -> None:
    """Keep at least ``minimum`` positions of the largest axis of ``term``. If it has fewer, keep all axes whole."""
    # To bound the largest axis is enough: the other factors or segments only add positions.
    found = list_axes(term)
    largest = max(found, key=lambda leaf: leaf.size, default=None)
    for leaf in found:
        if leaf is largest or (largest is not None and largest.size < minimum):
            leaf.minimum = max(leaf.minimum, min(minimum, leaf.size))


def require_multiple(term: Term, multiple: int) -> None:
    """Keep the size of ``term`` a multiple of ``multiple``: each segment of a sum, a factor of a product."""
    term = resolve(term)
    if isinstance(term, Axis):
        term.multiple = math.lcm(term.multiple, multiple)
    elif isinstance(term, Sum):
        for segment in term.segments:
            require_multiple(segment, multiple)
    else:
        # One factor that is a multiple is enough. If none is, each has to be, which is strict but safe.
        carriers = [f for f in term.factors if f.size % multiple == 0]
        for factor in carriers[-1:] or term.factors:
            require_multiple(factor, multiple)


# ---- unification ----


def unify(a: Term, b: Term, where: object = "") -> None:
    """Make two terms of equal size equal, or freeze both if they cannot be aligned. ``where``: the op to name."""
    a, b = resolve(a), resolve(b)
    if a is b:
        return
    assert a.size == b.size, f"unify {a!r} with {b!r} at {where}"
    if isinstance(a, Axis):
        _bind(a, b, where)
    elif isinstance(b, Axis):
        _bind(b, a, where)
    elif isinstance(a, Product) and isinstance(b, Product):
        _unify_products(list(a.factors), list(b.factors), where)
    elif isinstance(a, Sum) and isinstance(b, Sum):
        _unify_sums(list(a.segments), list(b.segments), where)
    elif isinstance(a, Sum):
        assert isinstance(b, Product)
        _unify_sum_with_product(a, b, where)
    else:
        assert isinstance(a, Product)
        assert isinstance(b, Sum)
        _unify_sum_with_product(b, a, where)


def _bind(a: Axis, term: Term, where: object) -> None:
    if isinstance(term, Axis):
        a, term = (a, term) if a.id > term.id else (term, a)
        a.parent = term
    # The occurs check of type inference: an axis that is a part of itself would have no end.
    elif any(leaf is a for leaf in list_axes(term)):
        freeze(term, f"its layout contains itself ({where})")
        return
    else:
        a.bound = term
    # What was known of the axis now holds for all that it stands for.
    if a.frozen or a.roles:
        for leaf in list_axes(term):
            leaf.frozen.extend(r for r in a.frozen if r not in leaf.frozen)
            leaf.roles |= a.roles
    if a.minimum > 1:
        require_size(term, a.minimum)
    if a.multiple > 1:
        require_multiple(term, a.multiple)


def _freeze_misaligned(terms: Iterable[Term], where: object) -> None:
    for term in terms:
        freeze(term, f"a view or concatenation cuts across its boundaries ({where})")


def _unify_products(xs: list[Term], ys: list[Term], where: object) -> None:
    """Peel equal factors off either end; if sizes differ, split the larger one."""
    while xs and ys:
        # Both sides are read in row-major order, so equal sizes at either end are the same factor.
        for end in (0, -1):
            x, y = resolve(xs[end]), resolve(ys[end])
            if x.size == y.size:
                del xs[end], ys[end]
                unify(x, y, where)
                break
            large, small = (xs, ys) if x.size > y.size else (ys, xs)
            parts = split_product(resolve(large[end]), small[end].size, last=end == -1, where=where)
            if parts is not None:
                large[slice(-1, None) if end else slice(0, 1)] = parts
                break
        else:  # neither end divides: a view of [6, 4] as [4, 6]
            return _freeze_misaligned(xs + ys, where)
        # Unifying may have bound other factors of either side to products.
        xs, ys = _flatten_factors(xs), _flatten_factors(ys)
    assert not xs + ys
    return None


def _flatten_factors(terms: list[Term]) -> list[Term]:
    whole = make_product(resolve(t) for t in terms)
    return list(whole.factors) if isinstance(whole, Product) else [whole]


def split_product(term: Term, size: int, *, last: bool, where: object = "") -> list[Term] | None:
    """Split ``term`` into two factors, the first (or last) of ``size`` positions. None if that is impossible."""
    term = resolve(term)
    if size == 0 or term.size % size:
        return None
    rest = term.size // size
    outer_size, inner_size = (rest, size) if last else (size, rest)
    if outer_size == 1 or inner_size == 1:
        return [ONE, term] if outer_size == 1 else [term, ONE]
    if isinstance(term, Axis):
        outer, inner = make_axis(outer_size), make_axis(inner_size)
        _bind(term, make_product((outer, inner)), "view")
        return [outer, inner]
    if isinstance(term, Product):
        return _regroup(term, outer_size, where)
    # A sum splits if each segment consists of whole rows of the same inner term: A·Y + B·Y = (A + B)·Y.
    if any(segment.size % inner_size for segment in term.segments):
        return None
    parts = [split_product(segment, inner_size, last=True, where=where) for segment in term.segments]
    if any(p is None for p in parts):
        return None
    pairs = [p for p in parts if p is not None]
    for _, inner in pairs[1:]:
        unify(pairs[0][1], inner, where)
    return [concat(outer for outer, _ in pairs), pairs[0][1]]


def _regroup(term: Product, outer_size: int, where: object) -> list[Term] | None:
    """Split a product after factors of ``outer_size`` positions; the factor across the border is split itself."""
    outer: list[Term] = []
    factors = list(term.factors)
    while factors and outer_size % factors[0].size == 0:
        outer.append(factors.pop(0))
        outer_size //= outer[-1].size
    if outer_size == 1:
        return [make_product(outer), make_product(factors)]
    straddling = split_product(factors[0], outer_size, last=False, where=where)
    return (
        None
        if straddling is None
        else [make_product([*outer, straddling[0]]), make_product([straddling[1], *factors[1:]])]
    )


def _unify_sums(xs: list[Term], ys: list[Term], where: object) -> None:
    """Peel equal segments off the front; if sizes differ, cut the larger one."""
    # The front is enough here: a sum can be cut after any position that is not inside a unit.
    while xs and ys:
        x, y = resolve(xs[0]), resolve(ys[0])
        if x.size == y.size:
            del xs[0], ys[0]
            unify(x, y, where)
            continue
        large, small = (xs, ys) if x.size > y.size else (ys, xs)
        parts = split_sum(large[0], small[0].size)
        if parts is None:
            return _freeze_misaligned(xs + ys, where)
        large[0:1] = parts
        # The cut may have bound axes in later segments of both sides.
        for side in (xs, ys):
            whole = concat(resolve(t) for t in side)
            assert isinstance(whole, Sum)
            side[:] = whole.segments
    return None


def split_sum(term: Term, size: int) -> list[Term] | None:
    """Cut ``term`` after its first ``size`` positions. None if the cut falls inside a unit."""
    term = resolve(term)
    if size in (0, term.size):
        return [ZERO, term] if size == 0 else [term, ZERO]
    if isinstance(term, Axis):
        first, rest = make_axis(size), make_axis(term.size - size)
        _bind(term, concat((first, rest)), "slice")
        return [first, rest]
    if isinstance(term, Product):
        # Only the first factor can be cut: rows of the others belong together.
        head, inner = term.factors[0], make_product(term.factors[1:])
        if size % inner.size:
            return None
        parts = split_sum(head, size // inner.size)
        return None if parts is None else [make_product((p, inner)) for p in parts]
    # A sum: whole segments first, then the segment that the border is in.
    before: list[Term] = []
    after = list(term.segments)
    while size >= after[0].size:
        before.append(after.pop(0))
        size -= before[-1].size
    if size:
        parts = split_sum(after[0], size)
        if parts is None:
            return None
        before.append(parts[0])
        after[0] = parts[1]
    return [concat(before), concat(after)]


def _unify_sum_with_product(a: Sum, b: Product, where: object) -> None:
    """(A + B + …) = X·Y: each segment must split into rows of Y; then A/Y + B/Y + … = X."""
    # Y is all factors but the first or, if the segments do not split into that many rows, only the last.
    for inner in (make_product(b.factors[1:]), b.factors[-1]):
        parts = split_product(a, inner.size, last=True, where=where)
        if parts is not None:
            unify(parts[1], inner, where)
            outer = split_product(b, parts[0].size, last=False, where=where)
            if outer is not None:
                return unify(outer[0], parts[0], where)
            break
    return _freeze_misaligned([a, b], where)


# ---- index arithmetic: the positions of the axes at each position of a dimension ----

Index = npt.NDArray[np.int64]


def find_occurrences(term: Term) -> list[tuple[Axis, Index]]:
    """For each occurrence of an axis in ``term``: its coordinate at every position (−1 if absent)."""
    term = resolve(term)
    if isinstance(term, Axis):
        return [(term, np.arange(term.size))]
    found: list[tuple[Axis, Index]] = []
    if isinstance(term, Product):
        # Row-major: a coordinate repeats for each position of the later factors, and all of it for the earlier ones.
        repeat, tile = term.size, 1
        for factor in term.factors:
            repeat //= factor.size
            found += [(leaf, np.tile(np.repeat(c, repeat), tile)) for leaf, c in find_occurrences(factor)]
            tile *= factor.size
        return found
    start = 0
    for segment in term.segments:
        for leaf, coordinate in find_occurrences(segment):
            whole = np.full(term.size, -1)
            whole[start : start + segment.size] = coordinate
            found.append((leaf, whole))
        start += segment.size
    return found


def is_nested(term: Term, outer: Axis, inner: Axis) -> bool:
    """Whether each occurrence of ``inner`` in ``term`` is a factor within one of ``outer``, as in outer·(inner + …)."""
    term = resolve(term)
    if isinstance(term, Axis):
        return term is not inner
    if isinstance(term, Sum):
        return all(is_nested(s, outer, inner) for s in term.segments)
    return all(outer in term.factors[:i] or is_nested(f, outer, inner) for i, f in enumerate(term.factors))


def count_coordinates(terms: Iterable[Term], *, each: bool) -> dict[Axis, int]:
    """The number of coordinates along each axis.

    A position has a coordinate in each of ``terms`` (factors of a product, ``each``) or in one of them (segments of a
    sum).
    """
    counts: dict[Axis, int] = {}
    for term in map(resolve, terms):
        if isinstance(term, Axis):
            found = {term: 1}
        elif isinstance(term, Product):
            found = count_coordinates(term.factors, each=True)
        else:
            found = count_coordinates(term.segments, each=False)
        for a, n in found.items():
            counts[a] = counts.get(a, 0) + n if each else max(counts.get(a, 0), n)
    return counts


def compute_size(term: Term, sizes: Mapping[Axis, Size]) -> Size:
    """The size of ``term`` if the axes in ``sizes`` have these sizes and all others keep theirs."""
    term = resolve(term)
    if isinstance(term, Axis):
        return sizes.get(term, term.size)
    if isinstance(term, Product):
        return math.prod(compute_size(f, sizes) for f in term.factors)
    return sum(compute_size(s, sizes) for s in term.segments)
