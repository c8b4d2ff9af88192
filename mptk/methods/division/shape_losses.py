"""shape_losses: what is known of each legal way to divide the budget without training any.

Units are scored once, and the second moments of the consumers' inputs are gathered once. Then each candidate is a
choice among the scores, a cut, and a closed-form fit. Its losses are measured on samples that nothing was fitted on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from torch import Tensor

from mptk.compile.dense_outputs import with_outputs
from mptk.errors import MptkError
from mptk.files import write_json
from mptk.ir.passes import Log
from mptk.ir.resolved_plan import resolve_plan
from mptk.ir.samples import Samples
from mptk.ir.weights import Lazy, Weights
from mptk.methods.criteria import all_criteria
from mptk.methods.criteria.base import Scores
from mptk.methods.division.trial import losses, plan_of
from mptk.methods.one_shot import scored
from mptk.methods.reconstruct import Products, gather_products, kept_units
from mptk.protocols.chain import Chosen, Prepared, reconstructs
from mptk.protocols.run_folder import RunFolder
from mptk.protocols.shapes import Shape, bounded
from mptk.protocols.values import Context, SampleSets
from passes.pipelines import cut_program
from passes.targets.legalize import Candidate, describe

SCORER = "wanda"
"""The criterion of a method that has none of its own."""


@dataclass(frozen=True)
class Search:
    """A search among ``prepared.candidates``. Results are kept in ``folder``, a file a shape."""

    prepared: Prepared
    sets: SampleSets
    context: Context
    folder: RunFolder

    @cached_property
    def samples(self) -> Samples:
        """What losses are measured on."""
        held_out = self.sets.held_out
        assert held_out is not None
        return with_outputs(self.prepared, held_out) if self.prepared.task.compares else held_out

    @property
    def criterion(self) -> str:
        """What units are chosen by."""
        method = self.prepared.settings.method
        return method if method in all_criteria() else SCORER

    @cached_property
    def scores(self) -> Scores:
        """Of all units."""
        return scored(self.prepared, self.criterion, self.sets, self.context, self.folder)[0]

    @cached_property
    def products(self) -> Products | None:
        """What consumers are fitted with; None if they are not."""
        prepared = self.prepared
        if not reconstructs(prepared.settings, prepared.method):
            return None
        with self.context.stage("moments"):
            say = partial(self.context.progress, "moments")
            return gather_products(
                prepared.analysis, prepared.mask_sites, self.sets.calibration, say, prepared.calibrator
            )

    def chosen(self, widths: Mapping[str, int]) -> Chosen:
        """The best units for ``widths``, and the consumers fitted to them, each when it is asked for."""
        plan = plan_of(self.prepared, self.scores, widths)
        cut = resolve_plan(self.prepared.analysis, plan)
        if self.products is None:
            return Chosen(plan, cut)
        fitted = {site.family for site in self.products.sites} & plan.families.keys()
        changes = self.products.fitted(kept_units(self.prepared.analysis, cut, sorted(fitted)))
        return Chosen(plan, cut, changes, tuple(changes))

    def before_training(self) -> list[Shape]:
        """Each candidate, measured without training."""
        found, candidates = [], self.prepared.candidates
        missing = [i for i in range(len(candidates)) if self.kept(i) is None]
        if missing:
            _ = self.scores, self.products  # stages of their own
        with self.context.stage("shapes"):
            for i, candidate in enumerate(candidates):
                self.context.progress("shapes", i, len(candidates), describe(candidate.widths))
                shape = self.kept(i)
                if shape is None:
                    shape = self.measured(candidate)
                    self.keep(i, shape)
                found.append(shape)
            self.context.progress("shapes", len(found), len(found))
        return found

    def measured(self, candidate: Candidate) -> Shape:
        """A candidate's losses before training."""
        analysis, chosen = self.prepared.analysis, self.chosen(candidate.widths)
        fits = Fits(analysis.program.state, chosen.changes)
        program = cut_program(analysis.with_weights(fits.weights()), chosen.cut, Log(), torch.float32).exact
        (masked,) = losses(self.prepared, [lambda: program], self.samples)
        fitted = None
        if self.products is not None:
            fits.used = True
            (fitted,) = map(bounded, losses(self.prepared, [lambda: program], self.samples))
        cost = self.prepared.cost(candidate.widths)
        found = candidate.widths, candidate.sparsity, cost.parameters, cost.latency_ms
        return Shape(*found, bounded(masked), fitted)

    def dense(self) -> Shape:
        """The dense model, with which shapes are compared."""
        program, cost = self.prepared.reference, self.prepared.cost.dense
        (loss,) = losses(self.prepared, [lambda: program], self.samples)
        widths = {family: self.prepared.analysis.family(family).size for family in self.prepared.families}
        return Shape(widths, 0.0, cost.parameters, cost.latency_ms, bounded(loss))

    # ---- one file a shape ----

    def kept(self, number: int) -> Shape | None:
        """The shape of that number, if it was measured before and is of the same widths."""
        path = self.folder.path / f"{file_of(number)}.json"
        if not path.is_file():
            return None
        try:
            shape = Shape.from_json(self.folder.read(file_of(number)))
        except ValueError as error:
            raise MptkError(f"{path} is damaged: {error}; remove it, and start again with --resume") from error
        return shape if dict(shape.widths) == dict(self.prepared.candidates[number].widths) else None

    def keep(self, number: int, shape: Shape) -> None:
        """Write what is known of the shape of that number."""
        write_json(self.folder.path / f"{file_of(number)}.json", shape.to_json())


def file_of(number: int) -> str:
    """What the files of a shape begin with."""
    return f"shape-{number:05d}"


@dataclass
class Fits:
    """Weights that are the dense ones or, if they are ``used``, the fitted ones: to cut a program takes time."""

    dense: Weights
    fitted: Mapping[str, Tensor]
    used: bool = False

    def weights(self) -> Weights:
        """Those that were fitted, by name."""
        return Weights({name: Lazy(self.dense.like(name).to("meta"), partial(self._one, name)) for name in self.fitted})

    def _one(self, name: str) -> Tensor:
        return (self.fitted if self.used else self.dense)[name]
