"""trials: cut a model to many widths after one scoring of its units and one gathering of second moments."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial

import torch
from accelerate import Accelerator
from torch import Tensor

from mptk.compile.cut import build_small_model, cut_to_form
from mptk.config import Learning
from mptk.ir import Lazy, Log, Program, Samples, Weights, resolve_plan
from mptk.methods.criteria import list_criteria
from mptk.methods.criteria.base import Scores
from mptk.methods.criteria.wanda import WANDA
from mptk.methods.division.trial import plan_widths
from mptk.methods.maskprune.learner import Learner, start_training
from mptk.methods.one_shot import keep_scores
from mptk.methods.reconstruct import Products, gather_products
from mptk.progress import Progress, show_nothing
from mptk.protocols import Chosen, Compiled, Context, Prepared, RunFolder, SampleSets, should_reconstruct
from passes.pipelines import cut_program


@dataclass(frozen=True)
class Trials:
    """The cut models of ``prepared.candidates``. ``folder`` keeps the scores."""

    prepared: Prepared
    sets: SampleSets
    context: Context
    folder: RunFolder

    @property
    def criterion(self) -> str:
        """The criterion that chooses units."""
        method = self.prepared.settings.method
        return method if method in list_criteria() else WANDA.name

    @cached_property
    def scores(self) -> Scores:
        """Scores of all units."""
        return keep_scores(self.prepared, self.criterion, self.sets, self.context)

    @property
    def fits(self) -> bool:
        """Whether consumers are fitted."""
        return should_reconstruct(self.prepared.settings, self.prepared.method)

    @cached_property
    def products(self) -> Products | None:
        """The sums that consumers are fitted with; None if they are not fitted."""
        p = self.prepared
        if not self.fits:
            return None
        with self.context.stage(stage := "moments"):
            say = partial(self.context.progress, stage)
            cuts = [resolve_plan(p.analysis, plan_widths(p, self.scores, each.widths)) for each in p.candidates]
            return gather_products(p.analysis, p.mask_sites, cuts, self.sets.calibration, say, p.calibrator)

    def choose_for(self, widths: Mapping[str, int]) -> Chosen:
        """The best units for ``widths``, and the consumers fitted to them on demand."""
        plan = plan_widths(self.prepared, self.scores, widths)
        cut = resolve_plan(self.prepared.analysis, plan)
        if self.products is None:
            return Chosen(plan, cut)
        changes = self.products.fit_layers(cut)
        return Chosen(plan, cut, changes, tuple(changes))

    def programs(self, widths: Mapping[str, int]) -> Iterator[Program]:
        """The model cut to ``widths``; then, if consumers are fitted, the same program with fitted consumers.

        It is one program, whose weights change when the second is asked for: to cut takes time.
        """
        analysis, chosen = self.prepared.analysis, self.choose_for(widths)
        dense = analysis.program.state
        now: Mapping[str, Tensor] = dense

        def weight(name: str) -> Tensor:
            return now[name]

        weights = Weights(
            {name: Lazy(dense.find_like(name).to("meta"), partial(weight, name)) for name in chosen.changes}
        )
        changed = replace(analysis, program=analysis.program.with_state(weights))
        program = cut_program(changed, chosen.cut, Log(), torch.float32).exact
        yield program
        if self.products is not None:
            now = chosen.changes
            yield program

    # ---- training ----

    @property
    def learning(self) -> Learning:
        """The settings for training cut models."""
        return replace(self.prepared.recovery, tracker="none")

    @cached_property
    def accelerator(self) -> Accelerator:
        """The process that trains."""
        return start_training(self.learning, self.folder)

    def cut(self, chosen: Chosen) -> Compiled:
        """The model cut to a choice, in the form of the target."""
        return cut_to_form(self.prepared, chosen, self.sets.calibration, Context(Log(), show_nothing))

    def recover_program(
        self,
        compiled: Compiled,
        steps: int,
        place: RunFolder,
        say: Progress,
        *,
        used: int = 0,
        held_out: Samples | None = None,
    ) -> Program:
        """The program of a cut model after ``steps`` steps of training.

        ``place`` keeps checkpoints: a run that ended there after fewer steps goes on. ``used``, ``held_out``: as in
        ``Learner.recover``.
        """
        small = build_small_model(compiled, compiled.program.state_dict())
        learner = Learner(self.accelerator, self.prepared, self.sets.training, self.learning, place, say)
        found = learner.recover(small, steps, self.sets.proof, used, held_out)
        assert found is not None
        aliases = compiled.program.aliases
        named = Weights({aliases.get(name, name): weight for name, weight in found.weights.items()})
        return compiled.program.with_state(named)


def report_part(
    progress: Progress,
    stage: str,
    done: int,
    total: int,
    cut: str,
    phase: str,
    step: int,
    steps: int,
    said: str = "",
    /,
) -> None:
    """Report a step of a phase of training as part of a stage that trains several models. ``cut``: the one's widths."""
    progress(stage, done, total, f"{cut}, step {step}/{steps}  {said}")
