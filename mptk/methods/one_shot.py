"""one_shot: score every unit once by a criterion and keep the best.

The loss on calibration text decides how the budget is divided among families and, with free layers, over layers. No
weight is trained. A criterion that compensates (FLAP) corrects the consumers' biases.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch

from mptk.config import FREE, Settings
from mptk.cost.estimate import Pass
from mptk.ir import Analysis, resolve_plan
from mptk.methods import criteria
from mptk.methods.criteria import AnyCriterion, Calibration, Scores, find_criterion
from mptk.methods.division.layers import choose_division, describe_ends
from mptk.methods.division.trial import find_best_plan, plan_widths
from mptk.protocols import Chosen, Context, Kept, Method, Prepared, SampleSets
from passes.targets.legalize import describe_widths

COMPARED_TOKENS = 1024
"""Calibration tokens for comparing divisions of the budget."""
CHOOSE_WIDTHS = "choose widths"
"""Name of the stage that compares the divisions."""
SCORES = "scores"
"""Name of the scores in the folder of an unfinished run."""


@dataclass(frozen=True)
class OneShotMethod(Method):
    """The method of one criterion."""

    criterion: AnyCriterion
    divides = True

    @property
    def name(self) -> str:  # type: ignore[override]
        return self.criterion.name

    @property
    def summary(self) -> str:  # type: ignore[override]
        return self.criterion.summary

    @property
    def reconstructs(self) -> bool:  # type: ignore[override]
        # Without blocks, the layer before a gap can make up for most of it (docs/analysis.md has what that brings).
        return "blocks" in self.criterion.judges

    def explain_refusal(self, analysis: Analysis, family: str) -> str | None:
        return criteria.find_score_refusal(self.criterion, analysis.variable(family))

    def work(self, settings: Settings) -> Mapping[str, Pass]:
        s, made, tried = settings, self.criterion, 1 if settings.divider else self.splits or 1
        return {
            f"score ({made.name})": Pass(
                made.passes * s.windows * s.length,
                s.length,
                reads=2 if made.passes > 1 else 1,  # a backward pass reads the weights again
                gradients=made.gradients,
            ),
            CHOOSE_WIDTHS: Pass(tried * COMPARED_TOKENS, s.length),
        }

    def choose(self, prepared: Prepared, sets: SampleSets, context: Context) -> Chosen:
        analysis, compensate = prepared.analysis, self.criterion.compensate
        evidence: object = None
        if compensate is None:
            scores = keep_scores(prepared, self.name, sets, context)
        else:  # it needs the evidence, too, which is not kept: a resumed run measures again
            scores, evidence = score_families(prepared, self.name, sets, context)

        # Divide the budget among families: the loss on a little text decides between the candidates.
        every = [plan_widths(prepared, scores, candidate.widths) for candidate in prepared.candidates]
        plan, found, note = every[0], dict[str, float](), ""
        with context.stage(stage := CHOOSE_WIDTHS):
            if len(every) > 1:
                plans = {describe_widths(each.widths): each for each in every}
                samples = sets.calibration.make_batches(COMPARED_TOKENS)[0]
                plan, found = find_best_plan(prepared, plans, samples, partial(context.progress, stage))
        # Divide it over layers, from the best common widths on.
        if prepared.settings.layers == FREE:
            plan, found = choose_division(prepared, scores, plan, sets, context)
        else:
            note = describe_ends(prepared, scores, plan, sets)

        cut = resolve_plan(analysis, plan)
        chosen = Chosen(plan, cut, losses=found, notes=(note,))
        # Without evidence only blocks are cut, which the criterion does not judge.
        if compensate is None or evidence is None:
            return chosen
        biases = compensate(analysis, cut, evidence)
        return replace(chosen, changes=biases.state, notes=(note, biases.statement))


def keep_scores(prepared: Prepared, criterion: str, sets: SampleSets, context: Context) -> Scores:
    """The scores of the cut families, which an unfinished run keeps."""
    kept = context.keep(SCORES, lambda: Kept(score_families(prepared, criterion, sets, context)[0]))
    return dict(kept.tensors)


def score_families(prepared: Prepared, criterion: str, sets: SampleSets, context: Context) -> tuple[Scores, object]:
    """The scores of the cut families, and the evidence behind them."""
    analysis = prepared.analysis
    with context.stage(stage := f"score ({criterion})"):
        # ``greedy`` removes blocks one by one: it needs to go no further than the smallest candidate.
        removals = {
            f.name: f.size - min(c.widths.get(f.name, f.size) for c in prepared.candidates) for f in analysis.depths
        }
        given = Calibration(
            analysis,
            [analysis.variable(name) for name in prepared.families],
            sets.calibration,
            prepared.settings.seed,
            prepared.task,
            removals,
            prepared.calibrator,
            partial(context.progress, stage),
        )
        scores, evidence = criteria.measure_and_score(find_criterion(criterion), given)
    # Units that a larger cut removed score −∞, so that this cut takes none of them back.
    stays = prepared.stays
    scores = {f: values.masked_fill(~stays[f], -torch.inf) if f in stays else values for f, values in scores.items()}
    return scores, evidence
