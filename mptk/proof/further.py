"""further: prove a written class on inputs of other kinds than the run's, which need a trace of their own.

The cut is the same: its axes are found again through the weights, which both programs have.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from torch import nn

from mptk.compile.trace import traced_as_example
from mptk.ir.axes import Axis, leaves
from mptk.ir.families import Analysis
from mptk.ir.resolved_plan import Cut, KeptUnits
from mptk.ir.samples import Samples
from mptk.protocols.chain import Compiled
from passes.analysis import group
from passes.transforms.masked_reference import mask
from passes.verify import TOLERANCE, Difference, prove


def prove_further(compiled: Compiled, model: nn.Module, cases: Mapping[str, Samples]) -> list[Difference]:
    """The difference of ``model``, which the folder holds, from the masked dense model on each of ``cases``.

    ``cases``: stage → samples of other inputs than the run's.
    """
    prepared = compiled.prepared
    found: list[Difference] = []
    for stage, samples in cases.items():
        program = traced_as_example(prepared.loaded, prepared.task, samples)
        analysis = group.analyze(program.with_state(compiled.analysis.program.state))
        masked = mask(analysis, transferred(compiled.chosen.cut, compiled.analysis, analysis))
        run = partial(prepared.task.output, model)
        found += prove(masked, {stage: (run, TOLERANCE)}, samples, executor=prepared.executor)
    return found


def transferred(cut: Cut, source: Analysis, target: Analysis) -> Cut:
    """``cut``, of ``source``, for another program of the same model, ``target``, without axes that it lacks."""
    same = dict[Axis, Axis]()
    for name, dims in target.weights.items():
        for theirs, own in zip(source.weights.get(name, ()), dims, strict=False):
            same.update(zip(leaves(theirs), leaves(own), strict=False))
    blocks = {stack.module: stack.axis for stack in target.stacks}
    same.update({stack.axis: blocks[stack.module] for stack in source.stacks if stack.module in blocks})
    choices = {
        same[axis]: KeptUnits(tuple(same[outer] for outer in kept.scope), kept.table)
        for axis, kept in cut.choices.items()
        if axis in same
    }
    return Cut(choices, {axis: int(kept.table[0].sum()) for axis, kept in choices.items()})
