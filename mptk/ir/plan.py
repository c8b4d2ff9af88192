"""The plan: which units each family keeps. Methods write it; the cut reads nothing else from them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral
from pathlib import Path
from typing import Any

from mptk.arguments import guard_arguments
from mptk.errors import PlanError
from mptk.files import format_json, write_json
from mptk.files.outputs import check_file
from mptk.notebook import build_html, build_line, build_table
from mptk.plain import hash_text
from mptk.reading import read_json

PLAN_FORMAT = "mptk-plan/1"
_OWN = ("format", "meta", "families")
_UNIT = re.compile(r"[0-9]{1,18}")
LARGEST_FAMILY = 1 << 24
"""Units of the largest family."""
MOST_UNITS = 1 << 26
"""Kept units of a plan, over all layers."""
Keep = tuple[tuple[int, ...], ...]
"""Kept unit indices, ascending: one tuple for each scope position (one in all if the choice cannot vary)."""


@dataclass(frozen=True)
class FamilyPlan:
    """One family's choice: ``width`` of ``of`` units stay in each layer.

    ``keep``: layer's label → the units that stay, ascending, from 0: one tuple for each scope (each KV group, each
    expert), or one for all.
    """

    width: int
    of: int
    keep: Mapping[str, Keep]

    def __repr__(self) -> str:
        return f"FamilyPlan({self.width} of {self.of} in each of {len(self.keep)} layers)"


Entry = Mapping[str, object]
"""What a plan file says of a conversion, which its own code reads (``mptk/conversions``)."""


@dataclass(frozen=True)
class Plan:
    """Family name → its kept units. A family without an entry stays whole. ``meta``: free, nothing depends on it.

    ``conversions``: name → its entry. Families are those of the model after these.
    """

    families: Mapping[str, FamilyPlan]
    meta: Mapping[str, object] = field(default_factory=dict)
    conversions: Mapping[str, Entry] = field(default_factory=dict)

    def __repr__(self) -> str:
        widths = [f"{name} {each.width} of {each.of}" for name, each in self.families.items()]
        return f"Plan({', '.join([*widths, *self.conversions])})"

    def _repr_html_(self) -> str:
        rows = [[name, str(f.of), str(f.width), str(len(f.keep))] for name, f in self.families.items()]
        table = build_table(["family", "units of a layer", "kept", "layers"], rows)
        others = [build_line(f"and: {', '.join(self.conversions)}")] if self.conversions else []
        return build_html("Plan: the units that stay", table, *others)

    @property
    def widths(self) -> dict[str, int]:
        """Family name → units that stay in each layer."""
        return {name: family.width for name, family in self.families.items()}

    @property
    def digest(self) -> str:
        """SHA-256 of the kept units and the conversions."""
        families = self.to_json()["families"]
        kept = [families, *self.conversions.values()] if self.conversions else families
        return hash_text(format_json(kept, sort_keys=True))

    def to_json(self) -> dict[str, object]:
        """The content of a plan file (``docs/plan.md``)."""
        return {
            "format": PLAN_FORMAT,
            "meta": dict(self.meta),
            **self.conversions,
            "families": {
                name: {
                    "width": f.width,
                    "of": f.of,
                    "keep": {layer: _encode(keep) for layer, keep in f.keep.items()},
                }
                for name, f in self.families.items()
            },
        }

    @guard_arguments
    def save(self, path: str | Path, *, overwrite: bool = False) -> None:
        """Write the plan as JSON (schema: ``docs/plan.md``), atomically.

        ``overwrite``: replace a file that is no plan, too.

        Raises:
            MptkError: it cannot be written, or there is another file that is no plan.
        """
        check_file(path, "plan", overwrite)
        write_json(Path(path), self.to_json())

    @staticmethod
    @guard_arguments
    def load(path: str | Path) -> Plan:
        """Read and validate a plan file. Raises MptkError with the place of the mistake."""
        where = Path(path)
        data = read_json(
            where,
            lambda why: PlanError(
                f"cannot read plan {where}: {why}; give a plan.json, as docs/plan.md has it", name=where
            ),
        )
        return Plan.from_json(data, source=str(path))

    @staticmethod
    def from_json(data: object, *, source: str = "plan") -> Plan:
        """The plan in the content of a plan file. Raises MptkError with ``source`` and the place of the mistake."""
        if not isinstance(data, dict) or data.get("format") != PLAN_FORMAT:
            raise PlanError(f'{source}: "format" is not "{PLAN_FORMAT}"; see docs/plan.md', name=source)
        families = data.get("families")
        if not isinstance(families, dict):
            raise PlanError(f'{source}: "families" is not an object; see docs/plan.md', name=source)
        meta = data.get("meta", {})
        if not isinstance(meta, dict):
            raise PlanError(f'{source}: "meta" is not an object; see docs/plan.md', name=source)
        parsed, units = {}, 0
        for name, body in families.items():
            parsed[name] = read_family(body, f"{source}: families.{name}", MOST_UNITS - units)
            units += sum(len(row) for keep in parsed[name].keep.values() for row in keep)
        others = {name: body for name, body in data.items() if name not in _OWN and body is not None}
        for name, body in others.items():
            if not isinstance(body, dict):
                raise PlanError(f'{source}: "{name}" is not an object; see docs/plan.md', name=source)
        return Plan(parsed, meta, others)


def split_layer(name: str) -> tuple[str, str]:
    """``ffn.3`` → ``ffn`` and ``3``; a name without a number → itself and an empty string.

    Only an analysis knows whether there is such a layer: if a model has two families ``ffn``, they are ``ffn.1`` and
    ``ffn.2``.
    """
    family, _, layer = name.rpartition(".")
    return (family, layer) if family and layer.isdecimal() else (name, "")


def read_family(body: object, where: str, most: int = MOST_UNITS) -> FamilyPlan:
    """A family's choice, with at most ``most`` kept units in all, which are counted before they are listed."""
    if not isinstance(body, dict):
        raise PlanError(f"{where} is not an object; see docs/plan.md", name=where)
    width, of, keep = body.get("width"), body.get("of"), body.get("keep")
    if type(width) is not int or type(of) is not int or not 0 < width <= of:
        raise PlanError(f'{where}: "width" and "of" must be integers with 0 < width <= of', name=where)
    if of > LARGEST_FAMILY:
        raise PlanError(f'{where}: "of" is more than {LARGEST_FAMILY}; no family of a model is as large', name=where)
    if not isinstance(keep, dict) or not keep:
        raise PlanError(f'{where}: "keep" must map each layer to its kept units; see docs/plan.md', name=where)
    if width * sum(len(rows) if _has_scopes(rows) else 1 for rows in keep.values()) > most:
        raise PlanError(
            f"{where}: it keeps more than {MOST_UNITS} units, more than a model has; see docs/plan.md", name=where
        )
    return FamilyPlan(width, of, {layer: _decode(k, width, of, f"{where}.keep.{layer}") for layer, k in keep.items()})


def check_units(row: Sequence[int], width: int, of: int, where: str) -> None:
    """Raise MptkError, which names ``where``, unless ``row`` is ``width`` ascending, distinct units of 0 … of − 1."""
    if not isinstance(row, list | tuple) or not all(isinstance(unit, Integral) for unit in row):
        raise PlanError(
            f"{where}: a row is not a tuple of whole numbers; give the units that stay, ascending", name=where
        )
    if len(row) != width:
        raise PlanError(f"{where}: {len(row)} units kept, but width is {width}", name=where)
    if list(row) != sorted(set(row)) or row[0] < 0 or row[-1] >= of:
        raise PlanError(f"{where}: units must be ascending, distinct and in 0..{of - 1}", name=where)


def _encode(keep: Keep) -> str | list[str]:
    rows = [encode_ranges(row) for row in keep]
    return rows[0] if len(rows) == 1 else rows


def encode_ranges(units: tuple[int, ...]) -> str:
    """``(0, 1, 2, 5)`` → ``"0-2,5"``: short to read, to write and to diff."""
    parts: list[list[int]] = []
    for unit in units:
        if parts and unit == parts[-1][1] + 1:
            parts[-1][1] = unit
        else:
            parts.append([unit, unit])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in parts)


def _decode(value: Any, width: int, of: int, where: str) -> Keep:
    rows = tuple(_decode_units(row, width, of, where) for row in (value if _has_scopes(value) else [value]))
    for row in rows:
        check_units(row, width, of, where)
    return rows


def _has_scopes(value: object) -> bool:
    """Whether a layer has several rows of units."""
    return isinstance(value, list) and bool(value) and all(isinstance(row, (list, str)) for row in value)


def _decode_units(value: object, width: int, of: int, where: str) -> tuple[int, ...]:
    if isinstance(value, list) and all(isinstance(u, int) and not isinstance(u, bool) for u in value):
        return tuple(value)
    if not isinstance(value, str):
        raise PlanError(f'{where}: expected a list of integers or ranges such as "0-3,7"', name=where)
    units: list[int] = []
    for part in value.split(","):
        first, dash, last = part.strip().partition("-")
        if not _UNIT.fullmatch(first) or (dash and not _UNIT.fullmatch(last)):
            raise PlanError(f'{where}: "{part[:40]}" is not a unit or a range; write "0-3,7"', name=where)
        if int(last or first) >= of:
            raise PlanError(f"{where}: units must be ascending, distinct and in 0..{of - 1}", name=where)
        units.extend(range(int(first), int(last or first) + 1))
        if len(units) > width:
            raise PlanError(f"{where}: more units are kept than width, which is {width}", name=where)
    return tuple(units)
