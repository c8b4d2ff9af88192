"""method: MaskPrune. It learns masks and the layers' common widths together; reconstruction follows."""

from __future__ import annotations

from mptk.errors import MptkError
from mptk.ir.families import Analysis
from mptk.methods.maskprune.learner import Learner
from mptk.run.chain import Chosen, Method, Prepared
from mptk.run.settings import Settings
from mptk.run.values import Context, SampleSets
from passes.transforms.insert_masks import disturbed


class MaskPrune(Method):
    """Minimax optimisation of masks, widths and duals with LoRA and distillation (arXiv 2502.14008)."""

    name = "maskprune"
    summary = "learn masks and common widths together"
    learns = True
    reconstructs = True
    splits = None

    def check(self, settings: Settings) -> None:
        if not settings.steps:
            raise MptkError("maskprune learns in steps; give --steps, 100 or more, or a one-shot --method")
        if settings.learning.precision == "fp16":
            raise MptkError("fp16 scales gradients, and masks are learned from these; use --precision bf16 or no")

    def refusal(self, analysis: Analysis, family: str) -> str | None:
        return disturbed(analysis, family)

    def choose(self, prepared: Prepared, sets: SampleSets, context: Context) -> Chosen:
        assert context.folder is not None
        assert context.accelerator is not None
        learning = prepared.settings.learning.of_masks()
        with context.stage("learn masks"):
            learner = Learner(
                context.accelerator,
                prepared.dense,
                prepared.task,
                sets.training,
                learning,
                context.folder,
                context.progress,
            )
            return learner.learn(prepared, sets)
