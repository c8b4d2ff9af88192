"""trial: what a choice would do: the plan for given widths, and the loss of a masked program on calibration text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from mptk.distributed.sharing import sharing
from mptk.ir.plan import Plan
from mptk.ir.program import Program
from mptk.ir.samples import Samples
from mptk.methods import criteria
from mptk.methods.criteria.base import Scores
from mptk.progress import Count
from mptk.protocols.chain import Prepared
from mptk.protocols.task import Task
from mptk.staged.staged import Executor

AT_ONCE = 256
"""Tokens in a batch, of which there are logits."""


def plan_of(prepared: Prepared, scores: Scores, widths: Mapping[str, int]) -> Plan:
    """The best units for ``widths``, of the families that become narrower."""
    narrowed = {name: width for name, width in widths.items() if width < prepared.analysis.family(name).size}
    return criteria.select(prepared.analysis, scores, narrowed, stock=prepared.legal.stock)


def losses(
    prepared: Prepared,
    programs: Sequence[Callable[[], Program]],
    samples: Samples,
    progress: Count = lambda done, total: None,
) -> list[float]:
    """The mean loss of each program on ``samples``. The processes of a run share them.

    Programs run side by side, to read weights once, or one after the other if all weights stay in memory.
    """
    executor, state = prepared.calibrator, prepared.analysis.program.state
    fits = sum(like.nbytes for like in state.likes.values()) <= executor.stage
    return mean_losses(prepared.task, executor, programs, samples, progress, at_once=1 if fits else len(programs))


def mean_losses(
    task: Task,
    executor: Executor,
    programs: Sequence[Callable[[], Program]],
    samples: Samples,
    progress: Count = lambda done, total: None,
    *,
    at_once: int,
) -> list[float]:
    """As ``losses``, for a model that nothing is prepared of. ``at_once``: programs that run side by side."""
    batches = samples.batches(AT_ONCE)
    share = sharing(len(batches))
    own = share.own(batches)
    sums = torch.zeros(len(programs), dtype=torch.float64)
    for first in range(0, len(programs), at_once):
        made = [make() for make in programs[first : first + at_once]]
        results = executor.outputs(made, [batch.tensors for batch in own])
        for batch in own:
            for i in range(first, first + len(made)):
                sums[i] += float(task.loss(next(results), batch.to(executor.device)))
        progress(first + len(made), len(programs))
    sums = sums if share.count == 1 else share.total(sums.to(executor.device))
    found: list[float] = (sums / task.predicted(samples)).tolist()
    return found
