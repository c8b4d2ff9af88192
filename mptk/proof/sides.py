"""sides: prove what was written at sizes on both sides of each condition: it computes the same, or it refuses them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mptk.ir.limits import CallSizes
from mptk.ir.program import Program
from mptk.ir.samples import Samples
from mptk.protocols.chain import Compiled
from passes.frontend.eager import resize_tensor
from passes.verify import Difference, StageOutputs, prove

MOST_CONDITIONS = 8
"""Conditions whose sides are tried: a loop over a size makes one a round."""


def prove_sides(
    compiled: Compiled, written: Mapping[str, tuple[Program | StageOutputs, float]], samples: Samples
) -> list[Difference]:
    """The differences of what was written, at sizes on both sides of the conditions of the program.

    ``written``: stage → what is run, and its tolerance. ``samples``: inputs that meet all conditions.
    """
    sizes: CallSizes = compiled.prepared.analysis.program.sizes
    found = list[Difference]()
    for sides in sizes.find_sides(sizes.values([tensor.shape for tensor in samples.tensors]))[:MOST_CONDITIONS]:
        said = sizes.describe_condition(sides.condition)
        if sides.met is not None and _can_compute(
            compiled.masked, there := _resize_samples(samples, sizes.compute_shapes(sides.met))
        ):
            stages = {f"{stage} at other sizes": each for stage, each in written.items()}
            found += prove(compiled.masked, stages, there, executor=compiled.prepared.executor)
        if sides.unmet is not None:
            there = _resize_samples(samples, sizes.compute_shapes(sides.unmet))
            found += [
                Difference(f"{stage} at refused sizes", math.inf, math.inf, tolerance, failure=f"it ran, but {said}")
                for stage, (run, tolerance) in written.items()
                if _can_run(run, there)
            ]
    worst = dict[str, Difference]()
    for each in found:
        if each.stage not in worst or each.relative > worst[each.stage].relative:
            worst[each.stage] = each
    return list(worst.values())


def _resize_samples(samples: Samples, shapes: Sequence[Sequence[int]]) -> Samples:
    sized: dict[str, Tensor] = {
        name: resize_tensor(tensor, shape) for (name, tensor), shape in zip(samples.inputs.items(), shapes, strict=True)
    }
    return Samples(sized)


@torch.no_grad()
def _can_compute(masked: Program, samples: Samples) -> bool:
    """Whether the reference itself runs on these samples: a module may fail at sizes that meet all conditions."""
    try:
        masked(*samples.tensors)
    except Exception:  # noqa: BLE001 (an op may raise anything)
        return False
    return True


def _can_run(run: Program | StageOutputs, samples: Samples) -> bool:
    """Whether these samples are taken."""
    try:
        if isinstance(run, Program):
            run.sizes.check([tensor.shape for tensor in samples.tensors])
        else:
            run(samples)
    except Exception:  # noqa: BLE001 (each runtime has errors of its own)
        return False
    return True
