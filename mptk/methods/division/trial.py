"""trial: try a division of the budget: its plan, the loss of the masked model, and the plan with the lowest loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

from mptk.ir import Plan, Program, Samples, resolve_plan
from mptk.methods import criteria
from mptk.methods.criteria.base import Scores
from mptk.methods.criteria.observe import sum_losses
from mptk.progress import Count
from mptk.protocols import Prepared
from passes.transforms.masked_reference import mask

AT_ONCE = 256
"""Tokens in a batch, which all have logits."""


def plan_widths(prepared: Prepared, scores: Scores, widths: Mapping[str, int]) -> Plan:
    """The best units for ``widths``, for what becomes narrower."""
    narrowed = {name: width for name, width in widths.items() if width < prepared.analysis.variable(name).size}
    return criteria.select_units(prepared.analysis, scores, narrowed, stock=prepared.legal.stock)


def measure_masked_losses(
    prepared: Prepared, plans: Sequence[Plan], samples: Samples, progress: Count = lambda done, total: None
) -> list[float]:
    """The mean loss on ``samples`` of the dense model, masked by each plan. Layers may differ in a plan."""
    masked = [partial(mask, prepared.analysis, resolve_plan(prepared.analysis, plan)) for plan in plans]
    return measure_losses(prepared, masked, samples, progress)


def find_best_plan(
    prepared: Prepared, plans: Mapping[str, Plan], samples: Samples, progress: Count = lambda done, total: None
) -> tuple[Plan, dict[str, float]]:
    """The plan with the lowest masked loss on ``samples``, the first of equal ones; and name → loss of all."""
    found = dict(zip(plans, measure_masked_losses(prepared, list(plans.values()), samples, progress), strict=True))
    return plans[min(found, key=lambda name: found[name])], {name: round(loss, 4) for name, loss in found.items()}


def measure_losses(
    prepared: Prepared,
    programs: Sequence[Callable[[], Program]],
    samples: Samples,
    progress: Count = lambda done, total: None,
) -> list[float]:
    """The mean loss of each program on ``samples``, which the processes of a run share.

    Programs run side by side, to read weights once, or one after the other if all weights stay in memory.
    """
    executor, state = prepared.calibrator, prepared.analysis.program.state
    fits = sum(like.nbytes for like in state.likes.values()) <= executor.stage
    at_once, batches = 1 if fits else len(programs), samples.make_batches(AT_ONCE)
    found: list[float] = []
    for first in range(0, len(programs), at_once):
        made = [make() for make in programs[first : first + at_once]]
        sums = sum_losses(prepared.task, executor, made, batches)
        found += (sums / prepared.task.count_predictions(samples)).tolist()
        progress(len(found), len(programs))
    return found
