"""changes: the dense model's weights that a pruned folder, or training, replaced."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path

from torch import Tensor

from mptk.errors import MptkError
from mptk.io import models
from mptk.io.resident import Resident
from mptk.io.untrusted import damaged, load_tensors
from mptk.ir.families import Analysis
from mptk.ir.resolved_plan import Cut, renumbering
from mptk.ir.weights import Lazy, Weights
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
        biases = load_tensors(folder / COMPENSATION, damaged(folder / COMPENSATION))
        for name, bias in biases.items():
            if name not in state or bias.ndim != 1 or bias.shape != state.like(name).shape:
                raise MptkError(
                    f"{COMPENSATION} holds {name}, which is no bias of the model; "
                    "do not use it, and prune the model again"
                )
        return biases
    if not report.trained:
        return {}
    small = models.open_weights(str(folder), Resident(0), trust_remote_code=trust).weights
    assert small is not None
    new = renumbering(analysis, cut).new
    return widened(analysis, cut, small.selected({n: there for n in report.trained if (there := new(n)) is not None}))


def widened(analysis: Analysis, cut: Cut, small: Weights) -> Weights:
    """The dense weights with a cut model's weights at the positions that stay. ``small``: under the dense names."""
    state = analysis.program.state

    def wide(name: str) -> Tensor:
        return cut.scatter(state[name], small[name], analysis.weights[name])

    return Weights({name: Lazy(state.like(name).to("meta"), partial(wide, name)) for name in small})
