"""A target: the cut weights as one NumPy archive, all widths multiples of 8. `mptk prune MODEL --target npz` writes it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn

from mptk.ir.alignment import Alignment
from mptk.ir.families import Analysis
from mptk.ir.passes import Log
from mptk.ir.weights import Weights
from mptk.protocols.chain import Compiled, Target
from mptk.protocols.values import Checks, SampleSets
from mptk.targets.graph import compare_stored
from passes.targets.legalize import LegalWidths, find_graph_widths

FILE = "weights.npz"
STEP = 8


class NpzTarget(Target):
    """Weights by name in ``weights.npz``, for a runtime of your own."""

    name = "npz"
    summary = "a NumPy archive, widths in multiples of 8"

    def find_legal(self, analysis: Analysis, model: nn.Module, alignment: Alignment) -> LegalWidths:
        whole = find_graph_widths(analysis, alignment)
        ladders = {
            family.name: tuple(w for w in whole.ladders[family.name] if w % STEP == 0 or w == family.size)
            for family in analysis.families
        }
        return LegalWidths({**whole.ladders, **ladders}, whole.refused, whole.accepts)

    def emit(self, compiled: Compiled, sets: SampleSets, folder: Path, log: Log) -> list[str]:
        np.savez(folder / FILE, **{name: weight.detach().numpy() for name, weight in compiled.program.state.items()})
        return []

    def has_written(self, folder: Path) -> bool:
        return (folder / FILE).is_file()

    def make_checks(self, compiled: Compiled, folder: Path, crossed: Sequence[int]) -> Checks:
        with np.load(folder / FILE) as archive:
            stored = {name: torch.from_numpy(archive[name]) for name in archive.files}
        return Checks((compare_stored(Weights(stored), compiled.program.state),))


NPZ = NpzTarget()
