"""method: MaskPrune. It learns masks and the layers' common widths together; reconstruction follows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from mptk.config import FREE, Settings
from mptk.cost.estimate import Pass
from mptk.errors import InputError
from mptk.ir import Analysis
from mptk.methods.division.layers import choose_division
from mptk.methods.division.trial import plan_widths
from mptk.methods.maskprune.learner import SCORED, Learner
from mptk.methods.one_shot import keep_scores
from mptk.protocols import Chosen, Context, Kept, Method, Prepared, SampleSets
from passes.targets.legalize import Candidate
from passes.transforms.insert_masks import find_disturbance

DIVISION = "division"
"""Name of the layers' widths in the folder of an unfinished run."""


class MaskPrune(Method):
    """Minimax optimisation of masks, widths and duals with LoRA and distillation (arXiv 2502.14008)."""

    name = "maskprune"
    summary = "learn masks and common widths together"
    learns = True
    reconstructs = True
    divides = True
    splits = None

    def check(self, settings: Settings) -> None:
        if not settings.steps:
            raise InputError(
                "maskprune learns in steps; give --steps, 100 or more, or a one-shot --method", name="steps"
            )
        if settings.learning.precision == "fp16":
            raise InputError(
                "masks are learned from gradients, which fp16 scales; use --precision bf16 or no", name="precision"
            )

    def explain_refusal(self, analysis: Analysis, family: str) -> str | None:
        return find_disturbance(analysis, family)

    def work(self, settings: Settings) -> Mapping[str, Pass]:
        # Activations take one pass; the gradients in the masks, also each token's own, about four.
        s = settings
        return {"score": Pass(5 * min(s.windows, SCORED) * s.length, s.length, reads=2)}

    def choose(self, prepared: Prepared, sets: SampleSets, context: Context) -> Chosen:
        assert context.folder is not None
        assert context.accelerator is not None
        learning, found = prepared.mask_learning, dict[str, float]()
        if prepared.settings.layers == FREE:
            prepared, found = divide_over_layers(prepared, sets, context)
        with context.stage("learn masks"):
            learner = Learner(
                context.accelerator,
                prepared,
                sets.training,
                learning,
                context.folder,
                context.progress,
                limit=context.limit,
            )
            chosen = learner.learn(sets)
        return replace(chosen, losses=found)


def divide_over_layers(prepared: Prepared, sets: SampleSets, context: Context) -> tuple[Prepared, dict[str, float]]:
    """``prepared`` with a width for each layer, by Wanda's scores, and the losses with these and with equal layers."""

    def find() -> Kept:
        # The division is chosen one-shot, since learned widths are the same in all layers. It starts from the widths
        # that cut all families most evenly.
        scores = keep_scores(prepared, "wanda", sets, context)
        equal = plan_widths(prepared, scores, min(prepared.candidates, key=lambda c: c.unevenness).widths)
        plan, losses = choose_division(prepared, scores, equal, sets, context)
        sizes = {name: plan.widths.get(name, prepared.analysis.variable(name).size) for name in prepared.families}
        both = (*sizes.items(), *losses.items())
        return Kept({name: torch.tensor(value, dtype=torch.float64) for name, value in both})

    # Widths and losses are in one file, by name: the names of families are widths, the others losses.
    found = context.keep(DIVISION, find).tensors
    widths = {name: int(found[name]) for name in prepared.families}
    losses = {name: float(loss) for name, loss in found.items() if name not in widths}
    return replace(prepared, candidates=(Candidate(widths, prepared.cost.compute_sparsity(widths), 0.0),)), losses
