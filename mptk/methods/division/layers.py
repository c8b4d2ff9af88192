"""layers: divide a budget over layers, by how cutting each layer by itself changes the loss.

The loss is measured on calibration text with each layer at a few widths and all other layers uncut: a curve from 0. The
    effect of several cuts is taken as the sum of their separate effects. Then the best division follows the lower
    convex hulls of the curves, in the order of loss per saved cost, until the budget is met (marginal analysis: Fox,
    "Discrete optimization via marginal analysis", Management Science 13, 1966).
If all layers are alike, a note says what that costs: a cut hurts most in the first and last layers; LLM-Pruner (arXiv
2305.11627) spares them.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from mptk.cost.budgets import LATENCY
from mptk.cost.model import CostModel
from mptk.errors import BudgetError
from mptk.ir import Plan, Variable
from mptk.methods import criteria
from mptk.methods.criteria.base import Scores
from mptk.methods.division.budget import build_cost_model
from mptk.methods.division.trial import find_best_plan, measure_masked_losses, plan_widths
from mptk.progress import Count
from mptk.protocols import Context, Prepared, SampleSets

CURVE_TOKENS = 512
"""Calibration tokens for each layer's curve."""
COMPARED = 2048
"""Calibration tokens for comparing the division with equal layers."""
LEVELS = (0.75, 0.5, 0.25)
"""Shares of a layer's units at which the loss is measured. No layer is cut below the last share."""


@dataclass(frozen=True)
class Curve:
    """The effect of cutting one layer: descending ``widths``, and ``losses`` as increases over the dense model's."""

    widths: tuple[int, ...]
    losses: tuple[float, ...]


@dataclass(frozen=True)
class HullEdge:
    """An edge of a hull: from ``start`` to ``end`` units at ``price``, the loss per saved share of the budget."""

    name: str
    start: int
    end: int
    price: float


def choose_division(
    prepared: Prepared, scores: Scores, uniform: Plan, sets: SampleSets, context: Context
) -> tuple[Plan, dict[str, float]]:
    """The plan with a width for each layer, or ``uniform`` if its masked loss is lower; and the losses of both.

    ``prepared``: its candidates name each layer. ``uniform``: the plan with equal layers.

    Raises:
        MptkError: neither meets the budget.
    """
    ladders = {name: prepared.legal.ladders[name] for name in prepared.families}
    with context.stage(stage := "divide over layers"):
        curves = measure_curves(prepared, scores, ladders, sets, partial(context.progress, stage))
    widths = divide(curves, ladders, prepared.cost, prepared.settings.sparsity)
    plans = {"equal layers": uniform, "free layers": plan_widths(prepared, scores, widths)}
    sparsity, tolerance = prepared.settings.sparsity, prepared.settings.tolerance
    removed = {name: prepared.cost.compute_sparsity(plan.widths) for name, plan in plans.items()}
    plans = {name: plan for name, plan in plans.items() if abs(removed[name] - sparsity) <= tolerance}
    if not plans:
        nearest = min(removed.values(), key=lambda share: abs(share - sparsity))
        raise BudgetError(
            f"no tried widths give sparsity {sparsity:.3f}; nearest: {nearest:.3f}. Ask for that, or leave out "
            "--layers free",
            name="sparsity",
            nearest=(nearest,),
        )
    return find_best_plan(prepared, plans, sets.calibration.make_batches(COMPARED)[0])


def measure_curves(
    prepared: Prepared,
    scores: Scores,
    ladders: Mapping[str, Sequence[int]],
    sets: SampleSets,
    progress: Count,
    shares: Sequence[float] = LEVELS,
    tokens: int = CURVE_TOKENS,
) -> dict[str, Curve]:
    """Each layer's curve, at ``shares`` of its units. A layer of fixed width has none, and keeps this width in all."""
    wanted = {name: widths for name, ladder in ladders.items() if len(widths := choose_levels(ladder, shares)) > 1}
    given = {name: ladder[-1] for name, ladder in ladders.items()}
    tried = [given, *(given | {name: width} for name, widths in wanted.items() for width in widths[1:])]
    plans = [plan_widths(prepared, scores, widths) for widths in tried]
    least, *found = measure_masked_losses(prepared, plans, sets.calibration.make_batches(tokens)[0], progress)
    each = iter(found)
    return {name: Curve(widths, (0.0, *(next(each) - least for _ in widths[1:]))) for name, widths in wanted.items()}


def choose_levels(ladder: Sequence[int], shares: Sequence[float] = LEVELS) -> tuple[int, ...]:
    """The widths of ``ladder`` (ascending) nearest to ``shares`` of the dense width, descending from that."""
    size = ladder[-1]
    near = [min(ladder, key=lambda width: abs(width - share * size)) for share in shares]
    return (size, *dict.fromkeys(width for width in near if width < size))


def divide(
    curves: Mapping[str, Curve], ladders: Mapping[str, Sequence[int]], cost: CostModel, sparsity: float
) -> dict[str, int]:
    """Widths of all layers whose sparsity is nearest to ``sparsity``, with the lowest loss that the curves predict.

    Args:
        curves: layer → its curve.
        ladders: layer → its legal widths, ascending to the dense width; or its fixed width.
        cost: of the model.
        sparsity: share of the budget to remove; if the curves do not reach it, the result has their smallest widths.
    """
    edges = [edge for name, curve in curves.items() for edge in build_hull(name, curve, cost)]
    widths = {name: ladder[-1] for name, ladder in ladders.items()}
    for edge in sorted(edges, key=lambda edge: edge.price):
        after = widths | {edge.name: edge.end}
        if cost.compute_sparsity(after) < sparsity:
            widths = after
            continue
        between = [width for width in ladders[edge.name] if edge.end <= width <= edge.start]
        return min(
            (widths | {edge.name: width} for width in between),
            key=lambda tried: abs(cost.compute_sparsity(tried) - sparsity),
        )
    return widths


def build_hull(name: str, curve: Curve, cost: CostModel) -> list[HullEdge]:
    """The lower convex hull of a curve over the saved cost: edges of rising price. Losses never fall with the width."""
    points = [(0.0, 0.0, curve.widths[0])]
    for width, loss in zip(curve.widths[1:], curve.losses[1:], strict=True):
        point = (cost.compute_sparsity({name: width}), max(loss, points[-1][1]), width)
        while len(points) > 1 and _compute_price(points[-2], points[-1]) >= _compute_price(points[-1], point):
            points.pop()
        points.append(point)
    return [HullEdge(name, a[2], b[2], _compute_price(a, b)) for a, b in itertools.pairwise(points)]


def _compute_price(start: tuple[float, float, int], end: tuple[float, float, int]) -> float:
    saved = end[0] - start[0]
    return (end[1] - start[1]) / saved if saved > 0 else float("inf")


ENDS_SHARE = 0.1
"""Share of a family's layers that stay uncut at each end."""
ENDS_TOKENS = 512
"""Calibration tokens on which both plans are compared."""


def describe_ends(prepared: Prepared, scores: Scores, equal: Plan, sets: SampleSets) -> str:
    """A note if a cut with uncut ends at the same budget has a lower loss; "" if not, or if there is no such cut.

    There is none after a larger cut, which has cut the ends.

    ``equal``: the plan whose layers are alike. ``scores``: of the families that it cuts.
    """
    spared = None if prepared.start is not None else plan_whole_ends(prepared, scores, equal)
    if spared is None:
        return ""
    alike, whole = measure_masked_losses(prepared, [equal, spared], sets.calibration.make_batches(ENDS_TOKENS)[0])
    if whole >= alike:
        return ""
    layers = max(len(prepared.analysis.variable(name).layers) for name in equal.widths)
    inner = f"{round(ENDS_SHARE * layers)}-{layers - 1 - round(ENDS_SHARE * layers)}"
    return (
        f"equal layers cost {alike - whole:.2f} in loss: {alike:.2f} when cut, {whole:.2f} if a tenth of the layers at "
        f"each end stays uncut, before any fit or training; with --target graph, --layers {inner} cuts so, and "
        "--layers free divides the budget"
    )


def plan_whole_ends(prepared: Prepared, scores: Scores, equal: Plan) -> Plan | None:
    """A plan with uncut first and last layers that saves about as much as ``equal``.

    None with too few layers, with widths from the user, or with a budget in milliseconds.
    """
    settings, cut = prepared.settings, [prepared.analysis.variable(name) for name in equal.widths]
    inner = {v.name: list_inner_layers(v) for v in cut}
    if settings.widths or settings.budget == LATENCY or not any(len(inner[v.name]) < len(v.layers) for v in cut):
        return None
    ladders = {name: prepared.legal.ladders[name] for name in inner}
    deeper = {v.name: v.size - (v.size - equal.widths[v.name]) * len(v.layers) / len(inner[v.name]) for v in cut}
    nearest = {name: min(ladder, key=lambda width: abs(width - deeper[name])) for name, ladder in ladders.items()}
    cost = build_cost_model(prepared.analysis, settings, prepared.dtype.itemsize)
    finest = max(ladders, key=lambda name: len(ladders[name]))  # its width makes up for what the others are rounded by
    tried = [
        {layer.name: width for name, width in (nearest | {finest: last}).items() for layer in inner[name]}
        for last in ladders[finest]
    ]
    off = {
        i: abs(cost.compute_sparsity(widths) - prepared.cost.compute_sparsity(equal.widths))
        for i, widths in enumerate(tried)
    }
    best = min(off, key=lambda i: off[i])
    if off[best] > settings.tolerance:
        return None
    return criteria.select_units(prepared.analysis, scores, tried[best])


def list_inner_layers(variable: Variable) -> tuple[Variable, ...]:
    """The layers of a family that are not at its ends; ``variable`` itself if it does not tie them all."""
    layers = variable.list_layers()
    spared = round(ENDS_SHARE * len(layers)) if variable.uniform else 0
    return layers[spared : len(layers) - spared]
