"""greedy: remove residual blocks one by one, each time the block whose removal gives the lowest loss.

    round r: b_r = argmin over the remaining blocks b of loss(model without b_1 … b_{r−1} and b)

The masked program gives the task's loss on calibration samples. Choosing n of N blocks takes about n · N runs of the
model (SLEB, Song et al. 2024, arXiv 2402.09025). Unlike a score for each block, it accounts for the blocks already
removed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from mptk.ir import Depth, FamilyPlan, Plan, Samples, resolve_plan
from mptk.methods.criteria import influence
from mptk.methods.criteria.base import Criterion
from mptk.methods.criteria.observe import GRADIENT_TOKENS, Calibration, sum_losses
from passes.transforms.masked_reference import mask

GREEDY_TOKENS = 1024
"""Calibration tokens for comparing losses: few, since they run about n · N times."""


def find_removal_order(given: Calibration) -> dict[str, Tensor]:
    """Depth → a score for each of its blocks; lower scores are removed first.

    Each of several depths is searched with the others uncut.
    """
    batches = given.samples.make_batches(GREEDY_TOKENS)[0].make_batches(GRADIENT_TOKENS)
    depths = [v.family for v in given.variables if isinstance(v.family, Depth)]
    return {depth.name: _number_rounds(given, depth, batches) for depth in depths}


def _number_rounds(given: Calibration, depth: Depth, batches: Sequence[Samples]) -> Tensor:
    """The round in which each block is removed; blocks that stay get higher numbers, by the last losses."""
    # Blocks that must stay have the highest number of all.
    size, stay = depth.size, depth.stack.stay
    most = size - max(1, len(stay))
    rounds = min(given.removals.get(depth.name, most), most)
    left = list(range(size))
    found = torch.full((size,), float(rounds + 1), dtype=torch.float64)
    for number in range(rounds):
        tried = [unit for unit in left if unit not in stay]
        losses = {
            unit: _measure_loss(given, depth, batches, [other for other in left if other != unit]) for unit in tried
        }
        first, *others = sorted(tried, key=lambda unit: losses[unit])
        found[first] = number
        # The class may hold only some sets of blocks. Then these numbers decide which other blocks go.
        for place, unit in enumerate(others):
            found[unit] = rounds + place / size
        left.remove(first)
        if given.progress is not None:
            given.progress(number + 1, rounds)
    return found


def _measure_loss(given: Calibration, depth: Depth, batches: Sequence[Samples], units: Sequence[int]) -> float:
    """The loss of the model with these blocks; infinite if it is NaN."""
    kept = FamilyPlan(len(units), depth.size, {depth.stack.module: (tuple(units),)})
    masked = mask(given.analysis, resolve_plan(given.analysis, Plan({depth.name: kept})))
    loss = float(sum_losses(given.objective, given.executor, [masked], batches))
    return math.inf if math.isnan(loss) else loss


GREEDY = Criterion(
    "greedy",
    "blocks one by one, by the loss without them",
    find_removal_order,
    influence.score_by_influence,
    judges=("blocks",),
)
