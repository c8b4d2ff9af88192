"""prune: the main job as a chain of values, from a dense model to a proven folder. ``api/pruned.py`` starts it.

``prepare`` → Prepared, ``choose`` → Chosen, ``compile_plan`` → Compiled, ``prove_folder`` → Proven, ``describe`` →
Report. A folder is published only if every stage of the proof is within its tolerance.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, replace
from functools import partial
from typing import Any, TypeVar

from mptk.chain.amounts import SHARE, in_time, note, resumed, settled, wanted, watched
from mptk.chain.describe import describe, measured
from mptk.chain.job import Finished, Given, Job, held
from mptk.chain.kept import kept_choice, kept_fit
from mptk.chain.prepare import announce, check_settings, given_plan, prepare
from mptk.compat.accelerate import own_state
from mptk.compat.torch import sources_forgotten
from mptk.compile.changes import COMPENSATION, widened
from mptk.compile.cut import changed, compile_plan, cut_to, small_model
from mptk.compile.dense_outputs import with_outputs
from mptk.compile.trace import fitting, fixed_sizes, one_length
from mptk.config.recipe import write_recipe
from mptk.config.settings import IN_MEMORY, Settings
from mptk.conversions import fitted, with_conversions
from mptk.distributed.processes import describe as describe_processes
from mptk.distributed.processes import holds, leads, once, processes
from mptk.errors import ProofError, explained
from mptk.io import data
from mptk.io.tensors import write_weights
from mptk.ir.plan import Plan
from mptk.ir.resolved_plan import removed_blocks, renumbering
from mptk.ir.samples import Samples
from mptk.ir.weights import Weights
from mptk.methods.distil import Schedule, distil_blocks
from mptk.methods.division.budget import left_whole
from mptk.methods.division.search import search_shapes, winner
from mptk.methods.maskprune.learner import Learner, start_training
from mptk.methods.reconstruct import consumers, kept_units, reconstruct_consumers
from mptk.progress import silent
from mptk.proof.proof import check_proof, check_witness, prove_folder
from mptk.protocols.chain import Chosen, Compiled, Prepared, reconstructs
from mptk.protocols.execution import find_device
from mptk.protocols.origin import check_samples, origin_of
from mptk.protocols.report import Report, Row
from mptk.protocols.run_folder import GIVEN, RunFolder, check_unfinished, kept_settings
from mptk.protocols.values import Context, SampleSets
from mptk.publish.folder import publish
from mptk.publish.licence import copy_notices
from mptk.report.card import write_card
from mptk.targets import written
from passes.transforms.insert_masks import MaskSite
from passes.verify import Difference

T = TypeVar("T")

FOUND = ("sparsity", "length", "eval_length")
"""Settings that the run itself fills in: from a latency, or from a trace of one length."""

SAMPLES = "samples"
"""Name of the samples in the folder of an unfinished run."""

REMEDY = "nothing was published. Please report this model"


def run(job: Job, settings: Settings, context: Context) -> Finished | None:
    """Run every stage in order. Of several processes only the first gets the result; the others get None.

    Raises:
        MptkError: the model cannot be loaded, traced or cut; no legal widths meet the budget (said before any work);
            or a stage of the proof exceeds its tolerance. ``job.out`` then stays as it was.
    """
    return started(worked, job, settings, context)


@sources_forgotten()
def started(
    work: Callable[[Job, Prepared, Context], T], job: Job, settings: Settings, context: Context, *, trains: bool = True
) -> T:
    """What ``work`` makes of the job once its model is prepared. ``trains``: whether the settings' steps are run."""
    find_device(settings.device)  # accelerate says less of one that is not there
    with own_state(settings.device), explained(), held(job, settings.overwrite):
        if not trains:
            settings = replace(settings, samples=settings.windows, search_tokens=settings.trial_tokens)
        complete = settled(settings, job.start is not None)
        job = replace(job, plan=given_plan(settings))
        check_settings(complete, job.plan, job.vocabulary)
        if trains:
            complete = once(lambda: decided(job, settings))
        else:
            complete = replace(complete, minutes=None, learning=replace(complete.learning, steps=0))
        return prepared_for(work, job, complete, context if leads() else replace(context, progress=silent))


def decided(job: Job, settings: Settings) -> Settings:
    """Complete settings: with the numbers of the unfinished run that is resumed, else with what minutes allow."""
    if settings.resume:
        settings = resumed(settings, kept_settings(job.out))
    recovers = job.start is not None
    return settled(settings, recovers) if job.needs is None else in_time(settings, job.needs, recovers)


def prepared_for(work: Callable[[Job, Prepared, Context], T], job: Job, settings: Settings, context: Context) -> T:
    """Prepare the job and call ``work``. If it fails, the folder of the unfinished run stays if it saves time later."""
    if keeps_stages(settings):
        check_unfinished(job.out, described(job, settings), settings.resume, but=(*FOUND, GIVEN))
    if job.needs is not None:
        announce(job.needs(settings), job, context)
    prepared = prepare(job, settings, context)
    context = begin(job, prepared, context)
    try:
        return work(job, prepared, context)
    except Exception as error:
        if context.folder is not None and leads():
            context.folder.remove_unless(SAMPLES)  # nothing that a further run could not do as fast
        if isinstance(error, ProofError):  # which a model that changed meanwhile explains
            require_unchanged(job, prepared)
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
    chosen = choose(job, prepared, sets, context)
    witnessed = []
    if chosen.witness is not None:
        analysis = changed(prepared, chosen)
        witnessed.append(check_witness(analysis, chosen.cut, chosen.witness, sets.proof, prepared.executor))
    chosen = distilled(prepared, reconstructed(prepared, chosen, sets, context), sets, context)
    compiled = compile_plan(prepared, chosen, sets.calibration, context)
    compiled, more = recovered(compiled, sets, context)
    processes().wait_for_everyone()  # the others may still read what the folder keeps
    if not processes().is_main_process:
        return None
    report = written_folder(job, compiled, sets, [*witnessed, *more], context)
    try:
        return Finished(measured(report, compiled, sets, job.out, context), compiled)
    finally:
        if context.folder is not None:
            context.folder.remove()


# ---- choosing ----


def begin(job: Job, prepared: Prepared, context: Context) -> Context:
    """The context with the folder of the unfinished run, if the run chooses or trains something."""
    settings = prepared.settings
    if not keeps_stages(settings):
        return context
    known = {**described(job, settings), GIVEN: dict(prepared.origin.parts)}
    return replace(context, folder=RunFolder(job.out, known, settings.resume))


def keeps_stages(settings: Settings) -> bool:
    """Whether the run chooses or trains something that its folder should store."""
    return not settings.fixed or settings.steps > 0


def described(job: Job, settings: Settings) -> dict[str, Any]:
    """The values that an unfinished run stores and that must be equal to continue it."""
    may_differ = {each.path for each in Settings.declared if each.setting.resumable}
    return {"model": job.source, **{k: v for k, v in asdict(settings).items() if k not in may_differ}}


def read_samples(job: Job, prepared: Prepared, context: Context, *, measures: bool = True) -> SampleSets:
    """Samples to train, calibrate and measure on. The first of several processes makes them; the others read them.

    ``measures``: whether there are samples to measure on. If not, the model generates all training text itself.
    """
    s, task, folder = prepared.settings, prepared.task, context.folder
    given = Given() if job.samples is None else job.samples(prepared)
    own, source = s.data == data.SELF and given.training is None, s.eval_data or s.data
    count = wanted(s, s.windows) if own and measures else wanted(s)
    with context.stage("calibration data"), processes().main_process_first() if folder else nullcontext():
        kept = None if folder is None else folder.tensors(SAMPLES)
        if kept is None:
            both = own and measures and s.eval_data is None and given.evaluation is None
            say = partial(context.progress, "calibration data")
            made = given.training or task.samples(prepared.loaded, s, (1 + both) * count, say)
            kept = made[:count].saved("training") | (made[count:].saved("evaluation") if both else {})
            if folder is not None:
                folder.save(SAMPLES, kept)
        elif given.training is not None and folder is not None:
            check_samples(kept, given.training[:count].saved("training"), folder.path)
        names = list(task.example(prepared.loaded.model).inputs)
        training, evaluation = (Samples.restored(kept, names, what) for what in ("training", "evaluation"))
        assert training is not None
        if not measures:
            evaluation = training
        elif given.evaluation is not None:
            evaluation = given.evaluation
        elif evaluation is not None:
            evaluation = evaluation.shortened(s.eval_windows, s.eval_length)
            source = data.SELF
        else:
            evaluation = task.evaluation(prepared.loaded, s)
    program = prepared.analysis.program
    training = fitting(task, program, training, "data")
    evaluation = fitting(task, program, evaluation, "eval_data")
    said = source if source == IN_MEMORY else task.named(prepared.loaded.model, source)
    training, held_out = apart(training, s)
    return SampleSets(training, training[: s.windows], evaluation, said, task.sequences, held_out)


def apart(samples: Samples, settings: Settings) -> tuple[Samples, Samples | None]:
    """Split samples into training samples and held-out ones, which are the last; a single sample is not held out."""
    used = len(samples) * SHARE // (SHARE + 1)
    count = min(watched(settings, used), len(samples) - 1)
    return (samples[:-count], samples[-count:]) if count else (samples, None)


def compared(prepared: Prepared, sets: SampleSets, context: Context) -> SampleSets:
    """The sets with the dense model's outputs as targets, if the task's loss compares outputs."""
    if not prepared.task.compares or prepared.plan is not None:
        return sets
    with context.stage("dense outputs"):
        return replace(sets, calibration=with_outputs(prepared, sets.calibration))


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


def reconstructed(prepared: Prepared, chosen: Chosen, sets: SampleSets, context: Context) -> Chosen:
    """The choice with every consumer fitted to the dense layer's outputs, if the settings or the method ask for it."""
    if not reconstructs(prepared.settings, prepared.method) or not holds():
        return chosen

    def fit() -> Weights:
        analysis, sites = prepared.analysis, sites_of(prepared, chosen)
        kept = kept_units(analysis, chosen.cut, list({site.family: None for site in sites}))
        say = partial(context.progress, "reconstruct")
        return reconstruct_consumers(analysis, sites, kept, chosen.changes, sets.calibration, say, prepared.calibrator)

    with context.stage("reconstruct"):
        found = kept_fit(prepared, context.folder, fit)
    return chosen.with_weights(found)


def sites_of(prepared: Prepared, chosen: Chosen) -> list[MaskSite]:
    """The mask sites of the families that are cut."""
    return [site for site in prepared.mask_sites if site.family in chosen.plan.families]


def distilled(prepared: Prepared, chosen: Chosen, sets: SampleSets, context: Context) -> Chosen:
    """The choice with every block trained to give the dense block's outputs, if the settings ask for it."""
    s = prepared.settings
    if not s.distil_epochs or not holds():
        return chosen
    blocks_go = removed_blocks(prepared.analysis, chosen.cut)
    sites = prepared.mask_sites if blocks_go else sites_of(prepared, chosen)  # all that stays makes up for blocks
    with context.stage("distil"):
        found = distil_blocks(
            prepared.analysis,
            chosen.cut,
            consumers(sites),
            chosen.changes,
            sets.calibration,
            Schedule(s.distil_epochs, s.distil_lr, s.seed),
            partial(context.progress, "distil"),
            prepared.calibrator,
            context.folder,
        )
    chosen = replace(chosen, notes=(*chosen.notes, found.note))
    return chosen.with_weights(widened(changed(prepared, chosen), chosen.cut, found.weights))


# ---- cutting, training, writing ----


def recovered(compiled: Compiled, sets: SampleSets, context: Context) -> tuple[Compiled, list[Difference]]:
    """Train the small model with the remaining steps and adopt its weights. Also returns the witness's difference."""
    if context.folder is None or context.accelerator is None:
        return compiled, []
    prepared, chosen = compiled.prepared, compiled.chosen
    s = prepared.recovery
    learner = Learner(context.accelerator, prepared, sets.training, s, context.folder, context.progress)
    with context.stage("recover"):
        weights = compiled.exact.state_dict() if learner.keeps else {}
        small = small_model(compiled, weights, shared=learner.rank > 0)
        steps, used = prepared.settings.steps - chosen.steps, chosen.steps * s.training.batch
        held_out = None if sets.held_out is None else sets.held_out[: s.training.batch]
        found = learner.recover(small, steps, sets.proof, used, held_out)
    if found is None:
        return compiled, []
    program = prepared.analysis.program
    old = renumbering(compiled.analysis, chosen.cut).old(found.weights, program.state_dict())
    owned = {program.aliases.get(name, name): weight for name, weight in old.items()}
    named = {name: weight for name, weight in owned.items() if name in compiled.analysis.weights}
    chosen = chosen.with_weights(widened(compiled.analysis, chosen.cut, Weights(named)))
    row: Row = {"rank": learner.rank, "lr": s.training.lr}
    if found.watch is not None:
        row = {**row, **found.watch.row(prepared.settings.data, s.training.save_every)}
        chosen = replace(chosen, notes=(*chosen.notes, found.watch.note()))
    held = compiled.analysis.with_weights(chosen.changes)  # the rest is as stored
    difference = check_witness(held, chosen.cut, found.witness, sets.proof, prepared.executor)
    return replace(cut_to(prepared, chosen, context), written=compiled.written, recovery=row), [difference]


def written_folder(
    job: Job, compiled: Compiled, sets: SampleSets, witnessed: list[Difference], context: Context
) -> Report:
    """Write, prove and publish the folder. The quality in its report is measured afterwards."""
    prepared, chosen = compiled.prepared, compiled.chosen
    targets = written(prepared.target, prepared.settings)
    with publish(job.out, overwrite=prepared.settings.overwrite) as folder:
        if context.folder is not None and context.accelerator is not None:
            context.folder.finish(folder)
        chosen.plan.save(folder / "plan.json")
        if chosen.changes and not chosen.trained:
            write_weights(folder / COMPENSATION, Weights(chosen.changes))
        notes = [*chosen.notes, describe_processes(context.accelerator) if context.accelerator else ""]
        notes += [note(prepared.settings), one_length(prepared), fixed_sizes(prepared)]
        notes += [each.note for each in prepared.conversions]
        notes.append(left_whole(prepared.analysis, prepared.legal, prepared.settings))
        for target in targets:
            with context.stage(f"write {target.name}"):
                notes += target.emit(compiled, sets, folder, context.log)
        with context.stage("prove"):
            proven = prove_folder(compiled, targets, folder, sets.calibration, whole=prepared.settings.strict)
        proven = replace(proven, differences=(*witnessed, *proven.differences))
        check_proof(proven.differences, REMEDY)
        require_unchanged(job, prepared)
        write_recipe(folder, job.source, prepared.settings, job.start)
        copy_notices(prepared.loaded.path, folder)
        report = describe(compiled, proven, sets, [*notes, *proven.left_out, proven.note], folder, context)
        report.write(folder)
        write_card(report, compiled, folder)
    return report
