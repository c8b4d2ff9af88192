"""search: the numbers of a config that give a stock class the target's shapes, as expressions of axis sizes."""

from __future__ import annotations

import copy
import heapq
import itertools
import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from passes.targets.stock.attempt import Refusal
from passes.targets.stock.probe import Assignment, Build, Field, Prober, Shapes, starred

Expression = tuple[str | int, ...]
"""A product of families' widths, by name, and fixed sizes, e.g. ``("kv_groups", "q_heads_per_group")``."""
SizeSlot = tuple[str, int]
"""One dimension of one parameter; dimension -1 if the number of dimensions differs."""
FACTORS = 3
SEARCH_BUILDS = 100
"""Models that one search builds. Those that find a config need a few tens at most (tests/test_stock_search.py)."""


class Expressions:
    """The possible products of every field. Each observed model rules some out (a version space).

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

    def allows(self, old: int, new: int, widths: Mapping[str, int]) -> bool:
        """Whether a number may change from ``old`` to ``new`` if the families have ``widths``."""
        return any(evaluate(e, widths, self.families) == new for e in self.of(old))


def evaluate(expression: Expression, widths: Mapping[str, int], families: Mapping[str, int]) -> int:
    """The product. A family without an entry in ``widths`` has its old width."""
    return math.prod(leaf if isinstance(leaf, int) else widths.get(leaf, families[leaf]) for leaf in expression)


@dataclass(frozen=True)
class DeadEnd:
    """An assignment after which no field can correct ``place``. ``wrong``: the number of wrong dimensions."""

    assignment: Assignment
    build: Build
    place: SizeSlot
    wrong: int


class ConfigSearch:
    """Best-first search for an assignment whose shapes are ``target``, guided by the shapes.

    One build for each field and candidate finds the dimensions that it moves. Each state is extended by the fields that
    move its first wrong dimension. If no free field moves some wrong dimension, the state is dropped. A field whose
    build raises or has other parameters, which another field may correct, moves what it does if it is doubled; if that
    raises, too, it may move anything. States with the fewest wrong dimensions come first, then those with the fewest
    changes. A state that raises counts as wrong what its fields, each alone, would leave wrong; it comes last if its
    last change alone makes nothing right.
    """

    def __init__(self, prober: Prober, target: Shapes, candidates: Mapping[Field, Sequence[int]]) -> None:
        self.prober, self.candidates = prober, candidates
        self.target = {name: target[name] for name in prober.base.shapes}
        self.raised: list[Refusal] = []
        self.dead: list[DeadEnd] = []
        self.effects = {
            (field, value): self._effect(field, value) for field, values in candidates.items() for value in values
        }
        self.moves = {change: None if sizes is None else frozenset(sizes) for change, sizes in self.effects.items()}

    def _effect(self, field: Field, value: int) -> Mapping[SizeSlot, int] | None:
        """The dimensions that a field moves → their sizes; in proportion to those with twice its value, if need be."""
        if (found := sizes_moved(self.prober, field, value)) is not None:
            return found
        if isinstance(built := self.prober.build({**self.prober.pins, field: value}), Refusal):
            self.raised.append(built)
        if (twice := sizes_moved(self.prober, field, 2 * field.value)) is None:
            return None
        base = self.prober.base.shapes
        return {
            (name, d): size if d < 0 else base[name][d] + (size - base[name][d]) * (value - field.value) // field.value
            for (name, d), size in twice.items()
        }

    def _expected(self, assignment: Assignment, successor: Assignment, wrong: Collection[SizeSlot]) -> int:
        """The rank of a ``successor`` that raises: last, unless its change makes something right."""
        left = self._left(successor, wrong)
        return 1 + (left if left < self._left(assignment, wrong) else len(wrong))

    def _left(self, assignment: Assignment, wrong: Collection[SizeSlot]) -> int:
        """How many of the ``wrong`` dimensions none of the changed fields alone would make right."""
        changed = [sizes for change in assignment.items() if (sizes := self.effects.get(change))]
        right = {place for sizes in changed for place in sizes if sizes[place] == _size(self.target, place)}
        return sum(place not in right for place in wrong)

    def wrong(self, built: Build | Refusal) -> list[SizeSlot] | None:
        """The wrong dimensions of a build; None if it raised or has other parameters."""
        if isinstance(built, Refusal) or built.shapes.keys() != self.target.keys():
            return None
        return differences(built.shapes, self.target)

    def matches(self) -> Iterator[dict[Field, int]]:
        """The assignments with the target's shapes, in the order of the search, until ``SEARCH_BUILDS`` are built."""
        order = itertools.count()
        start: dict[Field, int] = dict(self.prober.pins)
        all_wrong = self.wrong(self.prober.build(start)) or []
        queue: list[tuple[int, int, int, dict[Field, int]]] = [(len(all_wrong), 0, next(order), start)]
        seen = {frozenset(start.items())}
        limit = self.prober.builds + SEARCH_BUILDS
        while queue and self.prober.builds < limit:
            _, changes, _, assignment = heapq.heappop(queue)
            built = self.prober.build(assignment)
            wrong = self.wrong(built)
            if wrong == []:
                yield assignment
                continue
            for successor in self._successors(assignment, built, wrong):
                key = frozenset(successor.items())
                if key not in seen:
                    seen.add(key)
                    left = self.wrong(self.prober.build(successor))
                    now = self._expected(assignment, successor, all_wrong) if left is None else len(left)
                    heapq.heappush(queue, (now, changes + 1, next(order), successor))

    def _successors(
        self, assignment: dict[Field, int], built: Build | Refusal, wrong: list[SizeSlot] | None
    ) -> Iterable[dict[Field, int]]:
        free = {field: v for field, v in self.candidates.items() if assignment.get(field, field.value) == field.value}
        movers = {(field, v): self.moves[field, v] for field, values in free.items() for v in values}
        place: SizeSlot | None = None
        if wrong is not None and isinstance(built, Build):
            reach: set[SizeSlot] = set().union(*(moved for moved in movers.values() if moved is not None))
            stuck = next((p for p in wrong if p not in reach), None)
            if stuck is not None and None not in movers.values():
                self.dead.append(DeadEnd(assignment, built, stuck, len(wrong)))
                return
            place = stuck or wrong[0]
        for (field, value), moved in movers.items():
            if moved is None or place is None or place in moved:
                yield {**assignment, field: value}

    def reason(self) -> Refusal:
        """Why no assignment has the target's shapes: the constructor that raised, or the parameter that cannot fit."""
        changed = [d for d in self.dead if self._changes(d)]
        if changed:
            best = min(changed, key=lambda d: (len(self._changes(d)), d.wrong))
            param, want, have = self._sizes(best.build, best.place)
            setting = ", ".join(f"{field.name}={v}" for field, v in self._changes(best).items())
            return Refusal("shape", param, f"{setting} would make it {have}, but the cut leaves {want}")
        if self.raised:
            return self.raised[0]
        place = differences(self.prober.base.shapes, self.target)[0]
        param, want, have = self._sizes(self.prober.base, place)
        name = type(self.prober.template).__name__
        return Refusal("shape", param, f"no field of {name} turns {have} into {want} (dimension {place[1]})")

    def moved_by_dead_ends(self) -> frozenset[SizeSlot]:
        """All dimensions moved by fields that move a wrong one: these are tied to the cut in the stock class."""
        wrong = set(differences(self.prober.base.shapes, self.target))
        moved = [m for m in self.moves.values() if m is not None and wrong & m]
        return frozenset().union(*moved)

    def _changes(self, dead: DeadEnd) -> dict[Field, int]:
        return {field: v for field, v in dead.assignment.items() if v != field.value}

    def _sizes(self, built: Build, place: SizeSlot) -> tuple[str, tuple[int, ...], tuple[int, ...]]:
        return starred(place[0]), self.target[place[0]], built.shapes[place[0]]


def sizes_moved(prober: Prober, field: Field, value: int) -> dict[SizeSlot, int] | None:
    """The dimensions that a field moves with ``value`` → their sizes; None if the class raises or has other weights."""
    built = prober.build({**prober.pins, field: value})
    if isinstance(built, Refusal) or built.shapes.keys() != prober.base.shapes.keys():
        return None
    return {place: _size(built.shapes, place) for place in differences(built.shapes, prober.base.shapes)}


def _size(shapes: Shapes, place: SizeSlot) -> int:
    name, dimension = place
    return len(shapes[name]) if dimension < 0 else shapes[name][dimension]


def differences(shapes: Shapes, target: Shapes) -> list[SizeSlot]:
    """The dimensions in which ``shapes`` and ``target`` differ, in the order of ``shapes``. Their names are equal."""
    found: list[SizeSlot] = []
    for name, shape in shapes.items():
        wanted = target.get(name, ())
        if len(shape) != len(wanted):
            found.append((name, -1))
        else:
            found += [(name, d) for d, (a, b) in enumerate(zip(shape, wanted, strict=True)) if a != b]
    return found


def implied(
    search: ConfigSearch, expressions: Expressions, widths: Mapping[str, int], solution: dict[Field, int]
) -> dict[Field, int]:
    """Set fields that no shape depends on but that the cut implies (GPT-2's ``n_head`` if hidden = heads * size).

    Every number that a module keeps must be an expression of the widths. If some are not, fields without influence on
    shapes are tried. A field is set if it leaves fewer such numbers.
    """
    shapeless = [key for key, moved in search.moves.items() if moved == frozenset()]
    silent = [(field, value) for field, value in shapeless if field not in solution]
    best, odd = solution, strange_constants(search, expressions, widths, solution)
    for field, value in silent if odd else ():
        trial = {**best, field: value}
        built = search.prober.build(trial)
        if isinstance(built, Build) and built.shapes == search.target:
            remaining = strange_constants(search, expressions, widths, trial)
            if len(remaining) < len(odd):
                best, odd = trial, remaining
    return best


def strange_constants(
    search: ConfigSearch, expressions: Expressions, widths: Mapping[str, int], assignment: Assignment
) -> list[str]:
    """Descriptions of module constants that the assignment changes although the cut does not explain it.

    An integer may change if it is an expression of the widths, or a size that the cut changes the same way. Floats (an
    attention scale made from the head size) and unsaved tables (rotary frequencies) must not change: the cut model
    keeps their values, but the stock class would compute others.
    """
    old, built = search.prober.base, search.prober.build(assignment)
    if isinstance(built, Refusal):
        return []
    sizes = {pair for name, shape in old.shapes.items() for pair in zip(shape, search.target[name], strict=True)}
    changed = {
        name: (old.constants[name], new)
        for name, new in built.constants.items()
        if name in old.constants and old.constants[name] != new
    }
    return [
        f"{starred(name)} changes from {a} to {b}"
        for name, (a, b) in changed.items()
        if not (isinstance(a, int) and isinstance(b, int) and ((a, b) in sizes or expressions.allows(a, b, widths)))
    ]
