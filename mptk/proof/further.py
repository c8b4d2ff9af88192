"""further: prove a written class on inputs of other kinds than the run's, which need a trace of their own.

The cut is the same: its axes are found again through the weights, which both programs have.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from mptk.compile.trace import traced_as_example
from mptk.ir.resolved_plan import transferred
from mptk.ir.samples import Samples
from mptk.protocols.chain import Compiled
from mptk.protocols.values import Further
from passes.analysis import group
from passes.transforms.masked_reference import mask
from passes.verify import Difference, prove


def prove_further(compiled: Compiled, written: Mapping[str, Further], cases: Mapping[str, Samples]) -> list[Difference]:
    """The difference of what was written from the masked dense model on each of ``cases`` that it takes.

    ``written``, ``cases``: start and end of a stage's name → what is run, and samples of other inputs than the run's.
    """
    prepared = compiled.prepared
    found: list[Difference] = []
    for case, samples in cases.items():
        runs = {f"{name} {case}": each for name, each in written.items() if each.takes(samples)}
        if not runs:
            continue
        program = traced_as_example(prepared.loaded, prepared.task, samples)
        analysis = group.analyze(program.with_state(compiled.analysis.program.module_state()))
        masked = mask(analysis, transferred(compiled.chosen.cut, compiled.analysis, analysis))
        stages = {stage: (each.run, each.tolerance) for stage, each in runs.items()}
        differences = prove(masked, stages, samples, executor=prepared.executor)
        found += [replace(d, ran=runs[d.stage].ran) for d in differences]
    return found
