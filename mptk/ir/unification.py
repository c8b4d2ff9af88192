"""unification: make two terms equal, by merging axes (union-find) or by *binding* an axis to a finer term.

If two terms cannot be aligned, a cut of their axes would not be sound. All their axes are frozen, with the reason.
"""

from __future__ import annotations

from collections.abc import Iterable

from mptk.ir.axes import (
    ONE,
    ZERO,
    Axis,
    Product,
    Sum,
    Term,
    concat,
    freeze,
    list_axes,
    make_axis,
    make_product,
    require_multiple,
    require_size,
    resolve,
)


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
    elif any(leaf is a for leaf in list_axes(term)):
        freeze(term, f"its layout contains itself ({where})")
        return
    else:
        a.bound = term
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
        else:
            return _freeze_misaligned(xs + ys, where)
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
        head, inner = term.factors[0], make_product(term.factors[1:])
        if size % inner.size:
            return None
        parts = split_sum(head, size // inner.size)
        return None if parts is None else [make_product((p, inner)) for p in parts]
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
    for inner in (make_product(b.factors[1:]), b.factors[-1]):
        parts = split_product(a, inner.size, last=True, where=where)
        if parts is not None:
            unify(parts[1], inner, where)
            outer = split_product(b, parts[0].size, last=False, where=where)
            if outer is not None:
                return unify(outer[0], parts[0], where)
            break
    return _freeze_misaligned([a, b], where)
