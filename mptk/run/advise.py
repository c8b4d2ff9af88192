"""advise: runs that measure cuts and write no model: how far a model can be cut, and the ways to divide a budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from mptk.config import Settings
from mptk.methods.division.advice import give_advice
from mptk.protocols import Advice
from mptk.run.prepare import prepare
from mptk.run.prune import keep_stages_on_failure
from mptk.run.run import Run, Start
from mptk.run.samples import read_domains


def measure_cuts(model: Start, run: Run, sparsities: Sequence[float], tolerance: float) -> tuple[Advice, Settings]:
    """Measure cuts of several sizes. Returns the advice, without commands, and the settings of the recommended cut.

    ``tolerance``: the largest change that is safe, as in ``mptk.advise``.
    """
    prepared, run = prepare(model, run)
    with keep_stages_on_failure(prepared, run):
        # `prepare` needed a tolerance that any model meets. The cuts themselves must lie near their sparsities.
        prepared = replace(prepared, settings=replace(prepared.settings, tolerance=Settings.tolerance))
        sets, texts = read_domains(prepared, run)
        found = give_advice(prepared, sets, texts, sparsities, tolerance, run)
        run.remove_folder()
    return found, prepared.settings
