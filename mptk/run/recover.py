"""recover: change the weights that stay: by reconstruction, block-by-block training, and recovery of the cut model."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from mptk.compile.cut import apply_choice, build_small_model, cut_to, widen_weights
from mptk.distributed.processes import holds
from mptk.ir import Samples, Weights, build_renumbering, list_removed_blocks
from mptk.methods.distil import NO_BLOCK, Schedule, distil_blocks
from mptk.methods.maskprune.learner import Learner, Recovered
from mptk.methods.reconstruct import list_consumers, reconstruct_consumers
from mptk.proof.proof import check_witness
from mptk.protocols import Chosen, Compiled, Kept, Prepared, Row, SampleSets, should_reconstruct
from mptk.run.replan import count_recovery_steps, limit_recovery, take_steps
from mptk.run.run import Run
from passes.verify import Difference

NO_TIME = "no time was left for recovery, which brings most of the quality back; give more --minutes, or `mptk recover`"


def reconstruct(prepared: Prepared, chosen: Chosen, sets: SampleSets, run: Run) -> Chosen:
    """The choice with every consumer fitted to the dense layer's outputs, if the settings or the method ask for it."""
    # With shards only the first process has whole weights. It fits them, and sends them out in training.
    if not should_reconstruct(prepared.settings, prepared.method) or not holds():
        return chosen
    with run.stage("reconstruct"):
        fit = partial(
            reconstruct_consumers,
            prepared.analysis,
            prepared.find_plan_sites(chosen.plan),
            chosen.cut,
            chosen.changes,
            sets.calibration,
            partial(run.progress, "reconstruct"),
            prepared.calibrator,
        )
        kept = run.keep("fitted", lambda: Kept(fit()), bound=prepared.executor.borders)
    return chosen.with_weights(kept.tensors)


def distil(prepared: Prepared, chosen: Chosen, sets: SampleSets, run: Run) -> Chosen:
    """The choice with every block trained to give the dense block's outputs, if the settings ask for it."""
    s = prepared.settings
    if not s.distil_epochs or not holds():
        return chosen
    # Where channels go, their consumers make up for them. Where blocks go, everything that stays does.
    blocks_go = list_removed_blocks(prepared.analysis, chosen.cut)
    sites = prepared.mask_sites if blocks_go else prepared.find_plan_sites(chosen.plan)
    with run.stage("distil"):
        found = distil_blocks(
            prepared.analysis,
            chosen.cut,
            list_consumers(sites),
            chosen.changes,
            sets.calibration,
            Schedule(s.distil_epochs, s.distil_lr, s.seed),
            partial(run.progress, "distil"),
            prepared.calibrator,
            run.folder,
        )
    chosen = replace(chosen, notes=(*chosen.notes, NO_BLOCK if found is None else found.note))
    if found is None:
        return chosen
    return chosen.with_weights(widen_weights(apply_choice(prepared, chosen), chosen.cut, found.weights))


def recover_quality(compiled: Compiled, sets: SampleSets, run: Run) -> tuple[Compiled, list[Difference]]:
    """Train the small model with the remaining steps and adopt its weights. Also returns the witness's difference."""
    if run.folder is None or run.accelerator is None:
        return compiled, []
    prepared, chosen = compiled.prepared, compiled.chosen
    s, limit = prepared.recovery, limit_recovery(prepared.settings, chosen, run)
    # The steps that learned masks count, and recovery goes on with the samples after theirs.
    steps, used = count_recovery_steps(prepared, chosen, limit), chosen.steps * s.training.batch
    if limit is not None and not steps and run.folder.read_latest("recovery") is None:
        return take_steps(replace(compiled, chosen=replace(chosen, notes=(*chosen.notes, NO_TIME))), 0), []
    steps = steps if limit is None else max(1, steps)  # a resumed run has a checkpoint, with its own number
    learner = Learner(run.accelerator, prepared, sets.training, s, run.folder, run.progress, limit=limit)
    with run.stage("recover"):
        # Before norms are rounded to the stored type, or training would begin with that error.
        weights = compiled.exact.state_dict() if learner.keeps else {}
        small = build_small_model(compiled, weights, shared=learner.rank > 0)
        found = learner.recover(small, steps, sets.proof, used, take_guards(sets, s.training.batch))
    if found is None:
        return compiled, []
    return adopt_weights(compiled if limit is None else take_steps(compiled, found.steps), found, sets, run)


def take_guards(sets: SampleSets, batch: int) -> Samples | None:
    """The held-out samples that training is watched on."""
    return None if sets.held_out is None else sets.held_out[:batch]


def adopt_weights(
    compiled: Compiled, found: Recovered, sets: SampleSets, run: Run
) -> tuple[Compiled, list[Difference]]:
    """The model with the weights that training found, and the witness's difference."""
    prepared, chosen = compiled.prepared, compiled.chosen
    s, program = prepared.recovery, prepared.analysis.program
    # From the small model's names back to the dense model's, a tied weight under its owner's. Weights that no axis of
    # the analysis describes are left as they are.
    old = build_renumbering(compiled.analysis, chosen.cut).restore_names(found.weights, program.state_dict())
    owned = {program.aliases.get(name, name): weight for name, weight in old.items()}
    named = {name: weight for name, weight in owned.items() if name in compiled.analysis.weights}
    chosen = chosen.with_weights(widen_weights(compiled.analysis, chosen.cut, Weights(named)))
    # What the report says of it.
    row: Row = {"rank": s.rank or 0, "lr": s.training.lr}
    if found.watch is not None:
        row = {**row, **found.watch.to_row(prepared.settings.data, s.training.save_every)}
        chosen = replace(chosen, notes=(*chosen.notes, found.watch.note()))
    # The model is cut again, with these weights. The form in which the target holds it (`written`) stays.
    held = compiled.analysis.with_weights(chosen.changes)  # the rest is as stored
    difference = check_witness(held, chosen.cut, found.witness, sets.proof, prepared.executor)
    return replace(cut_to(prepared, chosen, run), written=compiled.written, recovery=row), [difference]
