"""parts: the parts of a model of several networks, by their modules: vision tower, projector, language model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from mptk.cost.model import is_layered
from mptk.errors import MptkError
from mptk.ir.families import Analysis
from passes.targets.legalize import LegalWidths
from passes.targets.width_choices import partners

Parts = Mapping[str, Sequence[str]]
"""Part → the names of its modules."""


def families_in(analysis: Analysis, parts: Parts, part: str) -> list[str]:
    """The families that lie in a part. One over several parts, as a residual width, is in none."""
    inside = tuple(f"{module}." for module in parts[part])
    return [
        family.name
        for family in analysis.all_families
        if all(f"{group.layer}.".startswith(inside) for group in family.groups)
    ]


def expanded(names: Iterable[str], analysis: Analysis, legal: LegalWidths, parts: Parts) -> tuple[str, ...]:
    """Names of families, in which a part stands for its families with a group in each layer that have legal widths.

    A part without such families stands for all that have legal widths. Families that can only be cut together with one
    outside of these are left out.

    Raises:
        MptkError: nothing in a part can be cut.
    """
    found: list[str] = []
    for name in names:
        if name not in parts:
            found.append(name)
            continue
        legals = [f for f in families_in(analysis, parts, name) if len(legal.ladders.get(f, ())) > 1]
        channels = [f for f in legals if analysis.family(f).kind == "channels"]
        layered = [f for f in channels if is_layered(analysis.family(f))]
        if not (cut := _together(layered, legal) or _together(channels, legal)):
            raise MptkError(f"no family of {name} has another legal width; see mptk analyze, or use --target graph")
        found += cut
    return tuple(dict.fromkeys(found))


def _together(families: Sequence[str], legal: LegalWidths) -> list[str]:
    """Those of ``families`` that can be cut without another one."""
    left = list(families)
    while without := [f for f in left if partners(f, left, legal.together)]:
        left = [f for f in left if f not in without]
    return left


def part_rows(model: nn.Module, analysis: Analysis, parts: Parts) -> list[dict[str, Any]]:
    """A row for each part: ``name``, ``modules``, ``parameters``, ``families``."""
    sizes = {name: p.numel() for name, p in model.named_parameters()}

    def parameters(modules: Sequence[str]) -> int:
        inside = tuple(f"{module}." for module in modules)
        return sum(size for name, size in sizes.items() if name.startswith(inside))

    return [
        {
            "name": part,
            "modules": list(modules),
            "parameters": parameters(modules),
            "families": families_in(analysis, parts, part),
        }
        for part, modules in parts.items()
    ]
