"""advise: runs that measure cuts and write no model: how far a model can be cut, and the ways to divide a budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from mptk.config import Settings, format_command
from mptk.conversions import fit_conversions
from mptk.files import write_json
from mptk.methods.division.advice import give_advice
from mptk.methods.division.search import search_shapes
from mptk.protocols import Advice, Shapes
from mptk.publish.folder import publish
from mptk.run.prepare import prepare
from mptk.run.prune import keep_stages_on_failure
from mptk.run.run import Run, Start
from mptk.run.samples import add_dense_outputs, read_domains, read_samples

SHAPES_FILE = "shapes.json"


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


def search_and_rank(model: Start, run: Run, asked: Settings, *, writes: bool) -> Shapes:
    """Rank the legal ways to divide a budget, with the command that cuts to the best, if the model has a name.

    ``asked``: the settings that the command repeats. ``writes``: into the run's output.
    """
    prepared, run = prepare(model, run)
    with keep_stages_on_failure(prepared, run):
        # A search compares shapes on held-out samples of the training data: there is no result to measure.
        sets, run = read_samples(prepared, run, measures=False)
        sets = add_dense_outputs(prepared, sets, run)
        found = search_shapes(fit_conversions(prepared, sets.calibration, run), sets, run)
        if isinstance(model, str):
            # As asked, not as completed: the command's own run completes its numbers for its own work.
            found = replace(found, command=format_command(model, asked, found.best.widths))
        if writes:
            with publish(run.out, overwrite=run.settings.overwrite) as folder:
                write_json(folder / SHAPES_FILE, found.to_json())
        run.remove_folder()
    return found
