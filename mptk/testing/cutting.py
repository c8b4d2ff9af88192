"""Cutting at random: the check that a family is what the analysis says."""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import mptk
from mptk import FamilyPlan, Plan
from mptk.ir.families import Analysis
from mptk.ir.resolved_plan import resolve_plan
from passes.transforms.masked_reference import mask


def draw_plan(analysis: Analysis, names: Collection[str] | None = None, *, seed: int = 0, share: float = 0.6) -> Plan:
    """Keep about ``share`` of the units of each family (in ``names``), another choice in each layer and scope."""
    generator = random.Random(seed)
    families = {}
    for f in analysis.families:
        width = max(f.minimum, round(f.size * share))
        width = max(min(width, f.size - 1) // f.multiple * f.multiple, f.multiple)
        if (names is None or f.name in names) and f.minimum <= width < f.size:
            families[f.name] = FamilyPlan(
                width,
                f.size,
                {
                    g.layer: tuple(tuple(sorted(generator.sample(range(f.size), width))) for _ in range(g.scopes))
                    for g in f.groups
                },
            )
    return Plan(families)


@dataclass(frozen=True)
class Comparison:
    """Largest absolute differences: of the cut model to the masked one, and of the masked to the dense one."""

    error: float
    moved: float


def cut_and_compare(analysis: Analysis, plan: Plan, inputs: Sequence[Tensor]) -> Comparison:
    """Run the dense, the masked and the cut program on ``inputs``."""
    with torch.no_grad():
        dense = analysis.program(*inputs)
        masked = mask(analysis, resolve_plan(analysis, plan))(*inputs)
        cut = mptk.rewrite(analysis, plan, check=False)(*inputs)  # the caller compares
    return Comparison(measure_largest(masked, cut), measure_largest(masked, dense))


def measure_largest(a: Any, b: Any) -> float:
    """Largest absolute difference of two results (infinite if one holds a NaN)."""
    if isinstance(a, (tuple, list)):
        return max(measure_largest(x, y) for x, y in zip(a, b, strict=True))
    assert a.shape == b.shape, f"{tuple(a.shape)}, not {tuple(b.shape)}"
    difference = (a.detach().double() - b.detach().double()).abs().max().item()
    return float("inf") if difference != difference else difference
