"""gradients: losses on calibration text, and their gradients in weights and activations."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

import torch
from torch import Tensor

from mptk.distributed.processes import Sharing, share_batches
from mptk.ir.program import Program
from mptk.ir.samples import Samples
from mptk.methods.criteria.observe import Calibration, count_in_samples, split_batches
from mptk.protocols.task import Task
from mptk.staged.staged import Executor, Tap

GRADIENT_TOKENS = 512
"""Tokens in a batch whose activations autograd keeps."""


def sum_losses(task: Task, executor: Executor, programs: Sequence[Program], given: Sequence[Samples]) -> Tensor:
    """The sum of each program's losses on batches, float64 [programs]. They run side by side, to read weights once.

    The processes of a run share the batches.
    """
    share = share_batches(len(given))
    own = share.own(given)
    sums = torch.zeros(len(programs), dtype=torch.float64)
    results = executor.outputs(programs, [batch.tensors for batch in own])
    for batch in own:
        for i in range(len(programs)):
            sums[i] += float(task.loss(next(results), batch.to(executor.device)))
    return sums if share.count == 1 else share.total(sums.to(executor.device)).cpu()


def sum_gradients(
    given: Calibration, scaled: Callable[[Tensor], Tensor], names: Collection[str] = (), taps: Sequence[Tap] = ()
) -> tuple[Mapping[str, Tensor], Sharing]:
    """The gradient of the sum over all batches of ``scaled(objective.sensitivity)``, for each weight of ``names``.

    ``taps`` see gradients in activations. The processes of a run share the batches; the second result sums what their
    taps saw.

    Raises:
        MptkError: the objective has no loss for the program's outputs; or as ``watch``.
    """
    program, executor = given.analysis.program, given.executor
    found = split_batches(program, given.samples, GRADIENT_TOKENS)
    share = share_batches(len(found))
    own = share.own(found)

    def loss(output: Tensor, i: int) -> Tensor:
        return scaled(given.objective.compute_sensitivity(output, own[i].to(executor.device)))

    inputs, progress = [batch.tensors for batch in own], count_in_samples(given.progress, own)
    return executor.gradients(program, names, inputs, loss, progress, share.total, taps), share
