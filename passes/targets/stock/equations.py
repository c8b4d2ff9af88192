"""equations: what the sizes of a stock class say of its config's fields, as linear equations between logarithms.

A size of the class grows with the fields that it is made of (``Reading.exponents``), and the same size of the cut
model grows with the widths of its families. Both must be equal: one equation a dimension. Numbers that modules keep
give more: the cut model keeps an attention's scale and its rotary tables, so what they are made of must stay.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property

from passes.targets.stock.attempt import Refusal
from passes.targets.stock.symbolic import Field, Reading, Sizes, SizeSlot, WeightShapes, replace_indices

CutShapes = Callable[[Mapping[str, int]], WeightShapes]
"""Widths (missing families keep theirs) → shapes of the cut model's state dict."""
Exponents = dict[Hashable, Fraction]
"""A sum that is zero: unknown → its factor. Unknowns are logarithms: a field's, a family's."""
Grown = Mapping[SizeSlot, Exponents]
"""Dimension of a weight → the families that it grows with, with exponents."""
FACTORS = 3
"""How many axis sizes a number may be the product of, such as KV heads · heads in a group · size of a head."""


class Echelon:
    """Equations, each solved for its first unknown in ``order`` that no other is solved for."""

    def __init__(self, order: Sequence[Hashable]) -> None:
        self._rank = {unknown: rank for rank, unknown in enumerate(order)}
        self.solved: dict[Hashable, Exponents] = {}

    def reduce_row(self, row: Mapping[Hashable, Fraction]) -> Exponents:
        """What the equations leave of a row: only unknowns that none is solved for."""
        found = dict(row)
        for unknown in row.keys() & self.solved.keys():
            _subtract(found, self.solved[unknown], found[unknown])
        return found

    def add(self, row: Mapping[Hashable, Fraction]) -> None:
        """Add an equation."""
        left = self.reduce_row(row)
        if left:
            # Solve it for its first unknown, and take that out of the other equations, which then stay solved.
            first = min(left, key=lambda unknown: self._rank.get(unknown, len(self._rank)))
            own = {unknown: factor / left[first] for unknown, factor in left.items()}
            for other in self.solved.values():
                _subtract(other, own, other.get(first, Fraction(0)))
            self.solved[first] = own

    def of(self, unknown: Hashable) -> Exponents:
        """A solved unknown as a sum of those that are not."""
        return {other: -factor for other, factor in self.solved[unknown].items() if other != unknown}


def _subtract(row: Exponents, other: Exponents, times: Fraction) -> None:
    for unknown, factor in other.items() if times else ():
        row[unknown] = row.get(unknown, Fraction(0)) - times * factor
        if not row[unknown]:
            del row[unknown]


class WidthProducts:
    """The products of axis sizes that a number of a module may be, and so may follow.

    ``grows``: families that become wider; only these count if they have one unit.
    """

    def __init__(self, families: Mapping[str, int], fixed: Sequence[int], grows: Collection[str] = ()) -> None:
        # A size of 1 would be a factor of every number.
        self.families = families
        leaves: list[tuple[str | None, int]] = [(n, width) for n, width in families.items() if width > 1 or n in grows]
        leaves += [(None, size) for size in sorted(set(fixed)) if size > 1]
        self._of: dict[int, list[Exponents]] = {}
        for count in range(1, FACTORS + 1):
            for chosen in itertools.combinations_with_replacement(leaves, count):
                names = Counter(name for name, _ in chosen if name is not None)
                if names:  # a product of fixed sizes only does not follow any width
                    row: Exponents = {name: Fraction(times) for name, times in names.items()}
                    self._of.setdefault(math.prod(size for _, size in chosen), []).append(row)

    def of(self, value: float) -> list[Exponents]:
        """The families, with exponents, that are factors of ``value``."""
        return self._of.get(int(value), [])

    def find_unexplained(self, dense: Sizes, cut: Sizes, widths: Mapping[str, int]) -> Refusal | None:
        """A number of a module that the cut does not explain.

        An integer may change if it is a product of widths, or a size that the cut changes. Floats (an attention scale
        made from the head size) and unsaved tables (rotary frequencies) must not change: the cut model keeps their
        values, but the stock class would compute others.
        """
        ratios: Exponents = {name: Fraction(width, self.families[name]) for name, width in widths.items()}
        # (old, new) of each size of a weight. A module may keep such a size as a number.
        sizes = {pair for name, old in dense.shapes.items() for pair in zip(old, cut.shapes[name], strict=True)}
        for name, new in cut.numbers.items():
            old = dense.numbers.get(name, math.nan)
            if math.isnan(old) or math.isclose(old, new, rel_tol=1e-9):
                continue
            may = is_width(name, old) and (
                (old, new) in sizes or any(compute_scaled(old, r, ratios) == new for r in self.of(old))
            )
            if not may:
                what = f"it changes from {old} to {new}, so the class computes another function"
                return Refusal("numeric", replace_indices(name), what)
        return None


def is_width(name: str, value: float) -> bool:
    """Whether a number of a module may follow a width: an integer, but not a size of a table (``name[0]``)."""
    return isinstance(value, int) and not name.endswith("]")


def compute_scaled(value: float, exponents: Exponents, ratios: Exponents) -> Fraction | None:
    """``value`` times the product of powers of the ratios; None if that is not rational."""
    # Powers of equal ratios are added first: two square roots of one ratio give a whole power.
    powers = Counter[Fraction]()
    for unknown, exponent in exponents.items():
        powers[ratios.get(unknown, Fraction(1))] += exponent  # type: ignore[assignment]
    if any(ratio != 1 and Fraction(power).denominator != 1 for ratio, power in powers.items()):
        return None
    return Fraction(value) * math.prod(ratio ** int(power) for ratio, power in powers.items())


@dataclass(frozen=True)
class Equation:
    """A place whose number grows with ``fields`` in the class, and as ``wanted`` in the cut model.

    ``integer``: the number, if it is an integer that a module keeps; it may follow a width.
    """

    place: SizeSlot | str
    fields: Exponents
    wanted: Exponents
    integer: int | None

    @property
    def row(self) -> Exponents:
        return self.fields | {unknown: -factor for unknown, factor in self.wanted.items()}


def list_equations(reading: Reading, grown: Grown) -> list[Equation]:
    """All different equations of a class. A size of 1 that stays is left out: what it is made of may be rounded."""
    found = dict[Hashable, Equation]()
    for place, own in reading.list_exponents():
        fields, grows, integer = dict[Hashable, Fraction](own.items()), Exponents(), None
        if isinstance(place, tuple):
            grows = grown.get(place, {})
            if not grows and reading.dense.shapes[place[0]][place[1]] == 1:
                continue
        elif is_width(place, value := reading.dense.numbers[place]):
            integer = int(value)
        if fields or grows:
            key = frozenset(fields.items()), frozenset(grows.items()), integer
            found.setdefault(key, Equation(place, fields, grows, integer))
    return [*found.values()]


class Law:
    """How the fields of a class follow the widths of a model's families, and which of these it ties together.

    ``products``: what the numbers of modules may be. ``fixed``: families that must stay; None: neither these nor the
    numbers of modules count.

    Attributes:
        fields: field → families whose width it grows with, with exponents.
        ties: sums of families that are zero.
    """

    def __init__(self, reading: Reading, products: WidthProducts, grown: Grown, fixed: Collection[str] | None) -> None:
        self.reading, self.products, self.grown, families = reading, products, grown, products.families
        # Sizes of weights and real numbers must be as the equations say. An integer that a module keeps may also follow
        # a width (``_explain``).
        every = list_equations(reading, grown)
        every = [each for each in every if fixed is not None or not isinstance(each.place, str)]
        others = [each for each in every if each.integer is None]
        # If an equation has several fields, one of the config follows the width before an implicit one, and one of few
        # equations before one of many. An equation without a field that is free is solved for a family: it is a tie.
        count = Counter(field for each in others for field in each.fields)
        fields = {field: count[field] for each in every for field in each.fields}
        self._echelon = Echelon([*sorted(fields, key=lambda f: (f in reading.pins, fields[f], str(f))), *families])
        stay: list[Exponents] = [{name: Fraction(1)} for name in fixed or ()]
        for row in (*stay, *(equation.row for equation in others)):
            self._echelon.add(row)
        # A field that is not a multiple of the widths that it would follow stays, or follows others.
        for field in [field for field in self._echelon.solved if isinstance(field, Field)]:
            self._explain({field: Fraction(1)}, field.value, products.of(field.value))
        # The integers of modules that are not settled by now follow a product of widths, or a size, that is equal.
        sizes = dict[int, list[Exponents]]()
        for (name, dimension), row in grown.items():
            sizes.setdefault(reading.dense.shapes[name][dimension], []).append(row)
        for each in every:
            if each.integer is not None and any(
                isinstance(key, Field) for key in self._echelon.reduce_row(each.fields)
            ):
                like = [*products.of(each.integer), *sizes.get(each.integer, [])]
                self._explain(each.fields, each.integer, like)
        solved = self._echelon.solved
        self.fields = {field: self._echelon.of(field) for field in solved if isinstance(field, Field)}
        self.ties = [row for unknown, row in solved.items() if isinstance(unknown, str)]

    def _explain(self, number: Exponents, value: int, products: Sequence[Exponents]) -> None:
        """Make a number that is not a multiple of the widths that it follows stay, or follow one of ``products``.

        A multiple stays, too, if a factor of the same size equals the widths: of 6 heads of 12 channels, the heads do.
        """
        # The families that the equations have it follow, and the product of their widths.
        left = self._echelon.reduce_row(number)
        now: Exponents = {name: factor for name, factor in left.items() if isinstance(name, str)}
        least = math.prod(self.products.families[str(name)] ** max(factor, Fraction(0)) for name, factor in now.items())
        if value % least == 0 and all(factor > 0 for factor in now.values()):
            if now and value != least and any(isinstance(other, Field) and other.value == least for other in left):
                self._echelon.add(number)
            return
        # The product that leaves the fewest families; none, that is to stay, if each leaves as many.
        best, most = dict[Hashable, Fraction](), len(now)
        for row in products:
            rest = {**now}
            _subtract(rest, self._echelon.reduce_row(row), Fraction(1))
            if len(rest) < most:
                best, most = row, len(rest)
        if most:
            self._echelon.add(number | {name: -factor for name, factor in best.items()})

    def find_fields(self, widths: Mapping[str, int]) -> dict[Field, int] | Refusal:
        """The fields that ``widths`` change, and all implicit ones."""
        ratios: Exponents = {name: Fraction(width, self.products.families[name]) for name, width in widths.items()}
        # First the ties, whose refusal names the families.
        for tie in self.ties:
            if tie.keys() & widths.keys() and compute_scaled(1, tie, ratios) != 1:
                names, config = " and ".join(sorted(map(str, tie))), type(self.reading.template).__name__
                if len(tie) == 1:
                    return Refusal("shape", config, f"no field sets the sizes of {names} and no others")
                where = next((field.name for field, row in self.fields.items() if row.keys() & tie.keys()), config)
                return Refusal("shared", where, f"{names} are one number in the config and must be cut in proportion")
        # Implicit fields keep their values, unless they follow a width.
        found = {pin: pin.value for pin in self.reading.pins}
        for field, row in self.fields.items():
            value = compute_scaled(field.value, row, ratios)
            if value is None or value.denominator != 1 or value < 1:
                cut = ", ".join(f"{name}={width}" for name, width in widths.items())
                return Refusal("shape", field.name, f"no whole number of it gives the widths {cut}")
            if value != field.value:
                found[field] = int(value)
        return found

    @cached_property
    def free(self) -> Law:
        """The law without fixed families and numbers of modules."""
        return Law(self.reading, self.products, self.grown, None)

    def group(self, name: str, last: Sequence[str] = ()) -> frozenset[str] | None:
        """A family and the fewest that must be cut with it, in proportion; None if there are none such.

        A family in ``last`` is taken only if there is no other way. So is one that would have to grow if ``name``
        shrinks.
        """
        # Solve the ties in an order in which ``last`` and ``name`` stay free if they can. The group is what then
        # follows ``name``. A family with another exponent than 1 is not in proportion: it goes last, and the ties are
        # solved again.
        last, odd = [*last], [name]
        while odd:
            last += odd
            echelon = Echelon([*(other for other in self.products.families if other not in last), *last[::-1], name])
            for tie in self.ties:
                echelon.add(tie)
            found = {str(other): -row[name] for other, row in echelon.solved.items() if name in row and other != name}
            odd = [other for other, exponent in found.items() if exponent != 1 and other not in last]
        # A tie that does not add up to 0 within the group needs its other families.
        group = {name, *found}
        while unequal := [tie for tie in self.ties if sum(tie.get(other, 0) for other in group)]:
            if all(tie.keys() <= group for tie in unequal):
                return None
            group |= {str(other) for tie in unequal for other in tie}
        return frozenset(group)


def find_growth(dense: WeightShapes, families: Mapping[str, int], shapes: CutShapes) -> dict[SizeSlot, Exponents]:
    """Each size → the families that it grows with, with exponents: 1 for a size that is the width times a constant.

    An exponent is d log size / d log width at the dense width. The sizes at 1, 2 and 3 times the width give the
    derivative exactly, up to squares.
    """
    found: dict[SizeSlot, Exponents] = {}
    for family, width in families.items():
        twice, thrice = shapes({family: 2 * width}), shapes({family: 3 * width})
        for name, shape in dense.items():
            for d, (one, two, three) in enumerate(zip(shape, twice[name], thrice[name], strict=True)):
                if two != one:
                    found.setdefault((name, d), {})[family] = Fraction(4 * two - three - 3 * one, 2 * one)
    return found
