"""one_shot: score every unit once by a criterion and keep the best.

The budget is divided among families by the loss on calibration text, and over the layers if these are free. No weight
is trained. A criterion that compensates (FLAP) corrects the consumers' biases.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from mptk.config.settings import FREE
from mptk.distributed.processes import leads
from mptk.ir.families import Analysis
from mptk.ir.plan import Plan
from mptk.ir.resolved_plan import Cut, resolve_plan
from mptk.methods import criteria
from mptk.methods.criteria import influence
from mptk.methods.criteria.base import Criterion, Scores
from mptk.methods.criteria.observe import Observation, Site
from mptk.methods.division.ends import ends_note
from mptk.methods.division.layers import divided
from mptk.methods.division.trial import losses, plan_of
from mptk.protocols.chain import Chosen, Method, Prepared
from mptk.protocols.run_folder import RunFolder
from mptk.protocols.values import Context, SampleSets
from passes.targets.legalize import describe
from passes.transforms.masked_reference import mask

TOKENS = 1024
"""Calibration tokens on which the ways to divide the budget are compared."""
SCORES = "scores"
"""Name of the scores in the folder of an unfinished run."""


@dataclass(frozen=True)
class OneShotMethod(Method):
    """The method of one criterion."""

    criterion: Criterion
    divides = True

    @property
    def name(self) -> str:  # type: ignore[override]
        return self.criterion.name

    @property
    def summary(self) -> str:  # type: ignore[override]
        return self.criterion.summary

    def refusal(self, analysis: Analysis, family: str) -> str | None:
        blocks = analysis.family(family).stack is not None
        return None if blocks or self.criterion.judges != "blocks" else influence.refusal(family)

    def choose(self, prepared: Prepared, sets: SampleSets, context: Context) -> Chosen:
        analysis = prepared.analysis
        kept = None if self.criterion.compensates else context.folder  # to compensate takes the observations, too
        scores, observations = scored(prepared, self.name, sets, context, kept)
        plans = [plan_of(prepared, scores, candidate.widths) for candidate in prepared.candidates]
        with context.stage("choose widths"):
            plan, cut, found = _best(prepared, plans, sets, context)
        notes: tuple[str, ...] = ()
        if prepared.settings.layers == FREE:
            plan, found = divided(prepared, scores, plan, sets, context)
            cut = resolve_plan(analysis, plan)
        else:
            notes = (ends_note(prepared, scores, plan, sets),)
        chosen = Chosen(plan, cut, losses=found, notes=notes)
        if not self.criterion.compensates:
            return chosen
        biases = criteria.compensate(analysis, cut, observations)
        return replace(chosen, changes=biases.state, notes=(*notes, biases.statement))


def scored(
    prepared: Prepared, criterion: str, sets: SampleSets, context: Context, folder: RunFolder | None
) -> tuple[Scores, Mapping[Site, Observation]]:
    """The scores of the families that are cut, and what they were made of.

    ``folder`` keeps the scores; if they were kept before, there is nothing that they were made of.
    """
    before = None if folder is None else folder.earlier(SCORES)
    if before is not None:
        return before, {}
    with context.stage(stage := f"score ({criterion})"):
        evidence = criteria.gather(
            prepared.analysis,
            criterion,
            sets.calibration,
            families=prepared.families,
            seed=prepared.settings.seed,
            objective=prepared.task,
            progress=partial(context.progress, stage),
            executor=prepared.calibrator,
            removals={
                f.name: f.size - min(c.widths.get(f.name, f.size) for c in prepared.candidates)
                for f in prepared.analysis.depths
            },
        )
        scores = criteria.score_evidence(evidence, criterion, prepared.families)
    if folder is not None and leads():
        folder.save(SCORES, scores)
    return scores, dict(evidence.observations)


def _best(
    prepared: Prepared, plans: Sequence[Plan], sets: SampleSets, context: Context
) -> tuple[Plan, Cut, dict[str, float]]:
    """The plan with the lowest loss of its masked program on some calibration text, its cut, and widths → loss."""
    samples = sets.calibration.batches(TOKENS)[0]
    cuts = [resolve_plan(prepared.analysis, plan) for plan in plans]
    if len(plans) == 1:
        return plans[0], cuts[0], {}
    masked = [partial(mask, prepared.analysis, cut) for cut in cuts]
    found = losses(prepared, masked, samples, partial(context.progress, "choose widths"))
    _, plan, cut = min(zip(found, plans, cuts, strict=True), key=lambda tried: tried[0])
    return plan, cut, {describe(plan.widths): round(loss, 4) for plan, loss in zip(plans, found, strict=True)}
