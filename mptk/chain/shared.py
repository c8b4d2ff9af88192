"""shared: the sizes of a ladder as one set of weights, in one folder.

Units are chosen as in a ladder, each size's among the next larger one's, before any training. Then each step trains all
sizes (``methods/maskprune/together.py``). Each is written and proven as a folder of its own, of which only the largest
is published as a whole (``compile/rungs.py``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from mptk.chain.describe import measured
from mptk.chain.fit import places, recovered_together
from mptk.chain.job import Finished, Job
from mptk.chain.larger import further
from mptk.chain.prune import cut_down, written_folder
from mptk.chain.samples import compared, read_samples
from mptk.compile.rungs import keep_rung
from mptk.config.settings import Settings
from mptk.conversions import fitted
from mptk.distributed.processes import processes
from mptk.errors import MptkError
from mptk.methods import find_method
from mptk.methods.division.budget import find_widths
from mptk.methods.maskprune.learner import start_training
from mptk.protocols.chain import Compiled, Prepared
from mptk.protocols.values import Context, SampleSets
from passes.verify import Difference


def check_shared(settings: Settings) -> None:
    """Raise MptkError if the sizes of a ladder cannot share weights with these settings."""
    if find_method(settings.method).learns:
        raise MptkError(f"{settings.method} trains each size by itself; give --shared a one-shot --method, as wanda")
    given = {
        "--rank": bool(settings.learning.rank),
        "--gradient-checkpointing": settings.learning.gradient_checkpointing,
        "--distil-epochs": bool(settings.distil_epochs),
    }
    if wrong := next((name for name, is_given in given.items() if is_given), None):
        raise MptkError(f"sizes that share weights are all trained together, without {wrong}; leave it out")
    if processes().num_processes > 1:
        raise MptkError("sizes that share weights are trained in one process; start one, or leave out --shared")


def together(job: Job, prepared: Prepared, context: Context) -> Finished:
    """The stages after ``prepare`` for all sizes of ``job.ladder``. Publishes and returns the largest.

    Raises:
        MptkError: norms change with a family's width, and something is trained; or as ``mptk.chain.prune.run``.
    """
    settings, folder = prepared.settings, context.folder
    assert folder is not None
    if settings.steps and prepared.under_norms:
        raise MptkError(f"{prepared.under_norms[0]} is trained by LoRA, which sizes cannot share; leave out --shared")
    sets = compared(prepared, read_samples(job, prepared, context), context)
    prepared = fitted(prepared, sets.calibration, context)
    if settings.steps:
        context = replace(context, accelerator=start_training(settings.learning, folder))
    made = [cut_down(job, prepared, sets, context)[0]]
    for i, sparsity in enumerate(job.further, 1):
        own = replace(context, folder=folder.within(f"{sparsity:g}"))
        made.append(cut_down(job, smaller(made[-1], sparsity, job.further[i:]), sets, own)[0])
    (largest, witnessed), *others = recovered_together(made, sets, context)
    full = [written(job, each, folder.make(), sets, more, context) for each, more in others]

    def add(place: Path) -> None:
        for (each, _), kept in zip(others, full, strict=True):
            keep_rung(kept, place, places(each, largest))

    report = written_folder(job, largest, sets, witnessed, context, add)
    try:
        return Finished(measured(report, largest, sets, job.out, context), largest, sets)
    finally:
        folder.remove()


def smaller(larger: Compiled, sparsity: float, rest: Sequence[float]) -> Prepared:
    """The model prepared to be cut further than ``larger``, among whose units it chooses. ``rest``: still smaller."""
    prepared = larger.prepared
    settings = replace(prepared.settings, sparsity=sparsity)
    prepared = replace(prepared, settings=settings, start=larger.chosen)
    return further(replace(prepared, candidates=tuple(find_widths(prepared))), rest)


def written(
    job: Job, compiled: Compiled, place: Path, sets: SampleSets, witnessed: list[Difference], context: Context
) -> Path:
    """Write, prove and measure a smaller size as a folder of its own in ``place``; returns the folder."""
    out = place / f"{compiled.prepared.settings.sparsity:g}"
    job = replace(job, out=out)
    measured(written_folder(job, compiled, sets, witnessed, context), compiled, sets, out, context)
    return out
