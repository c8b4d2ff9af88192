"""changes: the dense model's weights that a pruned folder, or training, replaced."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from mptk.errors import MptkError
from mptk.io import models
from mptk.ir.families import Analysis
from mptk.ir.resolved_plan import Cut
from mptk.run.report import Report

COMPENSATION = "compensation.safetensors"
"""A folder's file of corrected biases (FLAP)."""


def changes_of(analysis: Analysis, cut: Cut, folder: Path, report: Report, trust: bool) -> Mapping[str, Tensor]:
    """Weights in which the folder differs from a cut of the dense model: trained ones, or FLAP's biases.

    Raises:
        MptkError: the folder's file of biases holds something else; or its checkpoint cannot be loaded.
    """
    state = analysis.program.state
    if (folder / COMPENSATION).is_file():
        biases = load_file(folder / COMPENSATION)
        for name, bias in biases.items():
            if name not in state or bias.ndim != 1 or bias.shape != state[name].shape:
                raise MptkError(
                    f"{COMPENSATION} holds {name}, which is no bias of the model; "
                    "do not use it, and prune the model again"
                )
        return biases
    if not report.trained:
        return {}
    small = models.load(str(folder), trust_remote_code=trust).model.state_dict()
    return widened(analysis, cut, {name: small[name] for name in report.trained})


def widened(analysis: Analysis, cut: Cut, small: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The dense weights with a cut model's weights at the positions that stay."""
    state = analysis.program.state
    return {name: cut.scatter(state[name], tensor, analysis.weights[name]) for name, tensor in small.items()}
