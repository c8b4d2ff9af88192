"""stages: tell the entries of a config's list apart that have one value but set the widths of different families.

A list may hold one number for each layer of a family, which change together, or one for each stage of a network, whose
widths are families of their own. An entry that is doubled alone moves dimensions of weights; the families that own
these say which of the two it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from passes.targets.stock.probe import Field, Prober
from passes.targets.stock.search import SizeSlot, sizes_moved

Touched = Mapping[str, frozenset[SizeSlot]]
"""Family → the dimensions of weights that a cut of it changes."""


def apart(prober: Prober, touched: Touched) -> list[Field]:
    """The fields of ``prober``, with a field for each set of a list's entries that move the same families."""
    depths = {field.value for field in prober.depth}
    found: list[Field] = []
    for field in prober.fields:
        value = prober.lookup(field.path) if len(field.items) > 1 else None
        if not isinstance(value, list) or len(value) in depths:
            found.append(field)
            continue
        parts: dict[frozenset[str], list[int]] = {}
        for item in field.items:
            parts.setdefault(_moved(prober, replace(field, items=(item,)), touched), []).append(item)
        found += [replace(field, items=tuple(items)) for items in parts.values()]
    return found


def _moved(prober: Prober, entry: Field, touched: Touched) -> frozenset[str]:
    """The families of whose dimensions the entry moves some; none if the class cannot be built so."""
    moved = sizes_moved(prober, entry, 2 * entry.value) or {}
    return frozenset(name for name, own in touched.items() if own & moved.keys())
