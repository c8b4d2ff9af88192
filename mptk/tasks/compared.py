"""compared: what tasks share whose outputs are compared with the dense model's own: no labels are needed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mptk.config.settings import Settings
from mptk.io.evaluation import Runs
from mptk.io.models import Loaded
from mptk.ir.samples import Samples
from mptk.progress import Count
from mptk.protocols.task import Task
from mptk.tasks.inputs import inputs_of

Figure = Callable[[Any, Any], Tensor]
"""A run's outputs and the dense model's on one batch → the sum of a figure over its samples."""


class ComparedTask(Task):
    """A task of a transformers model, whose samples are of the kind that its class reads."""

    compares = True

    def example(self, model: nn.Module) -> Samples:
        return Samples(inputs_of(model).example(model))

    def samples(self, loaded: Loaded, settings: Settings, count: int, progress: Count) -> Samples:
        return Samples(inputs_of(loaded.model).calibration(loaded, settings, count, progress))

    def evaluation(self, loaded: Loaded, settings: Settings) -> Samples:
        return Samples(inputs_of(loaded.model).evaluation(loaded, settings))

    def named(self, model: nn.Module, data: str) -> str:
        return inputs_of(model).named(data)

    def predicted(self, samples: Samples) -> int:
        return len(samples)


@torch.no_grad()
def means(
    runs: Runs, batches: Sequence[Samples], figures: Mapping[str, Figure], progress: Count
) -> dict[str, dict[str, float]]:
    """Figure → run → its mean over all samples. The first run, ``dense``, is what each run is compared with."""
    sums: dict[str, dict[str, float]] = {figure: {} for figure in figures}
    reference: Any = None
    for name, _, output in runs(batches, progress):
        reference = output if name == "dense" else reference
        for figure, of in figures.items():
            sums[figure][name] = sums[figure].get(name, 0.0) + float(of(output, reference))
    count = sum(map(len, batches))
    return {figure: {name: round(total / count, 6) for name, total in of.items()} for figure, of in sums.items()}
