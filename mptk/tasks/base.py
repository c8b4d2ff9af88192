"""base: what tasks share: comparisons with the dense model's outputs, and a loss of tokens."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from mptk.config import Settings
from mptk.errors import ModelError
from mptk.io import Loaded, Runs
from mptk.ir import IGNORED, Samples, join_outputs
from mptk.progress import Count, Progress
from mptk.protocols import Task
from mptk.reading import Json
from mptk.tasks.inputs import Inputs, choose_inputs

Outputs = Tensor | Sequence[Tensor]
SummedFigure = Callable[[Tensor, Tensor], Tensor]
"""A run's outputs and the dense model's on one batch → the sum of a figure over its samples."""
AutoLists = Sequence[Mapping[str, str | Sequence[str]]]
"""Lists of transformers: model type → name of a class, or several."""


class ModelTask(Task):
    """A task of a transformers model: ``made`` makes its samples of the inputs that its class reads."""

    def find_inputs(self, model: nn.Module) -> Inputs:
        """What the model reads."""
        return choose_inputs(model)

    def make_example(self, model: nn.Module) -> Samples:
        return Samples(self.find_inputs(model).make_example(model))

    def draw_samples(self, loaded: Loaded, settings: Settings, count: int, progress: Count) -> Samples:
        found = self.find_inputs(loaded.model).draw_calibration(loaded, settings, count, progress)
        return self.make_samples(loaded, found, settings.data, settings.seed)

    def draw_evaluation(self, loaded: Loaded, settings: Settings) -> Samples:
        found = self.find_inputs(loaded.model).draw_evaluation(loaded, settings)
        return self.make_samples(loaded, found, settings.eval_data or settings.data, settings.seed + 1)

    def name_data(self, model: nn.Module, data: str) -> str:
        return self.find_inputs(model).name_data(data)


class ComparedTask(ModelTask):
    """A task whose loss compares outputs with the dense model's, one comparison a sample: by default numbers."""

    compares = True

    def compute_loss(self, output: Any, samples: Samples) -> Tensor:
        """Sum over samples of ‖f − f*‖² / ‖f*‖², f* the dense model's numbers (``targets``)."""
        assert samples.targets is not None
        return compute_output_errors(output, samples.targets).sum()

    def compute_sensitivity(self, output: Any, samples: Samples) -> Tensor:
        return compute_projection(output, samples)

    def count_predictions(self, samples: Samples) -> int:
        return len(samples)


@torch.no_grad()
def measure_figures(
    runs: Runs, batches: Sequence[Samples], figures: Mapping[str, SummedFigure], progress: Progress, protocol: str
) -> Json:
    """What ``Task.measure_quality`` gives: run → the mean of the first of ``figures``, and each other one by its name.

    The first run, ``dense``, is what each run is compared with.
    """
    # Runs come batch by batch, in each batch the dense model first: its output is the reference of the others.
    first, *others = figures
    sums: dict[str, dict[str, float]] = {figure: {} for figure in figures}
    reference: Any = None
    for name, _, output in runs(batches, partial(progress, first)):
        reference = output if name == "dense" else reference
        for figure, of in figures.items():
            sums[figure][name] = sums[figure].get(name, 0.0) + float(of(output, reference))
    count = sum(map(len, batches))
    found = {figure: {name: round(total / count, 6) for name, total in of.items()} for figure, of in sums.items()}
    return {**found[first], "metric": first, **{name: found[name] for name in others}, "protocol": protocol}


def explain_unlisted(
    lists: AutoLists, config: PreTrainedConfig, classes: set[type[PreTrainedModel]], what: str
) -> str | None:
    """None if all ``classes`` are in these lists, else that the class does not do ``what``."""
    entries = [entry for named in lists for entry in named.values()]
    known = {name for entry in entries for name in ((entry,) if isinstance(entry, str) else entry)}
    names = {c.__name__ for c in classes}
    if names and names <= known:
        return None
    return f"{min(names, default=type(config).__name__)} does not {what}"


def compute_projection(output: Outputs, samples: Samples) -> Tensor:
    """A random projection of the outputs, for gradients where the distance from the dense model's has no slope.

    With signs r, E[(∂ rᵀf / ∂w)²] = Σ (∂f/∂w)²: squared gradients estimate the Gauss-Newton matrix's diagonal.
    """
    # Signs follow from the samples, so that they do not depend on batches, processes or the order of calls.
    found, seed = join_outputs(output), zlib.crc32(samples.tensors[0].cpu().numpy().tobytes())
    signs = torch.randint(2, found.shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return (found * signs.to(found.device)).sum()


def compute_output_errors(output: Outputs, reference: Outputs) -> Tensor:
    """‖f − f*‖² / ‖f*‖² of each sample, of all outputs."""
    found, expected = join_outputs(output), join_outputs(reference)
    return (found - expected).square().sum(1) / expected.square().sum(1).clamp_min(1e-12)


def sum_output_distances(output: Outputs, reference: Outputs) -> Tensor:
    """Σ ‖f − f*‖ / ‖f*‖ over samples, of all outputs."""
    return compute_output_errors(output, reference).sqrt().sum()


class TokenTask(ModelTask):
    """A task whose samples' targets are token ids at the positions of the logits."""

    def compute_loss(self, output: Tensor, samples: Samples) -> Tensor:
        """Sum of the negative log-likelihoods of the targets, in nats."""
        targets = samples.targets
        assert targets is not None
        if not isinstance(output, Tensor) or output.shape[:-1] != targets.shape or not self.count_predictions(samples):
            raise ModelError(
                "the gradient of a language model's loss needs logits [batch, length, vocab] and windows of 2 or "
                "more tokens; use magnitude or random for other models",
                name="method",
            )
        flat = output.flatten(0, -2).float()
        return F.cross_entropy(flat, targets.flatten(), ignore_index=IGNORED, reduction="sum")

    def count_predictions(self, samples: Samples) -> int:
        assert samples.targets is not None
        return int((samples.targets != IGNORED).sum())

    @torch.no_grad()
    def compute_perplexities(
        self, runs: Runs, samples: Samples, progress: Progress, metric: str, protocol: str
    ) -> Json:
        """What ``quality`` gives: run → e to the mean loss of a target, to 4 decimals."""
        rows, totals = samples.split(1), dict[str, float]()
        for name, i, logits in runs(rows, partial(progress, metric)):
            totals[name] = totals.get(name, 0.0) + float(self.compute_loss(logits, rows[i].to(logits.device)))
        tokens = self.count_predictions(samples)
        found = {name: round(math.exp(total / tokens), 4) for name, total in totals.items()}
        return {**found, "metric": metric, "protocol": protocol}
