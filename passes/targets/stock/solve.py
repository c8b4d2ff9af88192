"""solve: the numbers of a config that give a stock class the target's shapes, as products of axis sizes.

The class is not built: its shapes are expressions of the config's fields (``symbolic.py``).
"""

from __future__ import annotations

import copy
import heapq
import itertools
import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from passes.targets.stock.attempt import Refusal
from passes.targets.stock.symbolic import Assignment, Field, Reading, Shapes, Sizes, SizeSlot, differences, starred

Expression = tuple[str | int, ...]
"""A product of families' widths, by name, and fixed sizes, e.g. ``("kv_groups", "q_heads_per_group")``."""
FACTORS = 3
TRIALS = 400
"""Assignments that one search tries."""


class Expressions:
    """The possible products of every field. Each solution rules some out (a version space).

    A field of value v starts with the constant v and all products of at most 3 leaf sizes that equal v. ``grows``:
    families that become wider; only these count if they have one unit.
    """

    def __init__(
        self,
        fields: Iterable[Field],
        families: Mapping[str, int],
        fixed: Sequence[int],
        grows: Collection[str] = (),
    ) -> None:
        self.families = dict(families)
        leaves: list[tuple[str | int, int]] = [(n, width) for n, width in families.items() if width > 1 or n in grows]
        leaves += [(size, size) for size in sorted(set(fixed)) if size > 1]
        self._by_value: dict[int, list[Expression]] = {}
        for count in range(1, FACTORS + 1):
            for chosen in itertools.combinations_with_replacement(leaves, count):
                if any(isinstance(leaf, str) for leaf, _ in chosen):
                    product = math.prod(size for _, size in chosen)
                    self._by_value.setdefault(product, []).append(tuple(leaf for leaf, _ in chosen))
        self.alive = {field: self.of(field.value) for field in fields}

    def of(self, value: int) -> list[Expression]:
        """All expressions whose old product is ``value``: the constant first, then the others, shortest first."""
        return [(value,), *self._by_value.get(value, [])]

    def candidates(self, widths: Mapping[str, int]) -> dict[Field, list[int]]:
        """Field → its possible new values at ``widths``, without its old value."""
        found = {field: {evaluate(e, widths, self.families) for e in alive} for field, alive in self.alive.items()}
        return {field: sorted(values - {field.value}) for field, values in found.items() if values - {field.value}}

    def forced(self, widths: Mapping[str, int]) -> dict[Field, int]:
        """The values of the fields that earlier solutions made products of families."""
        found = {f: {evaluate(e, widths, self.families) for e in alive} for f, alive in self.alive.items()}
        return {f: min(values) for f, values in found.items() if values and (f.value,) not in self.alive[f]}

    def observe(self, widths: Mapping[str, int], assignment: Assignment) -> None:
        """Keep the expressions that agree with a model of these ``widths`` and of the fields in ``assignment``."""
        for field, alive in self.alive.items():
            value = assignment.get(field, field.value)
            self.alive[field] = [e for e in alive if evaluate(e, widths, self.families) == value]

    def observed(self, widths: Mapping[str, int], assignment: Assignment) -> Expressions:
        """A copy after ``observe``."""
        learned = copy.copy(self)
        learned.alive = dict(self.alive)
        learned.observe(widths, assignment)
        return learned

    def shortest(self, assignment: Assignment) -> dict[str, Expression]:
        """The shortest remaining expression of each field that is set."""
        return {key.name: self.alive[key][0] for key in assignment if self.alive.get(key)}

    def strange(
        self, widths: Mapping[str, int], dense: Sizes, cut: Sizes, sizes: Collection[tuple[int, int]]
    ) -> dict[str, str]:
        """The numbers of modules that the cut does not explain → what happens to them.

        An integer may change if it is an expression of the widths, or one of the ``sizes`` that the cut changes, old
        and new. Floats (an attention scale made from the head size) and unsaved tables (rotary frequencies) must not
        change: the cut model keeps their values, but the stock class would compute others.
        """
        found = {}
        for name, new in cut.numbers.items():
            old = dense.numbers.get(name, math.nan)
            if math.isnan(old) or math.isclose(old, new, rel_tol=1e-9):
                continue
            whole = isinstance(old, int) and isinstance(new, int) and not name.endswith("]")
            if not whole or ((old, new) not in sizes and not self._follows(old, new, widths)):
                found[name] = f"{starred(name)} changes from {old} to {new}"
        return found

    def _follows(self, old: float, new: float, widths: Mapping[str, int]) -> bool:
        return any(evaluate(e, widths, self.families) == new for e in self.of(int(old)))


def evaluate(expression: Expression, widths: Mapping[str, int], families: Mapping[str, int]) -> int:
    """The product. A family without an entry in ``widths`` has its old width."""
    return math.prod(leaf if isinstance(leaf, int) else widths.get(leaf, families[leaf]) for leaf in expression)


@dataclass(frozen=True)
class DeadEnd:
    """An assignment after which no field can correct ``place``. ``wrong``: the number of wrong dimensions."""

    assignment: Assignment
    place: SizeSlot
    wrong: int


class Search:
    """Best-first search for the fields that give ``target`` at ``widths``.

    A state is extended by the fields that its first wrong dimension depends on. If some wrong dimension depends on no
    field that is still free, the state is dropped. States with the fewest wrong dimensions come first, then those with
    the fewest changes.
    """

    def __init__(self, reading: Reading, space: Expressions, target: Shapes, widths: Mapping[str, int]) -> None:
        self.reading, self.space, self.target, self.widths = reading, space, target, widths
        self.candidates = space.candidates(widths)
        self.moves = {field: reading.moved(field) for field in self.candidates}
        self._wanted = reading.distinct(target)
        old = reading.dense.shapes
        self._sizes = {pair for name in old for pair in zip(old[name], target.get(name, ()), strict=False)}
        self._strange: Refusal | None = None
        self._dead: list[DeadEnd] = []

    def solutions(self) -> Iterator[dict[Field, int]]:
        """The assignments with the target's shapes whose numbers the cut explains, pins included."""
        for assignment in self._matches() if self.names() is None else ():
            solution = self._implied(assignment)
            odd = self.strange(self.reading.at(solution))
            if odd:
                name, what = next(iter(odd.items()))
                self._strange = self._strange or Refusal("numeric", starred(name), f"not the same function: {what}")
            else:
                yield solution
                yield from self._silent(solution)

    def _silent(self, solution: dict[Field, int]) -> Iterator[dict[Field, int]]:
        """The same with one more field set that changes no shape: the class may not take it unless they agree."""
        for field, values in self.candidates.items():
            for value in values if solution.get(field, field.value) == field.value else ():
                sizes = self.reading.at({**solution, field: value})
                if sizes != self.reading.at(solution) and not self._wrong(sizes) and not self.strange(sizes):
                    yield {**solution, field: value}

    def names(self) -> Refusal | None:
        """A weight that only the class, or only the target has."""
        stock = self.reading.dense.shapes
        for name in [*stock, *self.target]:
            if name not in self.target:
                return Refusal("names", name, "the stock class has this weight, the cut model does not")
            if name not in stock:
                return Refusal("names", name, "the cut model has this weight, the stock class does not")
        return None

    def strange(self, sizes: Sizes) -> dict[str, str]:
        """``Expressions.strange`` of the class at ``sizes``."""
        return self.space.strange(self.widths, self.reading.dense, sizes, self._sizes)

    def reason(self) -> Refusal:
        """Why there are no (other) solutions: a number, or the parameter that cannot fit."""
        if (refusal := self.names() or self._strange) is not None:
            return refusal
        dead = [d for d in self._dead if _changes(d.assignment)]
        if dead:
            best = min(dead, key=lambda d: (len(_changes(d.assignment)), d.wrong))
            name, setting = best.place[0], ", ".join(f"{f.name}={v}" for f, v in _changes(best.assignment).items())
            have = self.reading.at(best.assignment).shapes[name]
            what = f"{setting} would make it {have}, but the cut leaves {self.target[name]}"
            return Refusal("shape", starred(name), what)
        name, dimension = differences(self.reading.dense.shapes, self.target)[0]
        what = f"turns {self.reading.dense.shapes[name]} into {self.target[name]} (dimension {dimension})"
        return Refusal("shape", starred(name), f"no field of {type(self.reading.template).__name__} {what}")

    def _matches(self) -> Iterator[dict[Field, int]]:
        order = itertools.count()
        start = {**self.reading.pins, **self.space.forced(self.widths)}
        queue = [(len(self._wrong(self.reading.at(start))), 0, next(order), start)]
        seen = {frozenset(start.items())}
        while queue and next(order) < TRIALS:
            _, changes, _, assignment = heapq.heappop(queue)
            wrong = self._wrong(self.reading.at(assignment))
            if not wrong:
                yield assignment
                continue
            for successor in self._successors(assignment, wrong):
                key = frozenset(successor.items())
                if key not in seen:
                    seen.add(key)
                    heapq.heappush(
                        queue, (len(self._wrong(self.reading.at(successor))), changes + 1, next(order), successor)
                    )

    def _wrong(self, sizes: Sizes) -> list[SizeSlot]:
        return [(name, d) for (name, d), size in self._wanted.items() if d < 0 or sizes.shapes[name][d] != size]

    def _successors(self, assignment: dict[Field, int], wrong: list[SizeSlot]) -> Iterator[dict[Field, int]]:
        free = {field: v for field, v in self.candidates.items() if assignment.get(field, field.value) == field.value}
        reach: set[SizeSlot] = set().union(*(self.moves[field] for field in free))
        stuck = next((place for place in wrong if place not in reach), None)
        if stuck is not None:
            self._dead.append(DeadEnd(assignment, stuck, len(wrong)))
            return
        for field, values in free.items():
            if wrong[0] in self.moves[field]:
                yield from ({**assignment, field: value} for value in values)

    def _implied(self, solution: dict[Field, int]) -> dict[Field, int]:
        """Set fields that change no shape but that the cut implies (GPT-2's ``n_head`` if hidden = heads * size).

        Every number that a module keeps must be an expression of the widths. A field is set if it leaves fewer that
        are not.
        """
        best, odd = solution, self.strange(self.reading.at(solution))
        for field, values in self.candidates.items() if odd else ():
            for value in values if best.get(field, field.value) == field.value else ():
                sizes = self.reading.at({**best, field: value})
                remaining = self.strange(sizes)
                if len(remaining) < len(odd) and not self._wrong(sizes):
                    best, odd = {**best, field: value}, remaining
        return best


def minimised(reading: Reading, solution: Assignment) -> dict[Field, int]:
    """Drop every change and every pin that shapes and numbers do not need."""
    whole, kept = reading.at(solution), dict(solution)
    for key in list(solution):
        fewer = {other: value for other, value in kept.items() if other != key}
        if reading.at(fewer) == whole:
            kept = fewer
    return kept


def _changes(assignment: Assignment) -> dict[Field, int]:
    return {field: v for field, v in assignment.items() if v != field.value}
