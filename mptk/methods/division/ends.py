"""ends: compare equal layers with uncut first and last layers, and tell users what equal layers cost.

A cut hurts most in the first and last layers; LLM-Pruner (arXiv 2305.11627) spares them.
"""

from __future__ import annotations

from mptk.cost.budgets import LATENCY
from mptk.ir.families import Family
from mptk.ir.plan import Plan
from mptk.methods import criteria
from mptk.methods.criteria.base import Scores
from mptk.methods.division.budget import cost_model
from mptk.methods.division.trial import masked_losses
from mptk.protocols.chain import Prepared
from mptk.protocols.values import SampleSets

ENDS_SHARE = 0.1
"""Share of a family's layers that stay uncut at each end."""
ENDS_TOKENS = 512
"""Calibration tokens on which both plans are compared."""


def ends_note(prepared: Prepared, scores: Scores, equal: Plan, sets: SampleSets) -> str:
    """A note if a cut with uncut ends at the same budget has a lower loss; "" if not, or if there is no such cut.

    There is none after a larger cut, which has cut the ends.

    ``equal``: the plan whose layers are alike. ``scores``: of the families that it cuts.
    """
    spared = None if prepared.start is not None else whole_ends(prepared, scores, equal)
    if spared is None:
        return ""
    alike, whole = masked_losses(prepared, [equal, spared], sets.calibration.batches(ENDS_TOKENS)[0])
    if whole >= alike:
        return ""
    layers = max(len(prepared.analysis.family(name).parts) for name in equal.widths)
    inner = f"{round(ENDS_SHARE * layers)}-{layers - 1 - round(ENDS_SHARE * layers)}"
    return (
        f"equal layers cost {alike - whole:.2f} in loss: {alike:.2f} when cut, {whole:.2f} if a tenth of the layers at "
        f"each end stays uncut, before any fit or training; with --target graph, --layers {inner} cuts so, and "
        "--layers free divides the budget"
    )


def whole_ends(prepared: Prepared, scores: Scores, equal: Plan) -> Plan | None:
    """A plan with uncut first and last layers that saves about as much as ``equal``.

    None with too few layers, with widths from the user, or with a budget in milliseconds.
    """
    settings, families = prepared.settings, [prepared.analysis.family(name) for name in equal.widths]
    inner = {family.name: between_ends(family) for family in families}
    if settings.widths or settings.budget == LATENCY or not any(len(inner[f.name]) < len(f.parts) for f in families):
        return None
    ladders = {family.name: prepared.legal.ladders[family.name] for family in families}
    deeper = {f.name: f.size - (f.size - equal.widths[f.name]) * len(f.groups) / len(inner[f.name]) for f in families}
    nearest = {name: min(ladder, key=lambda width: abs(width - deeper[name])) for name, ladder in ladders.items()}
    analysis = prepared.analysis.divided(equal.widths)
    cost = cost_model(analysis, settings, prepared.dtype.itemsize)
    finest = max(ladders, key=lambda name: len(ladders[name]))  # its width makes up for what the others are rounded by
    tried = [
        {part.name: width for name, width in (nearest | {finest: last}).items() for part in inner[name]}
        for last in ladders[finest]
    ]
    off = {i: abs(cost.sparsity(widths) - prepared.cost.sparsity(equal.widths)) for i, widths in enumerate(tried)}
    best = min(off, key=lambda i: off[i])
    if off[best] > settings.tolerance:
        return None
    layers = {part.name: scores[f.name][i : i + 1] for f in families for i, part in enumerate(f.parts or (f,))}
    return criteria.select(analysis, layers, tried[best])


def between_ends(family: Family) -> tuple[Family, ...]:
    """The layers of ``family`` that are not at its ends; the family itself if it has one layer."""
    spared = round(ENDS_SHARE * len(family.parts))
    return family.parts[spared : len(family.parts) - spared] or (family,)
