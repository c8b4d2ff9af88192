"""discovery: solve trial cuts of a model's families, each alone or with the partners that a stock class asks for."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from passes.targets.stock.attempt import Refusal
from passes.targets.stock.config import attempts
from passes.targets.stock.partners import Owners, groups
from passes.targets.stock.solve import Expressions, Search
from passes.targets.stock.symbolic import Field, Reading, Shapes, SizeSlot, differences

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
    _failed: dict[str, Search] = field(default_factory=dict)
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
        refused = [name for name in self.refusals if name not in self.derived]
        own = {n: self.touched[n] for n in refused}
        owners = Owners(own, {n: self.touched[n] for n in self.derived if n in self.touched}, self.derived)
        moved = {each: self.reading.moved(each) for each in self.space.alive} if refused else {}
        for name in refused:
            for group in groups(name, owners, moved):
                if any(name in other for other in self.together) or group == frozenset((name,)):
                    break
                why = group if isinstance(group, Refusal) else self._join(group)
                if why is not None and why.kind == "numeric":
                    self.refusals[name] = why
        for name in refused:
            for group in () if any(name in other for other in self.together) else self._partners(name):
                if self._join(group) is None:
                    break

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
            self.refusals[min(group)], self._failed[min(group)] = failed[0]
        return failed[0][0]

    def _try(self, widths: Widths) -> tuple[Refusal, Search] | None:
        """Solve a trial cut and learn from it. Returns None, or why there is no solution."""
        search, refused = Search(self.reading, self.space, self.shapes(widths), widths), None
        for solution, found in attempts(search) if self.real else ((s, None) for s in search.solutions()):
            if found is None:
                self.space.observe(widths, solution)
                self.solved.append(widths)
                return None
            refused = refused or found
        return refused or search.reason(), search

    def _join(self, group: frozenset[str]) -> Refusal | None:
        """``_learn`` a group, once, and keep it in ``together`` if the class can express it."""
        if group not in self._tried:
            self._tried[group] = self._learn(group)
            if self._tried[group] is None:
                self.together.append(group)
        return self._tried[group]

    def _partners(self, name: str) -> list[frozenset[str]]:
        """Groups in which the class may be able to express a refused family.

        1. The family with one other refused family that shares a weight with it, or whose sizes its fields set.
        2. The family with all refused families whose sizes its fields set.
        """
        tied, own = self._failed[name].tied(), {weight for weight, _ in self.touched[name]}
        touched = {other: self.touched[other] for other in self.refusals if other != name}
        shaped = {other for other, places in touched.items() if places & tied}
        sharing = {other for other, places in touched.items() if own & {weight for weight, _ in places}}
        pairs = [frozenset((name, other)) for other in sorted(shaped | sharing)]
        return [*pairs, frozenset((name, *shaped))] if shaped else pairs


def trial_widths(old: Mapping[str, int]) -> list[Widths]:
    """Up to two cuts of all families by one ratio, near two thirds and near one half, with integer widths."""
    width = next(iter(old.values()))
    possible = [w for w in range(1, width) if all(other * w % width == 0 for other in old.values())]
    nearest = [min(possible, key=lambda w: abs(w / width - ratio)) for ratio in (2 / 3, 1 / 2) if possible]
    return [{name: other * w // width for name, other in old.items()} for w in dict.fromkeys(nearest)]
