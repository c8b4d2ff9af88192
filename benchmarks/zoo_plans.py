"""Random plans for the zoo: units drawn anew for every layer and every row of its scope."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

from mptk.ir import Analysis, Depth, Family, FamilyPlan, Plan


def random_plan(families: Sequence[Family], rng: random.Random, fraction: float = 0.6) -> Plan:
    """Keep about ``fraction`` of each family's units."""
    return Plan({f.name: draw(f, legal_width(f, fraction), rng) for f in families})


def plan_of_widths(analysis: Analysis, widths: Mapping[str, int], rng: random.Random) -> Plan:
    """Keep ``widths`` (family name → units)."""
    return Plan({name: draw(analysis.family(name), width, rng) for name, width in widths.items()})


def draw(family: Family, width: int, rng: random.Random) -> FamilyPlan:
    """``width`` units of each layer, and of each row of its scope; blocks that must stay are among them."""
    stay = list(family.stack.stay) if isinstance(family, Depth) else []
    free = [unit for unit in range(family.size) if unit not in stay]
    keep = {
        group.layer: tuple(tuple(sorted([*stay, *rng.sample(free, width - len(stay))])) for _ in range(group.scopes))
        for group in family.groups
    }
    return FamilyPlan(width, family.size, keep)


def legal_widths(family: Family) -> range:
    """The widths below its size that the graph's ops accept."""
    smallest = -(-family.minimum // family.multiple) * family.multiple
    return range(smallest, family.size, family.multiple)


def legal_width(family: Family, fraction: float) -> int:
    """The legal width nearest below ``fraction`` of the family's size, at least its smallest one."""
    smallest = -(-family.minimum // family.multiple) * family.multiple
    wanted = round(family.size * fraction) // family.multiple * family.multiple
    return min(max(wanted, smallest), family.size - family.multiple)
