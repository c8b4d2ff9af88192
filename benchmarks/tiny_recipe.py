"""Recipes: the liberties with sizes that a tiny config gives up, for a model that refuses them."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Recipe:
    """The liberties given up, for a model that refuses them.

    mha: as many key-value heads as heads; tied: heads x head size = hidden; related: widths keep their ratio to the
    hidden sizes; relations: sums and products of head sizes hold as in the default; derived: per-layer lists are left
    to the config class; filled: sizes that default to None get a value; twice: each kind of layer twice; wide: 12
    heads, that more numbers divide; alike: 6 heads everywhere, for head sizes that 4 divides (rotation on two axes).
    """

    mha: bool = False
    tied: bool = False
    related: bool = False
    relations: bool = False
    derived: bool = False
    filled: bool = False
    twice: bool = False
    wide: bool = False
    alike: bool = False


def recipes() -> Iterator[Recipe]:
    """All recipes that give up at most three liberties, fewest first."""
    names = [f.name for f in dataclasses.fields(Recipe)]
    for count in range(4):
        for chosen in itertools.combinations(names, count):
            yield Recipe(**dict.fromkeys(chosen, True))


def several_axes(rope: Mapping[str, Any] | None, head: int) -> dict[str, Any]:
    """Rotary settings that divide the rotated pairs of a head of that size among time, height and width."""
    given = dict(rope or {"rope_type": "default", "rope_theta": 10000.0})
    pairs = int(head * given.get("partial_rotary_factor", 1)) // 2
    third = pairs // 3
    return {**given, "mrope_section": [pairs - 2 * third, third, third]}
