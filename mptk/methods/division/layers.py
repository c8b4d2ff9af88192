"""division: divide a budget over the layers, too, by what a cut of each layer alone does to the loss.

Each layer's loss is measured at a few widths on calibration text, all other layers whole: a curve from 0. What several
cuts do is taken as the sum of what each does alone. Under that the best division follows the lower convex hulls of the
curves, from the least loss for what is saved to the most, until the budget is met (marginal analysis: Fox, "Discrete
optimization via marginal analysis", Management Science 13, 1966).
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from mptk.cost.model import CostModel
from mptk.errors import MptkError
from mptk.ir.plan import Plan
from mptk.methods.criteria.base import Scores
from mptk.methods.division.trial import best, masked_losses, plan_of
from mptk.progress import Count
from mptk.protocols.chain import Prepared
from mptk.protocols.values import Context, SampleSets

TOKENS = 512
"""Calibration tokens on which each layer's curve is measured."""
COMPARED = 2048
"""Calibration tokens on which the division is compared with equal layers."""
LEVELS = (0.75, 0.5, 0.25)
"""Shares of a layer's units at which its loss is measured. No layer is cut below the last."""


@dataclass(frozen=True)
class Curve:
    """What cuts of one layer do alone. ``widths`` fall from the whole; ``losses`` are more than the dense model's."""

    widths: tuple[int, ...]
    losses: tuple[float, ...]


@dataclass(frozen=True)
class Edge:
    """A piece of a hull: from ``start`` to ``end`` units at ``price``, the loss for a share of the budget saved."""

    name: str
    start: int
    end: int
    price: float


def divided(
    prepared: Prepared, scores: Scores, uniform: Plan, sets: SampleSets, context: Context
) -> tuple[Plan, dict[str, float]]:
    """The plan with a width for each layer, or ``uniform`` if its masked loss is less; and the loss of both.

    ``prepared``: each layer is a family of its own in its analysis. ``uniform``: the plan with equal layers.

    Raises:
        MptkError: neither meets the budget.
    """
    ladders = {name: prepared.legal.ladders[name] for name in prepared.families}
    with context.stage(stage := "divide over layers"):
        curves = measured(prepared, scores, ladders, sets, partial(context.progress, stage))
    widths = divide(curves, ladders, prepared.cost, prepared.settings.sparsity)
    plans = {"equal layers": uniform, "free layers": plan_of(prepared, scores, widths)}
    sparsity, tolerance = prepared.settings.sparsity, prepared.settings.tolerance
    removed = {name: prepared.cost.sparsity(plan.widths) for name, plan in plans.items()}
    plans = {name: plan for name, plan in plans.items() if abs(removed[name] - sparsity) <= tolerance}
    if not plans:
        nearest = min(removed.values(), key=lambda share: abs(share - sparsity))
        raise MptkError(
            f"no widths that were tried give sparsity {sparsity:.3f}; nearest: {nearest:.3f}. Ask for that, or leave "
            "out --layers free"
        )
    return best(prepared, plans, sets.calibration.batches(COMPARED)[0])


def measured(
    prepared: Prepared, scores: Scores, ladders: Mapping[str, Sequence[int]], sets: SampleSets, progress: Count
) -> dict[str, Curve]:
    """Each layer's curve. A layer whose width is given has none, and has that width in all that is measured."""
    wanted = {name: widths for name, ladder in ladders.items() if len(widths := levels(ladder)) > 1}
    given = {name: ladder[-1] for name, ladder in ladders.items()}
    tried = [given, *(given | {name: width} for name, widths in wanted.items() for width in widths[1:])]
    plans = [plan_of(prepared, scores, widths) for widths in tried]
    least, *found = masked_losses(prepared, plans, sets.calibration.batches(TOKENS)[0], progress)
    each = iter(found)
    return {name: Curve(widths, (0.0, *(next(each) - least for _ in widths[1:]))) for name, widths in wanted.items()}


def levels(ladder: Sequence[int]) -> tuple[int, ...]:
    """The widths of ``ladder``, which ascends to the whole, at which a layer is measured: falling, the whole first."""
    size = ladder[-1]
    near = [min(ladder, key=lambda width: abs(width - share * size)) for share in LEVELS]
    return (size, *dict.fromkeys(width for width in near if width < size))


def divide(
    curves: Mapping[str, Curve], ladders: Mapping[str, Sequence[int]], cost: CostModel, sparsity: float
) -> dict[str, int]:
    """Widths of all layers whose sparsity is nearest to ``sparsity``, with the least loss that the curves foresee.

    Args:
        curves: layer's family → its curve.
        ladders: layer's family → its legal widths, ascending, the whole last; or the one width that is given.
        cost: of the model in which each layer is a family.
        sparsity: share of the budget to remove; if the curves do not reach it, their least widths are given.
    """
    edges = [edge for name, curve in curves.items() for edge in hull(name, curve, cost)]
    widths = {name: ladder[-1] for name, ladder in ladders.items()}
    for edge in sorted(edges, key=lambda edge: edge.price):
        after = widths | {edge.name: edge.end}
        if cost.sparsity(after) < sparsity:
            widths = after
            continue
        between = [width for width in ladders[edge.name] if edge.end <= width <= edge.start]
        return min(
            (widths | {edge.name: width} for width in between), key=lambda tried: abs(cost.sparsity(tried) - sparsity)
        )
    return widths


def hull(name: str, curve: Curve, cost: CostModel) -> list[Edge]:
    """The lower convex hull of a curve over what is saved: edges of rising price. A smaller width never loses less."""
    points = [(0.0, 0.0, curve.widths[0])]
    for width, loss in zip(curve.widths[1:], curve.losses[1:], strict=True):
        point = (cost.sparsity({name: width}), max(loss, points[-1][1]), width)
        while len(points) > 1 and _price(points[-2], points[-1]) >= _price(points[-1], point):
            points.pop()
        points.append(point)
    return [Edge(name, a[2], b[2], _price(a, b)) for a, b in itertools.pairwise(points)]


def _price(start: tuple[float, float, int], end: tuple[float, float, int]) -> float:
    saved = end[0] - start[0]
    return (end[1] - start[1]) / saved if saved > 0 else float("inf")
