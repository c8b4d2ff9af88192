"""estimate: what a ladder needs: its runs, added up."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from mptk.config import Settings
from mptk.cost.estimate import Estimate
from mptk.run.estimate import Estimator

ONCE = ("start", "read", "trace and analyse", "calibration data")
"""Stages that the runs of a ladder share."""


@dataclass(frozen=True)
class LadderEstimator(Estimator):
    """Estimates a ladder as the sum of its runs. ``sparsities``: of the sizes."""

    sparsities: Sequence[float] = ()

    def estimate(self, settings: Settings) -> Estimate:
        """What a ladder with complete settings needs."""
        one = super().estimate
        return sum_estimates([one(replace(settings, sparsity=sparsity)) for sparsity in self.sparsities])


def sum_estimates(runs: Sequence[Estimate]) -> Estimate:
    """What several runs on one model need, one after the other in one process: the most memory, all disk and time."""
    # Runs follow each other, so memory and temporary files are those of the largest one; results stay.
    first = runs[0]

    def find_most(what: Callable[[Estimate], Mapping[str, float]]) -> dict[str, float]:
        return {name: max(what(run).get(name, 0) for run in runs) for name in what(first)}

    def sum_up(what: Callable[[Estimate], Mapping[str, float]]) -> dict[str, float]:
        return {name: sum(what(run).get(name, 0) for run in runs) for name in what(first)}

    return Estimate(
        find_most(lambda run: run.needed),
        find_most(lambda run: run.held),
        sum_up(lambda run: run.output),
        find_most(lambda run: run.temporary),
        sum_up(lambda run: run.seconds) | {name: first.seconds[name] for name in ONCE if name in first.seconds},
        find_most(lambda run: run.there),
        first.device,
        f"{len(runs)} models, each with {first.does}" if first.does else f"{len(runs)} models",
        first.note,
    )
