"""greedy: remove one residual block after the other, each time the one without which the loss is lowest.

    round r: b_r = argmin over the blocks b that are left of loss(model without b_1 … b_{r−1} and b)

The loss is that of the task on calibration samples, by the masked program. n blocks of N are found with about n · N
runs of the model (SLEB, Song et al. 2024, arXiv 2402.09025). It sees what a removal does to later choices, which a
score for each block by itself cannot say.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mptk.distributed.sharing import sharing
from mptk.ir.blocks import Stack
from mptk.ir.families import Analysis, Family
from mptk.ir.plan import FamilyPlan, Plan
from mptk.ir.resolved_plan import resolve_plan
from mptk.ir.samples import Samples
from mptk.methods.criteria.observe import GRADIENT_TOKENS
from mptk.progress import Count
from mptk.protocols.task import Task
from mptk.staged.staged import EXECUTOR, Executor
from passes.transforms.masked_reference import mask

TOKENS = 1024
"""Calibration tokens on which the loss is compared."""


def measure(
    analysis: Analysis,
    depths: Sequence[Family],
    samples: Samples,
    objective: Task,
    removals: Mapping[str, int],
    progress: Count | None = None,
    executor: Executor = EXECUTOR,
) -> dict[str, Tensor]:
    """Depth → a score for each of its blocks: the lower, the earlier it is removed.

    ``removals``: how many blocks of each depth are looked for; all that may go if it is not named. Of several depths
    each is searched with the others whole.
    """
    given = samples.batches(TOKENS)[0]
    scores = {}
    for family in depths:
        assert family.stack is not None
        most = family.size - max(1, len(family.stack.stay))
        search = _Search(analysis, family, family.stack, given, objective, executor)
        scores[family.name] = search.scores(min(removals.get(family.name, most), most), progress)
    return scores


class _Search:
    """The search for the blocks of one list."""

    def __init__(
        self, analysis: Analysis, family: Family, stack: Stack, samples: Samples, objective: Task, executor: Executor
    ) -> None:
        self.analysis, self.family, self.stack = analysis, family, stack
        self.batches = samples.batches(GRADIENT_TOKENS)
        self.objective, self.executor = objective, executor

    def scores(self, rounds: int, progress: Count | None) -> Tensor:
        """The round in which each block is removed; for those that stay, more than all rounds, by the last losses."""
        left = list(range(self.family.size))
        found = torch.full((self.family.size,), float(rounds + 1), dtype=torch.float64)
        for number in range(rounds):
            tried = [unit for unit in left if unit not in self.stack.stay]
            losses = {unit: self._loss([other for other in left if other != unit]) for unit in tried}
            first, *others = sorted(tried, key=lambda unit: losses[unit])
            found[first] = number
            for place, unit in enumerate(others):
                found[unit] = rounds + place / self.family.size
            left.remove(first)
            if progress is not None:
                progress(number + 1, rounds)
        return found

    def _loss(self, units: Sequence[int]) -> float:
        """The loss of the model with these blocks; infinite if it is no number."""
        plan = Plan({self.family.name: FamilyPlan(len(units), self.family.size, {self.stack.module: (tuple(units),)})})
        masked = mask(self.analysis, resolve_plan(self.analysis, plan))
        share = sharing(len(self.batches))
        own = share.own(self.batches)
        results = self.executor.outputs([masked], [batch.tensors for batch in own])
        total = torch.zeros(1, dtype=torch.float64)
        for batch in own:
            total += float(self.objective.loss(next(results), batch.to(self.executor.device)))
        loss = float(share.total(total.to(self.executor.device)))
        return math.inf if math.isnan(loss) else loss
