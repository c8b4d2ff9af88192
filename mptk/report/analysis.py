"""analysis: the families that can be cut and the axes that cannot, as JSON data and as a view."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict

from mptk.cost.model import CostModel
from mptk.ir import Analysis, Family
from mptk.protocols import Row
from mptk.report.runs import shorten_model_name
from mptk.report.view import Name, Section, Table, View, format_ranges
from passes.targets.legalize import LegalWidths
from passes.targets.width_choices import find_missing_partners

ANALYSIS = "mptk-analysis/1"


def build_analysis_json(
    analysis: Analysis, legal: LegalWidths, model: str, parts: Sequence[Mapping[str, object]] = ()
) -> dict[str, object]:
    """The JSON of ``mptk analyze --json`` (``docs/analysis.md``): the families, and the axes that cannot be cut.

    ``parts``: a row for each part of the model.
    """
    cost = CostModel(analysis)
    # Blocks that must stay are listed beside the axes that must, as they have a reason, too.
    blocked = [asdict(axis) for axis in analysis.blocked]
    for f in analysis.depths:
        for unit, why in f.stack.stay.items():
            weights = [f"{f.groups[0].layer}.{unit}"]
            blocked.append({"name": f"{f.name} {unit}", "size": 1, "weights": weights, "reasons": [why]})
    return {
        "format": ANALYSIS,
        "model": model,
        "parameters": cost.dense.parameters,
        "block_parameters": cost.dense.block,
        "parts": list(parts),
        "families": [_convert_family(family, cost, legal) for family in analysis.all_families],
        "blocked": blocked,
    }


def _convert_family(family: Family, cost: CostModel, legal: LegalWidths) -> dict[str, object]:
    # A unit is what one step of the width removes in one layer, with its weights in all matrices of the group.
    name = family.name
    return {
        "name": name,
        "description": family.description,
        "width": family.size,
        "layers": len(family.groups),
        "scopes": family.scopes,
        "parameters_per_unit": cost.count_unit_parameters(family),
        "share": 1 - cost({name: 0}).parameters / cost.dense.parameters,
        "minimum": family.minimum,
        "multiple": family.multiple,
        "legal_widths": list(legal.ladders.get(name, ())),
        "refused": legal.refused.get(name),
        "together": sorted(find_missing_partners(name, {name}, legal.together)),
        "breaks": legal.breaks.get(name),
        "groups": [
            {
                "layer": group.layer,
                "members": [
                    {"weight": each.weight, "dim": each.dim, "role": each.role, "layout": repr(each.term)}
                    for each in group.members
                ],
            }
            for group in family.groups
        ],
    }


def build_analysis_view(said: Row) -> View:
    """``mptk analyze``: the families, then the axes that cannot be cut, with reasons."""
    rows = [
        [
            Name(f["name"]),
            f["description"],
            f"{f['width']}" if f["scopes"] == 1 else f"{f['width']} in each of {f['scopes']}",
            str(f["layers"]),
            f"{f['parameters_per_unit']:,.0f}",
            f"{f['share']:.1%}",
            _describe_legal(f),
        ]
        for f in said["families"]
    ]
    columns = ["family", "what it is", "width", "layers", "parameters per unit", "share", "legal widths"]
    share = said["block_parameters"] / said["parameters"]
    counts = f"{said['parameters']:,.0f} parameters, {said['block_parameters']:,.0f} of them ({share:.1%}) prunable"
    found = [] if not said["parts"] else [Section("Parts", [_build_part_table(said)])]
    found += [Section("Families", [counts, Table("llrrrrl", columns, rows), *list_breaking(said["families"])])]
    if said["blocked"]:
        fixed = Table("lrll", ["axis", "size", "weights", "why"], group_blocked(said["blocked"]))
        found.append(Section("What cannot be cut", [fixed]))
    return View(found, f"{shorten_model_name(said['model'])}: what can be cut, and what must go with it")


def _build_part_table(said: Row) -> Table:
    total = said["parameters"]
    rows = [
        [Name(p["name"]), f"{p['parameters']:,}", f"{p['parameters'] / total:.1%}", ", ".join(p["families"])]
        for p in said["parts"]
    ]
    return Table("lrrl", ["part", "parameters", "share", "families"], rows)


def _describe_legal(family: Row) -> str:
    if family["refused"]:
        return f"none: {family['refused']}"
    with_others = f", with {', '.join(family['together'])} in proportion" if family["together"] else ""
    return format_ranges(family["legal_widths"]) + with_others


def list_breaking(families: Sequence[Row]) -> list[str]:
    """Programs that a cut breaks, each kind with the families whose cut breaks it."""
    found: dict[str, list[str]] = {}
    for f in families:
        if f["breaks"]:
            found.setdefault(f["breaks"], []).append(f["name"])
    return [f"cutting {', '.join(names)} breaks {why}; see docs/deploy.md" for why, names in found.items()]


def group_blocked(blocked: Sequence[Row]) -> list[tuple[str, ...]]:
    """Rows of axes that cannot be cut; axes with the same reason in several layers share a row."""
    # Equal but for the layer's number, in names of weights and in reasons. A few weights and reasons are enough.
    rows: Counter[tuple[str, str, str, str]] = Counter()
    for b in blocked:
        starred = re.sub(r"(?<=\.)\d+(?=\.)", "*", ", ".join(b["weights"][:3]))
        reasons = re.sub(r"(?<=\.)\d+(?=[.,])", "*", "; ".join(b["reasons"][:2]))
        rows[b["name"], str(b["size"]), starred, reasons] += 1
    return [(name if count == 1 else f"{name} ×{count}", *rest) for (name, *rest), count in rows.items()]
