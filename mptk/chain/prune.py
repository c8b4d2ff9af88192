"""prune: the main job as a chain of values, from a dense model to a proven folder. ``api/pruned.py`` starts it.

``prepare`` → Prepared, ``choose`` → Chosen, ``compile_plan`` → Compiled, ``prove_folder`` → Proven, ``describe`` →
Report. A folder is published only if every stage of the proof is within its tolerance.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from mptk.chain.amounts import in_time, note, resumed, settled
from mptk.chain.checks import check_settings, given_plan
from mptk.chain.describe import describe, measured
from mptk.chain.fit import distilled, reconstructed, recovered
from mptk.chain.job import Finished, Job, held
from mptk.chain.kept import kept_choice
from mptk.chain.larger import begun, joined
from mptk.chain.prepare import announce, prepare
from mptk.chain.samples import KEPT_SAMPLES, compared, read_samples
from mptk.compat.accelerate import own_state
from mptk.compat.torch import sources_forgotten
from mptk.compile.changes import COMPENSATION
from mptk.compile.cut import changed, compile_plan
from mptk.compile.trace import fixed_sizes, one_length, trained_otherwise
from mptk.config.recipe import write_recipe
from mptk.config.setting import to_json
from mptk.config.settings import Settings
from mptk.conversions import fitted, with_conversions
from mptk.distributed.processes import describe as describe_processes
from mptk.distributed.processes import leads, once, processes
from mptk.errors import MptkError, ProofError, explained
from mptk.io.tensors import write_weights
from mptk.ir.plan import Plan
from mptk.ir.weights import Weights
from mptk.methods.division.budget import left_whole, nearest
from mptk.methods.division.search import search_shapes, winner
from mptk.methods.drafter import with_drafter
from mptk.methods.maskprune.learner import start_training
from mptk.progress import silent
from mptk.proof.proof import check_proof, check_witness, prove_folder
from mptk.proof.same_class import check_same_class
from mptk.protocols.chain import Chosen, Compiled, Prepared
from mptk.protocols.execution import find_device
from mptk.protocols.origin import origin_of
from mptk.protocols.report import Report
from mptk.protocols.run_folder import GIVEN, RunFolder, check_unfinished, kept_settings
from mptk.protocols.values import Context, SampleSets
from mptk.publish.folder import publish
from mptk.publish.licence import copy_notices
from mptk.report.card import write_card
from mptk.targets import written
from passes.verify import Difference

WorkResult = TypeVar("WorkResult")

FOUND = ("sparsity", "length", "eval_length", "families", "keep")
"""Settings that the run itself fills in: from a latency, a trace of one length, or the families in a part."""

REMEDY = "nothing was published. Please report this model"


def run(job: Job, settings: Settings, context: Context) -> Finished | None:
    """Run every stage in order. Of several processes only the first gets the result; the others get None.

    Raises:
        MptkError: the model cannot be loaded, traced or cut; no legal widths meet the budget (said before any work);
            or a stage of the proof exceeds its tolerance. ``job.out`` then stays as it was.
    """
    if settings.shared:
        raise MptkError("only the sizes of a ladder can share weights; use mptk.ladder, or leave out --shared")
    return started(worked, job, settings, context)


@sources_forgotten()
def started(
    work: Callable[[Job, Prepared, Context], WorkResult],
    job: Job,
    settings: Settings,
    context: Context,
    *,
    trains: bool = True,
) -> WorkResult:
    """What ``work`` makes of the job once its model is prepared. ``trains``: whether the settings' steps are run."""
    find_device(settings.device)  # accelerate says less of one that is not there
    with own_state(settings.device), explained(), held(job, settings):
        if not trains:
            settings = replace(settings, samples=settings.windows, search_tokens=settings.trial_tokens)
        job = replace(job, plan=given_plan(settings))
        complete = settled(settings, job.start is not None, job.plan)
        check_settings(complete, job.plan, job.vocabulary)
        if trains:
            complete = once(lambda: decided(job, settings))
        else:
            complete = replace(complete, minutes=None, learning=replace(complete.learning, steps=0))
        return prepared_for(work, job, complete, context if leads() else replace(context, progress=silent))


def decided(job: Job, settings: Settings) -> Settings:
    """Complete settings: with the numbers of the unfinished run that is resumed, else with what minutes allow."""
    recovers = job.start is not None
    if settings.resume:
        settings = resumed(settings, kept_settings(job.out), recovers)
    if job.needs is None:
        return settled(settings, recovers, job.plan)
    return in_time(settings, job.needs, recovers, job.plan)


def prepared_for(
    work: Callable[[Job, Prepared, Context], WorkResult], job: Job, settings: Settings, context: Context
) -> WorkResult:
    """Prepare the job and call ``work``. If it fails, the folder of the unfinished run stays if it saves time later."""
    if keeps_stages(settings):
        check_unfinished(job.out, described(job.source, settings), settings.resume, but=(*FOUND, GIVEN))
    if job.needs is not None:
        announce(job.needs(settings), job, context)
    prepared = prepare(job, settings, context)
    context = begin(job, prepared, context)
    try:
        return work(job, prepared, context)
    except Exception as error:
        if context.folder is not None and leads():
            context.folder.remove_unless(KEPT_SAMPLES)  # nothing that a further run could not do as fast
        if isinstance(error, ProofError):  # which a model that changed meanwhile explains
            require_unchanged(job, prepared)
            if prepared.target.classed:
                check_same_class(
                    prepared.given, prepared.task, prepared.task.example(prepared.given.model), failed=True
                )
        raise


def require_unchanged(job: Job, prepared: Prepared) -> None:
    """Raise MptkError if an input of the run changed since the run began."""
    prepared.origin.require(origin_of(job.source, prepared.given, prepared.settings, job.start, job.plan))


def worked(job: Job, prepared: Prepared, context: Context) -> Finished | None:
    """The stages after ``prepare``: samples, choice, cut, training, proof, report."""
    settings = prepared.settings
    sets = compared(prepared, read_samples(job, prepared, context), context)
    if job.given is None:
        prepared = fitted(prepared, sets.calibration, context)
    if settings.search:
        prepared = winner(prepared, search_shapes(prepared, sets, context))
    if context.folder is not None and settings.steps:
        context = replace(context, accelerator=start_training(settings.learning, context.folder))
    compiled, witnessed = cut_down(job, prepared, sets, context)
    compiled, more = recovered(compiled, sets, context)
    processes().wait_for_everyone()  # the others may still read what the folder keeps
    if not processes().is_main_process:
        return None
    report = written_folder(job, compiled, sets, [*witnessed, *more], context)
    try:
        return Finished(measured(report, compiled, sets, job.out, context), compiled, sets)
    finally:
        if context.folder is not None:
            context.folder.remove()


def cut_down(job: Job, prepared: Prepared, sets: SampleSets, context: Context) -> tuple[Compiled, list[Difference]]:
    """Choose what is cut, fit what stays, and cut. Also returns the difference of a model that learned its masks."""
    start = begun(prepared)
    chosen = choose(job, start, sets, context)
    witnessed = []
    if chosen.witness is not None:
        analysis = changed(start, chosen)
        witnessed.append(check_witness(analysis, chosen.cut, chosen.witness, sets.proof, prepared.executor))
    chosen = joined(prepared, distilled(start, reconstructed(start, chosen, sets, context), sets, context))
    return with_drafter(compile_plan(prepared, chosen, sets.calibration, context)), witnessed


def remedy(compiled: Compiled) -> str:
    """What to do if the proof fails."""
    if compiled.written is None or not compiled.epsilons:
        return REMEDY
    changes = ", ".join(f"{old:g} → {new:g}" for old, new in compiled.epsilons.items())
    return (
        f"nothing was published. The cut changes the epsilon of norms in the config ({changes}); if the class reads it "
        "for norms of small values, too, only --target graph can hold this cut; else please report this model"
    )


# ---- choosing ----


def begin(job: Job, prepared: Prepared, context: Context) -> Context:
    """The context with the folder of the unfinished run, if the run chooses or trains something."""
    settings = prepared.settings
    if not keeps_stages(settings):
        return context
    known = {**described(job.source, settings), GIVEN: dict(prepared.origin.parts)}
    return replace(context, folder=RunFolder(job.out, known, settings.resume))


def keeps_stages(settings: Settings) -> bool:
    """Whether the run chooses or trains something that its folder should store."""
    return not settings.fixed or settings.steps > 0


def described(source: str, settings: Settings) -> dict[str, object]:
    """The values that an unfinished run stores and that must be equal to continue it."""
    may_differ = {each.path for each in Settings.declared if each.setting.resumable}
    return {"model": source, **{k: v for k, v in to_json(settings).items() if k not in may_differ}}


def choose(job: Job, prepared: Prepared, sets: SampleSets, context: Context) -> Chosen:
    """Choose what is cut: from the job, from a plan file, or by the method."""
    if job.given is not None:
        return job.given(prepared)
    if prepared.plan is not None:
        assert prepared.cut is not None
        return with_conversions(prepared, Chosen(prepared.plan, prepared.cut))
    s = prepared.settings
    chosen = kept_choice(prepared, context.folder, lambda: prepared.method.choose(prepared, sets, context))
    meta = {"model": prepared.source, "method": s.method, "sparsity": s.sparsity, "seed": s.seed}
    return with_conversions(prepared, replace(chosen, plan=Plan(chosen.plan.families, meta)))


# ---- cutting, training, writing ----


def written_folder(
    job: Job,
    compiled: Compiled,
    sets: SampleSets,
    witnessed: list[Difference],
    context: Context,
    add: Callable[[Path], None] = lambda folder: None,
) -> Report:
    """Write, prove and publish the folder. The quality in its report is measured afterwards.

    ``add``: writes what else the folder has.
    """
    prepared, chosen = compiled.prepared, compiled.chosen
    targets = written(prepared.target, prepared.settings)
    with publish(job.out, overwrite=prepared.settings.overwrite) as folder:
        if context.folder is not None and context.accelerator is not None:
            context.folder.finish(folder)
        chosen.plan.save(folder / "plan.json")
        if chosen.changes and not chosen.trained:
            write_weights(folder / COMPENSATION, Weights(chosen.changes))
        notes = [
            prepared.loaded.note,
            *chosen.notes,
            describe_processes(context.accelerator) if context.accelerator else "",
        ]
        notes += [note(prepared.settings), one_length(prepared), fixed_sizes(prepared)]
        notes += [trained_otherwise(prepared)]
        notes += [each.note for each in prepared.conversions]
        notes += [left_whole(prepared.legal), nearest(prepared)]
        for target in targets:
            with context.stage(f"write {target.name}"):
                notes += target.emit(compiled, sets, folder, context.log)
        with context.stage("prove"):
            proven = prove_folder(compiled, targets, folder, sets.calibration, whole=prepared.settings.strict)
        proven = replace(proven, differences=(*witnessed, *proven.differences))
        check_proof(proven.differences, remedy(compiled))
        require_unchanged(job, prepared)
        write_recipe(folder, job.source, prepared.settings, job.start, job.ladder)
        copy_notices(prepared.loaded.path, folder)
        add(folder)
        report = describe(compiled, proven, sets, [*notes, *proven.left_out, proven.note], folder, context)
        report.write(folder)
        write_card(report, compiled, folder)
    return report
