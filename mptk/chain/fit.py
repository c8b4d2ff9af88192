"""fit: change the weights that stay: by reconstruction, by block-by-block training, by recovery of the cut model."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from mptk.chain.kept import kept_fit
from mptk.compile.changes import widened
from mptk.compile.cut import changed, cut_to, small_model
from mptk.distributed.processes import holds
from mptk.ir.resolved_plan import removed_blocks, renumbering
from mptk.ir.weights import Weights
from mptk.methods.distil import Schedule, distil_blocks
from mptk.methods.maskprune.learner import Learner
from mptk.methods.reconstruct import consumers, reconstruct_consumers
from mptk.proof.proof import check_witness
from mptk.protocols.chain import Chosen, Compiled, Prepared, reconstructs
from mptk.protocols.report import Row
from mptk.protocols.values import Context, SampleSets
from passes.verify import Difference


def reconstructed(prepared: Prepared, chosen: Chosen, sets: SampleSets, context: Context) -> Chosen:
    """The choice with every consumer fitted to the dense layer's outputs, if the settings or the method ask for it."""
    if not reconstructs(prepared.settings, prepared.method) or not holds():
        return chosen

    def fit() -> Weights:
        sites, say = prepared.sites_of(chosen.plan), partial(context.progress, "reconstruct")
        cut, samples = chosen.cut, sets.calibration
        return reconstruct_consumers(prepared.analysis, sites, cut, chosen.changes, samples, say, prepared.calibrator)

    with context.stage("reconstruct"):
        found = kept_fit(prepared, context.folder, fit)
    return chosen.with_weights(found)


def distilled(prepared: Prepared, chosen: Chosen, sets: SampleSets, context: Context) -> Chosen:
    """The choice with every block trained to give the dense block's outputs, if the settings ask for it."""
    s = prepared.settings
    if not s.distil_epochs or not holds():
        return chosen
    blocks_go = removed_blocks(prepared.analysis, chosen.cut)
    sites = prepared.mask_sites if blocks_go else prepared.sites_of(chosen.plan)  # all that stays makes up for blocks
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
