"""fit: change the weights that stay: by reconstruction, by block-by-block training, by recovery of the cut model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from mptk.chain.kept import kept_fit
from mptk.compile.changes import widened
from mptk.compile.cut import changed, cut_to, small_model
from mptk.distributed.processes import holds
from mptk.io.slices import Places
from mptk.ir.resolved_plan import removed_blocks, renumbering
from mptk.ir.samples import Samples
from mptk.ir.weights import Weights
from mptk.methods.distil import NO_BLOCK, Schedule, distil_blocks
from mptk.methods.maskprune.learner import Learner, Recovered
from mptk.methods.maskprune.together import Together
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
    chosen = replace(chosen, notes=(*chosen.notes, NO_BLOCK if found is None else found.note))
    if found is None:
        return chosen
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
        found = learner.recover(small, steps, sets.proof, used, guards(sets, s.training.batch))
    return (compiled, []) if found is None else adopted(compiled, found, sets, context)


def recovered_together(
    compiled: Sequence[Compiled], sets: SampleSets, context: Context
) -> list[tuple[Compiled, list[Difference]]]:
    """``recovered`` for the sizes of a ladder that share their weights, the largest first."""
    if context.folder is None or context.accelerator is None:
        return [(each, []) for each in compiled]
    prepared = compiled[0].prepared
    s = prepared.recovery
    learner = Learner(context.accelerator, prepared, sets.training, s, context.folder, context.progress)
    with context.stage("recover"):
        sizes = ((small_model(each, each.exact.state_dict()), places(each, compiled[0])) for each in compiled)
        held_out = guards(sets, s.training.batch)
        found = learner.recover_all(Together(sizes), prepared.settings.steps, sets.proof, held_out)
    return [adopted(each, one, sets, context) for each, one in zip(compiled, found, strict=True)]


def places(compiled: Compiled, largest: Compiled) -> Places:
    """Where the weights of a size are in the largest size's, which has the same units and more."""
    analysis, found = compiled.analysis, dict[str, list[Tensor]]()
    for name, owner in {**{name: name for name in analysis.weights}, **analysis.program.aliases}.items():
        terms, one, other = analysis.weights.get(owner, ()), largest.chosen.cut, compiled.chosen.cut
        if one.elsewhere(terms) is None and other.elsewhere(terms) is None:
            pairs = [(one.positions(term), other.positions(term)) for term in terms]
            found[name] = [torch.from_numpy(np.searchsorted(there, here)) for there, here in pairs]
    return found


def guards(sets: SampleSets, batch: int) -> Samples | None:
    """The held-out samples that training is watched on."""
    return None if sets.held_out is None else sets.held_out[:batch]


def adopted(
    compiled: Compiled, found: Recovered, sets: SampleSets, context: Context
) -> tuple[Compiled, list[Difference]]:
    """The model with the weights that training found, and the witness's difference."""
    prepared, chosen = compiled.prepared, compiled.chosen
    s, program = prepared.recovery, prepared.analysis.program
    old = renumbering(compiled.analysis, chosen.cut).old(found.weights, program.state_dict())
    owned = {program.aliases.get(name, name): weight for name, weight in old.items()}
    named = {name: weight for name, weight in owned.items() if name in compiled.analysis.weights}
    chosen = chosen.with_weights(widened(compiled.analysis, chosen.cut, Weights(named)))
    row: Row = {"rank": s.rank or 0, "lr": s.training.lr}
    if found.watch is not None:
        row = {**row, **found.watch.row(prepared.settings.data, s.training.save_every)}
        row = {**row, "metric": "training loss, added up over the sizes"} if prepared.settings.shared else row
        chosen = replace(chosen, notes=(*chosen.notes, found.watch.note()))
    held = compiled.analysis.with_weights(chosen.changes)  # the rest is as stored
    difference = check_witness(held, chosen.cut, found.witness, sets.proof, prepared.executor)
    return replace(cut_to(prepared, chosen, context), written=compiled.written, recovery=row), [difference]
