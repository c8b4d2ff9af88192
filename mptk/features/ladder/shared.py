"""shared: the sizes of a ladder as one set of weights, in one folder.

Units are chosen as in a ladder, each size's among the next larger one's, before any training. Then each step trains all
sizes (``together.py``). Each is written and proven as a folder of its own, of which only the largest is published as a
whole (``rungs.py``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mptk.compat.accelerate import without_autocast
from mptk.compile.cut import build_small_model, compile_plan
from mptk.config import Settings, write_recipe
from mptk.conversions import fit_conversions
from mptk.distributed.processes import connect_processes, gather_tensors
from mptk.errors import InputError
from mptk.features.ladder.rungs import keep_rung
from mptk.features.ladder.slices import Places
from mptk.features.ladder.together import Together
from mptk.ir import Samples
from mptk.methods import find_method
from mptk.methods.division.budget import find_widths
from mptk.methods.maskprune.learner import Learner, Recovered
from mptk.methods.maskprune.train import Watch
from mptk.protocols import Compiled, Prepared, SampleSets, Witness
from mptk.publish.folder import publish
from mptk.run.describe import measure
from mptk.run.larger import join_larger, keep_reachable, take_larger
from mptk.run.prepare import prepare
from mptk.run.prune import (
    Result,
    choose_units,
    keep_stages_on_failure,
    prove_outputs,
    start_processes,
    write_report,
    write_targets,
)
from mptk.run.recover import adopt_weights, reconstruct, take_guards
from mptk.run.run import Run, Start
from mptk.run.samples import add_dense_outputs, read_samples
from passes.verify import Difference


def check_shared(settings: Settings) -> None:
    """Raise MptkError if the sizes of a ladder cannot share weights with these settings."""
    if find_method(settings.method).learns:
        raise InputError(
            f"{settings.method} trains each size by itself; give --shared a one-shot --method, as wanda", name="method"
        )
    # Each step trains the weights of all sizes at once (`together.py`), in none of these ways.
    given = {
        "--rank": bool(settings.learning.rank),
        "--gradient-checkpointing": settings.learning.gradient_checkpointing,
        "--quantize-aware": settings.learning.quantize_aware,
        "--distil-epochs": bool(settings.distil_epochs),
    }
    if wrong := next((name for name, is_given in given.items() if is_given), None):
        raise InputError(
            f"sizes that share weights are all trained together, without {wrong}; leave it out",
            name=wrong.removeprefix("--").replace("-", "_"),
        )
    if connect_processes().num_processes > 1:
        raise InputError(
            "sizes that share weights are trained in one process; start one, or leave out --shared", name="shared"
        )


def prune_together(model: Start, run: Run) -> Result:
    """Run every stage for the run's size and those of ``run.further``. Publishes and returns the largest.

    Raises:
        MptkError: norms change with a family's width, and something is trained; or as ``prune``.
    """
    prepared, run = prepare(model, run)
    with keep_stages_on_failure(prepared, run):
        folder_of_run = run.folder
        assert folder_of_run is not None
        if run.settings.steps and prepared.under_norms:
            raise InputError(
                f"{prepared.under_norms[0]} is trained by LoRA, which sizes cannot share; leave out --shared",
                name="shared",
            )
        sets, run = read_samples(prepared, run)
        sets = add_dense_outputs(prepared, sets, run)
        prepared = fit_conversions(prepared, sets.calibration, run)
        run = start_processes(prepared, run)
        # All sizes are chosen first, each among the units of the next larger one. Each keeps its stages in a folder.
        made = [cut_size(model, prepared, sets, run)]
        for i, sparsity in enumerate(run.further, 1):
            own = replace(run, folder=folder_of_run.open_within(f"{sparsity:g}"))
            made.append(cut_size(model, prepare_further(made[-1], sparsity, run.further[i:]), sets, own))
        # They are trained together. The smaller ones are published inside the run's folder, to be taken apart.
        (largest, checked), *others = recover_together(made, sets, run)
        full = [write_size(each, sets, more, run) for each, more in others]
        with publish(run.out, overwrite=run.settings.overwrite) as folder:
            notes = write_targets(largest, sets, folder, run)
            proven = prove_outputs(largest, sets, folder, checked, run)
            write_recipe(folder, run.source, run.settings, changes=list_ladder_options(run))
            # Of each smaller size only what the largest one does not have. The report comes last: it lists all files.
            for (each, _), kept in zip(others, full, strict=True):
                keep_rung(kept, folder, find_places(each, largest))
            report = write_report(largest, proven, sets, notes, folder, run)
        try:
            report = measure(report, largest, sets, run.out, run)
        finally:
            run.remove_folder()
    return Result(report, largest, sets, run)


def cut_size(model: Start, prepared: Prepared, sets: SampleSets, run: Run) -> Compiled:
    """Choose the units of a size and cut to them. A one-shot method has no witness, and nothing is distilled."""
    base = take_larger(prepared)
    chosen, _ = choose_units(model, base, sets, run)
    chosen = join_larger(prepared, reconstruct(base, chosen, sets, run))
    return compile_plan(prepared, chosen, sets.calibration, run)


def prepare_further(larger: Compiled, sparsity: float, rest: Sequence[float]) -> Prepared:
    """The model prepared to be cut further than ``larger``, among whose units it chooses. ``rest``: still smaller."""
    prepared = larger.prepared
    settings = replace(prepared.settings, sparsity=sparsity)
    prepared = replace(prepared, settings=settings, start=larger.chosen)
    return keep_reachable(replace(prepared, candidates=tuple(find_widths(prepared))), rest)


def recover_together(
    compiled: Sequence[Compiled], sets: SampleSets, run: Run
) -> list[tuple[Compiled, list[Difference]]]:
    """``recover_quality`` for sizes that share their weights, the largest first: each step trains all of them."""
    if run.folder is None or run.accelerator is None:
        return [(each, []) for each in compiled]
    prepared = compiled[0].prepared
    s = prepared.recovery
    learner = Learner(run.accelerator, prepared, sets.training, s, run.folder, run.progress)
    with run.stage("recover"):
        # A generator: `Together` takes one size at a time, and keeps no memory for what it shares with the largest.
        sizes = (
            (build_small_model(each, each.exact.state_dict()), find_places(each, compiled[0])) for each in compiled
        )
        held_out = take_guards(sets, s.training.batch)
        found = train_sizes(learner, Together(sizes), prepared.settings.steps, sets.proof, held_out)
    return [adopt_weights(each, one, sets, run) for each, one in zip(compiled, found, strict=True)]


def train_sizes(
    learner: Learner, student: Together, steps: int, batch: Samples, held_out: Samples | None
) -> list[Recovered]:
    """Train all sizes of ``student`` at once; returns what each became. Arguments as in ``Learner.recover``."""
    watch = None if held_out is None else Watch(held_out, metric="training loss, added up over the sizes")
    loop = learner.make_recovery_loop(student, steps, watch=watch, sizes=student.views)
    loop.run()
    without_autocast(learner.accelerator, loop.student)
    found = []
    for i, view in enumerate(student.views):
        witness = Witness("trained model", learner.compute_outputs(view, batch), learner.tolerance)
        found.append(Recovered(gather_tensors(student.compute_weights(i).items(), keep=True), witness, watch, steps))
    learner.accelerator.free_memory()
    return found


def find_places(compiled: Compiled, largest: Compiled) -> Places:
    """Where the weights of a size are in the largest size's, which has the same units and more."""
    analysis, found = compiled.analysis, dict[str, list[Tensor]]()
    for name, owner in {**{name: name for name in analysis.weights}, **analysis.program.aliases}.items():
        terms, one, other = analysis.weights.get(owner, ()), largest.chosen.cut, compiled.chosen.cut
        # Rows that differ along another dimension are not a slice of the largest size's: the weight is the size's own.
        if one.find_varying(terms) is None and other.find_varying(terms) is None:
            # Positions are sorted dense ones, and the larger size has all of the smaller one's.
            pairs = [(one.find_positions(term), other.find_positions(term)) for term in terms]
            found[name] = [torch.from_numpy(np.searchsorted(there, here)) for there, here in pairs]
    return found


def write_size(compiled: Compiled, sets: SampleSets, checked: Sequence[Difference], run: Run) -> Path:
    """Write, prove and measure a smaller size as a folder of its own in the run's folder. Returns it."""
    assert run.folder is not None
    settings = compiled.prepared.settings
    out = run.folder.make() / f"{settings.sparsity:g}"
    with publish(out, overwrite=settings.overwrite) as folder:
        notes = write_targets(compiled, sets, folder, run)
        proven = prove_outputs(compiled, sets, folder, checked, run)
        write_recipe(folder, run.source, settings, changes=list_ladder_options(run))
        report = write_report(compiled, proven, sets, notes, folder, run)
    measure(report, compiled, sets, out, run)
    return out


def list_ladder_options(run: Run) -> dict[str, object]:
    """Options of the recipe in place of those of one size, as ``write_recipe`` takes them."""
    # The recipe repeats the whole ladder, whose steps are divided again.
    sizes = [run.settings.sparsity, *run.further]
    steps = len(sizes) * run.settings.steps
    return {"ladder": ",".join(f"{size:g}" for size in sizes), "steps": steps, "sparsity": None}
