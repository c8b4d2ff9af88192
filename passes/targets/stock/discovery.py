"""discovery: solve trial cuts of a model's families, each alone or with the partners that a stock class asks for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from passes.targets.stock.attempt import Refusal
from passes.targets.stock.config import attempts
from passes.targets.stock.solve import Expressions, Search
from passes.targets.stock.symbolic import Field, Reading, Shapes, SizeSlot, differences, starred

CutShapes = Callable[[Mapping[str, int]], Shapes]
"""Widths (missing families keep theirs) → shapes of the cut model's state dict."""
Widths = dict[str, int]


@dataclass
class Discovery:
    """What trial cuts say of the families.

    Attributes:
        reading, families, shapes, derived: as ``Stock.discover`` takes them.
        fixed: sizes of the leaf axes that belong to no family.
        real: whether each solution is built, since the class is not what its expressions say.
        refusals: family → why it cannot be cut alone.
        together: sets of families that the class can only cut together.
        solved: the trial cuts that have a config.
    """

    reading: Reading
    families: Mapping[str, int]
    fixed: Sequence[int]
    shapes: CutShapes
    derived: Mapping[str, str]
    real: bool
    refusals: dict[str, Refusal] = field(default_factory=dict)
    together: list[frozenset[str]] = field(default_factory=list)
    solved: list[Widths] = field(default_factory=list)
    _free: list[str] = field(default_factory=list)
    _moved: dict[Field, frozenset[SizeSlot]] = field(default_factory=dict)
    _tried: dict[frozenset[str], Refusal | None] = field(default_factory=dict)

    @cached_property
    def space(self) -> Expressions:
        """The expressions of the fields that are left."""
        return Expressions(self._fields(), self.families, self.fixed)

    @cached_property
    def touched(self) -> Mapping[str, frozenset[SizeSlot]]:
        """Family → the dimensions of weights that a cut of it changes."""
        dense = self.reading.dense.shapes
        trials = {name: trial_widths({name: width}) for name, width in self.families.items()}
        return {n: frozenset(differences(dense, self.shapes(t[0]))) if t else frozenset() for n, t in trials.items()}

    def run(self) -> None:
        """Try each family alone, then those that are refused with the owners of what their fields set."""
        for name in self.families:
            self._learn(frozenset((name,)))
        self._free = [name for name in self.refusals if name not in self.derived]
        self._moved = {each: self.reading.moved(each) for each in self.space.alive} if self._free else {}
        for name in self._free:
            for each, group in self._groups(name):
                if any(name in other for other in self.together):
                    break
                why = self._join(group)
                if why is not None and (stays := self._stays(each)):
                    why = Refusal("numeric", name, stays)
                if why is not None and why.kind == "numeric":
                    self.refusals[name] = why

    def _groups(self, name: str) -> Iterator[tuple[Field, frozenset[str]]]:
        """The groups of ``name``: for each field that sets some of its sizes the families that own the others.

        If these own more than the field sets, other fields must set that, and may bring families of their own: a second
        group. Fields that set the most come first. Last comes a pair with each owner.
        """
        shared = {each: len(places & self.touched[name]) for each, places in self._moved.items()}
        for each in sorted((f for f in shared if shared[f]), key=lambda f: -shared[f]):
            found = [group for small in (False, True) for group in self._grown(name, each, small)]
            found += [frozenset((name, n)) for n in self._free if self.touched[n] & self._moved[each]]
            yield from ((each, group) for group in dict.fromkeys(found) if len(group) > 1)

    def _grown(self, name: str, each: Field, small: bool) -> tuple[frozenset[str], frozenset[str]]:
        group = whole = self._owners(frozenset((name,)), self._moved[each], small)
        covered, others = self._moved[each], {f: places for f, places in self._moved.items() if f != each}
        while others and (left := self._owned(whole) - covered):
            best = max(others, key=lambda f: len(others[f] & left))
            places = others.pop(best)
            if not places & left:
                break
            whole, covered = self._owners(whole, places, small), covered | places
        return group, whole

    def _owners(self, group: frozenset[str], places: frozenset[SizeSlot], small: bool) -> frozenset[str]:
        """``group`` and the families that own the rest of ``places``, first where the fewest can.

        Sizes that no family owns stay, which other fields may see to. ``small``: of families that own as many of these
        sizes take the one that owns the fewest others.
        """
        while True:
            left = places - self._owned(group)
            owners = {place: [n for n in self._free if place in self.touched[n]] for place in sorted(left)}
            owned = [place for place in owners if owners[place]]
            if not owned:
                return group
            place = min(owned, key=lambda p: len(owners[p]))
            group |= {max(owners[place], key=lambda n: (len(self.touched[n] & left), -small * len(self.touched[n])))}

    def _owned(self, group: frozenset[str]) -> frozenset[SizeSlot]:
        """All dimensions that a cut of ``group`` changes."""
        return frozenset().union(*(self.touched[name] for name in group))

    def _stays(self, each: Field) -> str:
        """Which family that a field sets must stay, and why; "" if none must."""
        for name, why in self.derived.items():
            for place in sorted(self.touched.get(name, frozenset()) & self._moved[each]):
                return f"{each.name} also sets {starred(place[0])}, and {name} must stay: {why}"
        return ""

    def _fields(self) -> Iterator[Field]:
        """The reading's fields, with a field for each set of a list's entries that set sizes of the same families."""
        for each in self.reading.fields:
            parts: dict[frozenset[str], list[Field]] = {}
            for entry in self.reading.entries(each):
                moved = self.reading.moved(entry)
                parts.setdefault(frozenset(n for n, own in self.touched.items() if own & moved), []).append(entry)
            for part in parts.values():
                yield Field(each.path, each.value, tuple(i for e in part for i in e.items), each.implicit)

    def _learn(self, group: frozenset[str]) -> Refusal | None:
        """Cut the families of ``group`` in proportion, to two trial widths. Returns why the class can express neither.

        If it can express one, its fields' expressions are narrowed. If not, and the group is one family, the refusal is
        kept.
        """
        trials = trial_widths({name: self.families[name] for name in sorted(group)})
        if not trials:
            return Refusal("shape", min(group), "no common ratio gives whole numbers")
        failed = [why for widths in trials if (why := self._try(widths)) is not None]
        if len(failed) < len(trials):
            return None
        if len(group) == 1:
            self.refusals[min(group)] = failed[0]
        return failed[0]

    def _try(self, widths: Widths) -> Refusal | None:
        """Solve a trial cut and learn from it. Returns None, or why there is no solution."""
        search, refused = Search(self.reading, self.space, self.shapes(widths), widths), None
        for solution, found in attempts(search) if self.real else ((s, None) for s in search.solutions()):
            if found is None:
                self.space.observe(widths, solution)
                self.solved.append(widths)
                return None
            refused = refused or found
        return refused or search.reason()

    def _join(self, group: frozenset[str]) -> Refusal | None:
        """``_learn`` a group, once, and keep it in ``together`` if the class can express it."""
        if group not in self._tried:
            self._tried[group] = self._learn(group)
            if self._tried[group] is None:
                self.together.append(group)
        return self._tried[group]


def trial_widths(old: Mapping[str, int]) -> list[Widths]:
    """Up to two cuts of all families by one ratio, near two thirds and near one half, with integer widths."""
    width = next(iter(old.values()))
    possible = [w for w in range(1, width) if all(other * w % width == 0 for other in old.values())]
    nearest = [min(possible, key=lambda w: abs(w / width - ratio)) for ratio in (2 / 3, 1 / 2) if possible]
    return [{name: other * w // width for name, other in old.items()} for w in dict.fromkeys(nearest)]
