"""partners: which families a class can only cut together, by the dimensions that each of its fields sets.

A family that owns one of a field's dimensions can follow the field only together with the families that own the others
(a stage's channels and its feed-forward of four times the channels; all stages of a model whose first width gives the
others). If these own more than the field sets, other fields must set that, and may bring families of their own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from passes.targets.stock.attempt import Refusal
from passes.targets.stock.symbolic import Field, SizeSlot, starred

Places = frozenset[SizeSlot]
Moves = Mapping[Field, Places]


@dataclass(frozen=True)
class Owners:
    """Which families own which dimensions of the weights.

    Attributes:
        touched: family that the class cannot cut alone → the dimensions that its cut changes.
        fixed: the same for families that no stock class can follow.
        reasons: family of ``fixed`` → why.
    """

    touched: Mapping[str, Places]
    fixed: Mapping[str, Places]
    reasons: Mapping[str, str]

    def owned(self, group: frozenset[str]) -> Places:
        """All dimensions that a cut of ``group`` changes."""
        return frozenset().union(*(self.touched[name] for name in group))

    def extended(self, group: frozenset[str], moved: Places) -> frozenset[str] | SizeSlot:
        """``group`` and the families that own the rest of what a field moves; or the dimension that nothing owns.

        The dimension with the fewest possible owners is given one first: that which owns the most of the rest.
        """
        while left := moved - self.owned(group):
            owners = {place: [o for o, own in self.touched.items() if place in own] for place in sorted(left)}
            place = min(owners, key=lambda p: len(owners[p]))
            if not owners[place]:
                return place
            group |= {max(owners[place], key=lambda o: len(self.touched[o] & left))}
        return group

    def stuck(self, name: str, place: SizeSlot, field: Field) -> Refusal:
        """Why ``name`` cannot follow ``field``, which also moves ``place``."""
        what = f"{field.name} also sets {starred(place[0])}"
        owner = next((o for o, own in self.fixed.items() if place in own), None)
        if owner is None:
            return Refusal("shape", name, f"{what}, which no cut can follow")
        return Refusal("numeric", name, f"{what}, and {owner} must stay: {self.reasons[owner]}")


def groups(name: str, owners: Owners, moved: Moves) -> Iterator[frozenset[str] | Refusal]:
    """The groups of ``name``, one for each field that moves some of its dimensions; those that move the most first."""
    shared = {field: len(places & owners.touched[name]) for field, places in moved.items()}
    for field in sorted((f for f in shared if shared[f]), key=lambda f: -shared[f]):
        group = owners.extended(frozenset((name,)), moved[field])
        yield (
            _complete(group, field, owners, moved) if isinstance(group, frozenset) else owners.stuck(name, group, field)
        )


def _complete(group: frozenset[str], field: Field, owners: Owners, moved: Moves) -> frozenset[str]:
    """``group`` and the families that other fields bring, which move what ``field`` does not."""
    covered, free = moved[field], {f: places for f, places in moved.items() if f != field}
    while free and (left := owners.owned(group) - covered):
        best = max(free, key=lambda f: len(free[f] & left))
        places = free.pop(best)
        if not places & left:
            break
        more = owners.extended(group, places)
        if isinstance(more, frozenset):
            group, covered = more, covered | places
    return group
