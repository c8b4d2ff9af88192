"""The axis algebra: unification of products and sums, and the index arithmetic on what it leaves."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from axis_terms import enumerate_positions, free, frozen, shape, terms
from hypothesis import given, settings
from hypothesis import strategies as st

from mptk.ir import (
    ONE,
    Axis,
    Product,
    Sum,
    compute_size,
    concat,
    count_coordinates,
    find_unit_positions,
    freeze,
    is_nested,
    list_axes,
    make_axis,
    make_product,
    require_multiple,
    require_size,
    resolve,
    split_product,
    split_sum,
    unify,
)
from mptk.ir.axes import ZERO, find_occurrences

# ---- constructors ----


def test_constructors_flatten_and_sizes_without_a_choice_are_constants():
    assert make_axis(0) is ZERO
    assert make_axis(1) is ONE
    assert isinstance(make_axis(2), Axis)
    a, b, c = make_axis(2), make_axis(3), make_axis(4)
    assert make_product((a, make_product((b, c)))) == Product((a, b, c), 24)
    assert make_product((ONE, a, ONE)) is a
    assert make_product((a, ZERO)) is ZERO
    assert concat((a, concat((b, c)))) == Sum((a, b, c), 9)
    assert concat((ZERO, a, ZERO)) is a
    assert concat((ONE, ONE)).size == 2
    assert make_product(()) == ONE
    assert concat(()) == ZERO


# ---- unification ----


def test_axes_merge_and_keep_what_was_known_of_either():
    a, b = Axis(6), Axis(6)
    freeze(a, "first")
    freeze(b, "second")
    b.roles.add("head")
    a.minimum, b.minimum = 2, 3
    unify(a, b)
    assert resolve(a) is resolve(b)
    merged = resolve(b)
    assert isinstance(merged, Axis)
    assert set(merged.frozen) == {"first", "second"}
    assert merged.roles == {"head"}
    assert merged.minimum == 3


def test_an_axis_takes_the_finer_form():
    a, b, c, d = Axis(24), Axis(2), Axis(3), Axis(4)
    unify(a, make_product((b, c, d)))
    assert shape(a) == "(a2·b3·c4)"
    e = Axis(24)
    unify(make_product((make_axis(6), make_axis(4))), e)
    unify(a, e)
    assert shape(e) == "(a2·b3·c4)"


def test_products_split_at_each_others_borders():
    a, b = make_product((Axis(4), Axis(6))), make_product((Axis(8), Axis(3)))
    unify(a, b)
    assert shape(a) == shape(b) == "(a4·b2·c3)"
    assert free(a, b)
    assert resolve(a) == resolve(b)


@pytest.mark.parametrize(
    ("one", "other", "same"), [((3, 4, 5), (2, 6, 5), 2), ((5, 4, 3), (5, 6, 2), 0)], ids=["the end", "the front"]
)
def test_products_align_from_the_side_that_fits(one, other, same):
    a, b = (make_product(tuple(map(Axis, sizes))) for sizes in (one, other))
    unify(a, b)
    assert resolve(a.factors[same]) is resolve(b.factors[same])
    assert resolve(a) != resolve(b)
    assert free(a.factors[same])
    assert frozen(*(factor for term in (a, b) for i, factor in enumerate(term.factors) if i != same))


def test_sums_split_at_each_others_borders():
    a, b = concat((Axis(4), Axis(6))), concat((Axis(7), Axis(3)))
    unify(a, b)
    assert shape(a) == shape(b) == "(a4 + b3 + c3)"
    assert free(a, b)


def test_a_sum_of_products_is_a_product():
    """[kv·hd + kv·hd] = (n·hd): the segments' rows are rows of the product."""
    kv, q, hd, rows, inner = Axis(2), Axis(6), Axis(8), Axis(8), Axis(8)
    fused = concat((make_product((q, hd)), make_product((kv, Axis(8)))))
    unify(fused, make_product((rows, inner)))
    assert shape(fused) == "((a6·b8) + (c2·b8))"
    assert shape(rows) == "(a6 + b2)"
    assert resolve(inner) is resolve(hd)
    assert free(fused)


def test_a_number_read_in_two_orders_is_frozen():
    whole = Axis(6)
    unify(whole, make_product((Axis(2), Axis(3))))
    assert free(whole)
    unify(whole, make_product((Axis(3), Axis(2))))
    assert frozen(whole)


def test_occurs_check():
    a = Axis(4)
    b = concat((a, ZERO, ZERO))
    unify(a, b)
    assert free(a)
    c = Axis(4)
    unify(Sum((c, ONE), 4), c)  # sizes made to agree: c = c + 1 has no solution
    assert frozen(c)


def test_misaligned_terms_are_frozen_on_both_sides_with_the_place():
    a, b = make_product((Axis(4), Axis(6))), make_product((Axis(6), Axis(4)))
    unify(a, b, "view_7")
    assert frozen(a, b)
    assert all("view_7" in reason for leaf in list_axes(a) for reason in leaf.frozen)
    c, d = concat((make_product((Axis(3), Axis(4))), Axis(5))), concat((Axis(10), Axis(7)))
    unify(c, d, "cat_3")
    assert frozen(c, d)


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_the_order_of_unifications_does_not_matter(order):
    whole, rows, columns = Axis(24), make_product((Axis(4), Axis(6))), make_product((Axis(2), Axis(12)))
    pairs = [(whole, rows), (whole, columns), (rows, columns)]
    for i in order:
        unify(*pairs[i])
    assert shape(whole) == shape(rows) == shape(columns) == "(a2·b2·c6)"


# ---- layouts of models ----


def test_rotate_half_ties_the_two_halves():
    """cat(−x[d/2:], x[:d/2]) + x·cos: the two halves are one axis."""
    head = Axis(8)
    first, second = split_sum(head, 4) or []
    unify(concat((second, first)), head)
    assert shape(head) == "(a4 + a4)"
    assert free(head)


def test_partial_rotary_ties_the_rotated_part_alone():
    head = Axis(10)
    turned, passed = split_sum(head, 4) or []
    first, second = split_sum(turned, 2) or []
    unify(concat((second, first, passed)), head)
    assert shape(head) == "(a2 + a2 + b6)"


def test_interleaved_fused_projection():
    """heads·(q + k + v): view [heads, 3·hd], chunk in three, then rotary pairs in q and k."""
    rows = Axis(72)
    heads, width = Axis(3), Axis(24)
    unify(rows, make_product((heads, width)))
    q, rest = split_sum(width, 8) or []
    k, v = split_sum(rest, 8) or []
    unify(q, k)  # contracted
    first, second = split_sum(q, 4) or []
    unify(first, second)
    assert shape(rows) == "(a3·(b4 + b4 + b4 + b4 + c8))"
    assert resolve(v).size == 8
    assert free(rows)


def test_grouped_fused_projection():
    """kv·((n + 1 + 1)·hd), picked by q = [:-2], k = [-2], v = [-1]: q, k and v share the head's channels by layout."""
    rows = Axis(2 * 5 * 8)
    kv, slots, hd = Axis(2), Axis(5), Axis(8)
    unify(rows, make_product((kv, slots, hd)))
    q, rest = split_sum(slots, 3) or []
    k, v = split_sum(rest, 1) or []
    assert k is ONE
    assert v is ONE
    first, second = split_sum(hd, 4) or []
    unify(first, second)
    assert shape(rows) == "(a2·(b3 + 1 + 1)·(c4 + c4))"
    assert resolve(q).size == 3


def test_fused_projection_of_segments():
    """[heads·hd + kv·hd + kv·hd] cut at segment borders, then viewed by head."""
    rows = Axis(6 * 8 + 2 * 8 + 2 * 8)
    q, rest = split_sum(rows, 48) or []
    k, v = split_sum(rest, 16) or []
    hd, kv = Axis(8), Axis(2)
    unify(q, make_product((Axis(6), hd)))
    unify(k, make_product((kv, hd)))
    unify(v, make_product((kv, Axis(8))))
    unify(resolve(q).factors[0], make_product((kv, Axis(3))))  # type: ignore[union-attr]
    assert shape(rows) == "((a2·b3·c8) + (a2·c8) + (a2·d8))"


# ---- splitting ----


def test_a_cut_inside_a_unit_is_refused():
    term = make_product((Axis(3), Axis(8)))
    assert split_sum(term, 12) is None
    assert [shape(p) for p in split_sum(term, 16) or []] == ["(a2·b8)", "a8"]
    assert [shape(p) for p in split_sum(term, 0) or []] == ["0", "((a2 + 1)·b8)"]
    assert [shape(p) for p in split_sum(term, 24) or []] == ["((a2 + 1)·b8)", "0"]


def test_a_cut_inside_the_first_of_several_segments_leaves_the_others_in_order():
    assert [shape(p) for p in split_sum(concat((Axis(4), Axis(2), Axis(3))), 1) or []] == ["1", "(a3 + b2 + c3)"]


def test_a_factor_that_does_not_divide_is_refused():
    assert split_product(Axis(10), 4, last=True) is None
    assert split_product(concat((Axis(4), Axis(6))), 4, last=True) is None
    assert split_product(ZERO, 0, last=True) is None
    term = make_product((Axis(4), Axis(6)))
    assert split_product(term, 1, last=True) == [term, ONE]
    assert [shape(p) for p in split_product(term, 3, last=True) or []] == ["(a4·b2)", "a3"]
    assert [shape(p) for p in split_product(term, 8, last=False) or []] == ["(a4·b2)", "a3"]


def test_what_must_stay_falls_on_the_largest_axis():
    a, b = Axis(4), Axis(6)
    whole = Axis(24)
    require_size(whole, 5)
    unify(whole, make_product((a, b)))
    assert (a.minimum, b.minimum) == (1, 5)
    c, d = Axis(4), Axis(6)
    require_size(make_product((c, d)), 7)
    assert (c.minimum, d.minimum) == (4, 6)


def test_multiples_fall_on_every_segment_and_on_one_factor():
    a, b, c, d = Axis(80), Axis(3), Axis(16), Axis(12)
    require_multiple(concat((a, a)), 8)
    assert a.multiple == 8
    whole = Axis(3 * 16)
    require_multiple(whole, 8)
    unify(whole, make_product((b, c)))
    assert (b.multiple, c.multiple) == (1, 8)
    require_multiple(make_product((b, d)), 8)
    assert (b.multiple, d.multiple) == (8, 8)


def test_enclosing_factors():
    a, b, c = Axis(2), Axis(3), Axis(4)
    assert is_nested(make_product((a, b)), a, b)
    assert not is_nested(make_product((b, a)), a, b)
    assert is_nested(make_product((a, concat((b, c)))), a, b)
    assert not is_nested(concat((make_product((a, b)), b)), a, b)
    assert is_nested(c, a, b)
    assert not is_nested(make_product((concat((a, c)), b)), a, b)


# ---- properties ----

sizes = st.sampled_from([2, 3, 4, 6, 8, 12, 24, 36])


@given(size=sizes, data=st.data())
@settings(max_examples=100)
def test_after_unifying_both_sides_are_equal_or_what_differs_is_frozen(size, data):
    """Sound: where the terms differ, no axis at that position may be cut."""
    a, b = data.draw(terms(size)), data.draw(terms(size))
    unify(a, b)
    assert resolve(a).size == resolve(b).size == size
    for left, right in zip(enumerate_positions(a), enumerate_positions(b), strict=True):
        left_free = {pair for pair in left if not pair[0].frozen}
        right_free = {pair for pair in right if not pair[0].frozen}
        assert left_free == right_free


@given(size=sizes, data=st.data())
@settings(max_examples=100)
def test_unifying_again_changes_nothing(size, data):
    a, b = data.draw(terms(size)), data.draw(terms(size))
    unify(a, b)
    before = shape(concat((a, b))), [bool(leaf.frozen) for leaf in list_axes(a)]
    unify(a, b)
    unify(b, a)
    assert before == (shape(concat((a, b))), [bool(leaf.frozen) for leaf in list_axes(a)])


@given(size=sizes, data=st.data())
@settings(max_examples=100)
def test_coordinates_are_those_of_enumeration(size, data):
    term = data.draw(terms(size, depth=3))
    found = find_occurrences(term)
    for position, expected in enumerate(enumerate_positions(term)):
        assert [(leaf, int(c[position])) for leaf, c in found if c[position] >= 0] == list(expected)


@given(size=sizes, data=st.data())
@settings(max_examples=80)
def test_units_lie_where_enumeration_says(size, data):
    term = data.draw(terms(size, depth=3))
    choices = list(dict.fromkeys(list_axes(term)))
    if not choices:
        return
    unit = data.draw(st.sampled_from(choices))
    found = find_unit_positions(term, unit)
    expected = [
        [p for p, pairs in enumerate(enumerate_positions(term)) if (unit, u) in pairs] for u in range(unit.size)
    ]
    assert np.array_equal(found, np.array(expected)[None])
    outside = [a for a in choices if a is not unit and is_nested(term, a, unit)]
    for scope in outside:
        table = find_unit_positions(term, unit, (scope,))
        assert table.shape[:2] == (scope.size, unit.size)
        for s in range(scope.size):
            assert set(table[s].flat) == {
                p
                for p, pairs in enumerate(enumerate_positions(term))
                if (scope, s) in pairs and pairs_hold(pairs, unit)
            }


def pairs_hold(pairs: tuple[tuple[Axis, int], ...], a: Axis) -> bool:
    return any(leaf is a for leaf, _ in pairs)


@given(size=sizes, data=st.data())
@settings(max_examples=100)
def test_sizes_after_a_cut_are_those_of_enumeration(size, data):
    """Keep the first units of each axis: the positions all whose coordinates stay."""
    term = data.draw(terms(size, depth=3))
    new = {leaf: data.draw(st.integers(1, leaf.size)) for leaf in dict.fromkeys(list_axes(term))}
    stays = [all(c < new[leaf] for leaf, c in pairs) for pairs in enumerate_positions(term)]
    assert compute_size(term, new) == sum(stays)
    assert compute_size(term, {}) == size == math.prod([size])


@pytest.mark.parametrize("number", [2, 3])
def test_what_ops_accept_stays_with_an_axis_that_takes_another_form(number):
    a, pair = make_axis(4 * 3), make_product((make_axis(4), make_axis(3)))
    require_size(a, number)
    require_multiple(a, number)
    unify(a, pair)
    assert max(leaf.minimum for leaf in list_axes(pair)) == number
    assert max(leaf.multiple for leaf in list_axes(pair)) == number


def test_coordinates_along_an_axis_are_counted():
    a, b = make_axis(4), make_axis(3)
    assert count_coordinates((a, make_product((a, b))), each=True) == {a: 2, b: 1}
    assert count_coordinates((concat((a, a)), b), each=True) == {a: 1, b: 1}
    assert count_coordinates((concat((make_product((a, a)), a)),), each=True) == {a: 2}


def test_terms_print_as_equations():
    a, b = Axis(4), Axis(3)
    assert repr(make_product((a, b))) == f"({a.id}(4)·{b.id}(3))"
    assert repr(concat((a, b))) == f"[{a.id}(4) + {b.id}(3)]"
    assert repr(ONE) == "1"
