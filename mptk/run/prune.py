"""prune: the main job from top to bottom, from a dense model to a proven folder.

``prepare`` gives a Prepared, ``choose_units`` a Chosen, ``compile_plan`` a Compiled, ``prove_outputs`` a Proven,
``describe`` a Report. A folder is published only if every stage of the proof is within its tolerance.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from typing_extensions import TypedDict

from mptk.compile.cut import COMPENSATION, apply_choice, compile_plan
from mptk.compile.trace import describe_fixed_sizes, describe_gradient_limits, describe_one_length
from mptk.config import write_recipe
from mptk.conversions import fit_conversions, with_conversions
from mptk.distributed.processes import connect_processes, is_leader
from mptk.distributed.processes import describe_processes as describe_processes
from mptk.errors import FileError, InputError, ProofError
from mptk.io import write_weights
from mptk.ir import Analysis, Plan, Weights, resolve_plan
from mptk.methods.division.budget import describe_left_whole, describe_nearest
from mptk.methods.maskprune.learner import start_training
from mptk.proof.proof import check_proof, check_witness, prove_folder
from mptk.proof.same_class import check_same_class
from mptk.protocols import (
    Chosen,
    Compiled,
    Kept,
    Prepared,
    Proven,
    Report,
    SampleSets,
    compute_origin,
    list_stages,
    name_run_folder,
)
from mptk.publish.folder import publish
from mptk.publish.licence import copy_notices
from mptk.reading import make_typed
from mptk.report.card import write_card
from mptk.run.describe import describe, measure
from mptk.run.larger import join_larger, take_larger
from mptk.run.minutes import note_minutes
from mptk.run.prepare import prepare
from mptk.run.pruned_folder import PrunedFolder
from mptk.run.recover import distil, reconstruct, recover_quality
from mptk.run.replan import limit_masks, plan_fitting, plan_measurement, record_numbers
from mptk.run.run import Run, Start
from mptk.run.samples import KEPT_SAMPLES, add_dense_outputs, read_samples
from mptk.targets import list_run_targets as targets_of
from passes.verify import Difference

REMEDY = "nothing was published. Please report this model"


@dataclass(frozen=True)
class Result:
    """The report of a proven folder, the compiled model, and the samples of the run.

    ``report``: None in all processes but the first. ``run``: with what its stages found.
    """

    report: Report | None
    compiled: Compiled
    sets: SampleSets
    run: Run


def run_prune(model: Start, run: Run) -> Result:
    """Run every stage in order. Of several processes only the first writes, and has the report.

    Raises:
        MptkError: the model cannot be loaded, traced or cut; no legal widths meet the budget (said before any work);
            or a stage of the proof exceeds its tolerance. The output then stays as it was.
    """
    if why := run.settings.not_alone:
        raise InputError(why)
    # What is there: the dense model, traced and analysed, the widths it may get, and text.
    prepared, run = prepare(model, run)
    with keep_stages_on_failure(prepared, run):
        sets, run = read_samples(prepared, run)
        sets = add_dense_outputs(prepared, sets, run)
        # What is cut. The conversions of a pruned folder were fitted when it was made.
        if not isinstance(model, PrunedFolder):
            prepared = fit_conversions(prepared, sets.calibration, run)
        for stage in list_stages():
            prepared, rows = stage.divide(prepared, sets, run)
            run = replace(run, rows={**run.rows, **rows})
        run = start_processes(prepared, run)  # features divide the budget in one process
        # Minutes limit the clock: from here on, each stage is planned by what those before it took.
        run, base = limit_masks(prepared, run), take_larger(prepared)
        chosen, checked = choose_units(model, base, sets, run)
        prepared, sets = plan_fitting(prepared, chosen, sets, run)
        base = replace(base, settings=prepared.settings)
        chosen = distil(base, reconstruct(base, chosen, sets, run), sets, run)
        compiled = compile_plan(prepared, join_larger(prepared, chosen), sets.calibration, run)
        compiled, further = recover_quality(compiled, sets, run)
        # What is published. The other processes have trained with the first and have nothing to write.
        connect_processes().wait_for_everyone()  # they may still read what the folder keeps
        if not connect_processes().is_main_process:
            return Result(None, compiled, sets, run)
        with publish(run.out, overwrite=run.settings.overwrite) as folder:
            notes = write_targets(compiled, sets, folder, run)
            proven = prove_outputs(compiled, sets, folder, [*checked, *further], run)
            compiled, sets = plan_measurement(compiled, sets, run)
            run = record_numbers(run, compiled)
            write_recipe(folder, run.source, run.settings, run.start)
            report = write_report(compiled, proven, sets, notes, folder, run)
        try:
            report = measure(report, compiled, sets, run.out, run)
        finally:  # the folder is published: what a resumed run would need is done
            run.remove_folder()
    return Result(report, compiled, sets, run)


@contextmanager
def keep_stages_on_failure(prepared: Prepared, run: Run) -> Iterator[None]:
    """If a stage fails, the folder of the unfinished run stays only if it saves time later.

    In place of a failed proof it raises an MptkError that explains it, if an input changed during the run.
    """
    try:
        yield
    except Exception as error:
        if run.folder is not None and is_leader():
            run.folder.remove_unless(KEPT_SAMPLES)  # a new run can redo these as fast
        if isinstance(error, ProofError):
            # Both raise an error of their own if they find the cause: changed inputs, or a class that is not the model.
            check_unchanged(prepared, run)
            if prepared.target.classed:
                example = prepared.task.make_example(prepared.given.model)
                check_same_class(prepared.given, prepared.task, example, failed=True)
        raise


def check_unchanged(prepared: Prepared, run: Run) -> None:
    """Raise MptkError if an input changed since the run began: the result would mix old and new."""
    run.origin.require(compute_origin(run.source, prepared.given, prepared.settings, run.start, run.plan))


def start_processes(prepared: Prepared, run: Run) -> Run:
    """The run with the processes that train, if it trains."""
    if run.folder is None or not prepared.settings.steps:
        return run
    return replace(run, accelerator=start_training(prepared.settings.learning, run.folder))


# ---- choosing and cutting ----


def choose_units(model: Start, base: Prepared, sets: SampleSets, run: Run) -> tuple[Chosen, list[Difference]]:
    """Choose what is cut of ``base``: as a pruned folder or a plan says, or by the method.

    Also returns the difference between what training saw of a model that learned its masks, and what it computes.
    """
    if isinstance(model, PrunedFolder):
        return model.read_choice(base), []
    if base.planned is not None:
        return with_conversions(base, base.planned), []
    choose = partial(base.method.choose, base, sets, run)
    # Training writes checkpoints of its own, from which it makes its choice again.
    found = choose() if base.method.learns else run.keep("choice", choose, bound=base.executor.borders)
    chosen = read_choice(found, base.analysis, name_run_folder(run.out)) if isinstance(found, Kept) else found
    s = base.settings
    meta = {"model": run.source, "method": s.method, "sparsity": s.sparsity, "seed": s.seed}
    chosen = with_conversions(base, replace(chosen, plan=Plan(chosen.plan.families, meta)))
    if chosen.witness is None:
        return chosen, []
    # The weights that learned the masks are compared here, before reconstruction changes them.
    analysis = apply_choice(base, chosen)
    return chosen, [check_witness(analysis, chosen.cut, chosen.witness, sets.proof, base.executor)]


class KeptChoice(TypedDict):
    """The facts of a choice in the folder of an unfinished run (``Chosen.facts``). A loss of None is infinite."""

    plan: Mapping[str, object]
    trained: Sequence[str]
    losses: Mapping[str, float | None]
    notes: Sequence[str]


def read_choice(kept: Kept, analysis: Analysis, folder: Path) -> Chosen:
    """The choice that an unfinished run kept. ``folder``: of that run."""
    known = read_choice_facts(kept.facts, folder)
    plan = Plan.from_json(known["plan"])
    losses = {widths: math.inf if loss is None else loss for widths, loss in known["losses"].items()}
    cut = resolve_plan(analysis, plan)
    return Chosen(plan, cut, kept.tensors, tuple(known["trained"]), losses, tuple(known["notes"]))


def read_choice_facts(facts: Mapping[str, object], folder: Path) -> KeptChoice:
    """The facts of a kept choice. Raises MptkError if they are damaged."""
    try:
        return make_typed(KeptChoice, facts)
    except ValueError as error:
        raise FileError(
            f"the choice in {folder} is damaged: {error}; remove it, and start again", name=folder
        ) from error


# ---- writing ----


def write_targets(compiled: Compiled, sets: SampleSets, folder: Path, run: Run) -> list[str]:
    """Write the plan, the cut model and its graphs into ``folder``. Returns notes for the report."""
    prepared, chosen = compiled.prepared, compiled.chosen
    if run.folder is not None and run.accelerator is not None:  # it trained, so there are metrics
        run.folder.finish(folder)
    chosen.plan.save(folder / "plan.json")
    # Biases that the method made are not in the dense checkpoint, from which `verify` cuts again; trained weights are
    # read from the result itself.
    if chosen.changes and not chosen.trained:
        write_weights(folder / COMPENSATION, Weights(chosen.changes))
    # What a reader of the report should know, in the order of the run. Empty notes are left out by `describe`.
    notes = [
        prepared.loaded.note,
        *chosen.notes,
        describe_processes(run.accelerator) if run.accelerator else "",
        note_minutes(prepared.settings),
        describe_one_length(prepared),
        describe_fixed_sizes(prepared),
        describe_gradient_limits(prepared),
        *(each.note for each in prepared.conversions),
        describe_left_whole(prepared.legal),
        describe_nearest(prepared),
    ]
    for target in targets_of(prepared.target, prepared.settings):
        with run.stage(f"write {target.name}"):
            notes += target.emit(compiled, sets, folder, run.log)
    return notes


def prove_outputs(
    compiled: Compiled, sets: SampleSets, folder: Path, checked: Sequence[Difference], run: Run
) -> Proven:
    """Prove what was written, and that no input changed meanwhile. ``checked``: differences of trained models.

    Raises:
        ProofError: a stage exceeds its tolerance (``keep_stages_on_failure`` looks for the cause).
        MptkError: an input of the run changed.
    """
    prepared = compiled.prepared
    targets = targets_of(prepared.target, prepared.settings)
    with run.stage("prove"):
        proven = prove_folder(compiled, targets, folder, sets.calibration, whole=prepared.settings.strict)
    proven = replace(proven, differences=(*checked, *proven.differences))
    check_proof(proven.differences, find_remedy(compiled))
    check_unchanged(prepared, run)
    return proven


def find_remedy(compiled: Compiled) -> str:
    """What to do if the proof fails."""
    if compiled.written is None or not compiled.epsilons:
        return REMEDY
    # A norm over fewer channels has another mean square, which another epsilon makes up for (`fold_norms.py`). The
    # config may have one epsilon for all norms of the model, also for norms that were not cut.
    changes = ", ".join(f"{old:g} → {new:g}" for old, new in compiled.epsilons.items())
    return (
        f"nothing was published. The cut changes the epsilon of norms in the config ({changes}); if the class reads it "
        "for norms of small values, too, only --target graph can hold this cut; else please report this model"
    )


def write_report(
    compiled: Compiled, proven: Proven, sets: SampleSets, notes: Sequence[str], folder: Path, run: Run
) -> Report:
    """Write notices, the report without its quality, and the card into ``folder``."""
    copy_notices(compiled.prepared.loaded.path, folder)
    report = describe(compiled, proven, sets, [*notes, *proven.left_out, proven.note], folder, run)
    report.write(folder)
    write_card(report, compiled, folder)
    return report
