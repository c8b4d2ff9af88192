"""search: rank the legal ways to divide the budget, by trials that cost more and more, before one of them is cut.

1. Units are scored once, and the second moments of the consumers' inputs are gathered once. Each candidate is a choice
   among the scores, a cut, and a closed-form fit; its losses are measured on samples that nothing was fitted on.
2. The best of these, unlike each other, are trained for a while, the better half goes on for twice as long, and so on:
   successive halving (Jamieson & Talwalkar 2016, arXiv 1502.07943). The loss before training does not predict the best
   division (``docs/shapes.md``), so this decides. A shape goes on from its weights of the rung before, with text that
   it has not seen and a learning rate that falls from its peak again. If a rung makes it worse on the held samples, the
   weights and the loss from before it stay.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Literal

import torch
from accelerate import Accelerator
from torch import Tensor

from mptk.compile.cut import compile_plan, small_model
from mptk.compile.dense_outputs import with_outputs
from mptk.config.settings import Learning, Settings
from mptk.cost.estimate import Pass, Sizes
from mptk.errors import MptkError
from mptk.files import write_json
from mptk.ir.passes import Log
from mptk.ir.program import Program
from mptk.ir.resolved_plan import resolve_plan
from mptk.ir.samples import Samples
from mptk.ir.weights import Lazy, Weights
from mptk.methods.criteria import all_criteria
from mptk.methods.criteria.base import Scores
from mptk.methods.criteria.wanda import WANDA
from mptk.methods.division.budget import WidthSearch
from mptk.methods.division.trial import losses, plan_of
from mptk.methods.maskprune.learner import Learner, memory, start_training
from mptk.methods.one_shot import scored
from mptk.methods.reconstruct import Products, gather_products, kept_units
from mptk.progress import Progress, silent
from mptk.protocols.chain import Chosen, Compiled, Prepared, reconstructs
from mptk.protocols.run_folder import RunFolder
from mptk.protocols.shapes import Rung, Shape, Shapes, bounded, ranked
from mptk.protocols.values import Context, SampleSets
from mptk.reading import read_as
from passes.pipelines import cut_program
from passes.targets.legalize import Candidate, describe

JUDGED = 8
"""At most so many samples, or a quarter of as many as there are others, are what a search measures shapes on."""


def search_shapes(prepared: Prepared, sets: SampleSets, context: Context) -> Shapes:
    """The candidates of ``prepared``, ranked. What is known of each is kept in ``context.folder``.

    Raises:
        MptkError: no sample is held out to measure on; or what was kept is damaged.
    """
    assert context.folder is not None
    if sets.held_out is None:
        raise MptkError("a search measures shapes on samples of their own, and there is only one; give more --data")
    search = Search(prepared, sets, context, context.folder)
    found = search.climbed()
    task, s = prepared.task, prepared.settings
    protocol = (
        f"mean loss on {len(search.samples)} samples of {search.samples.positions} tokens of "
        f"{task.named(prepared.loaded.model, s.data)}, which nothing was fitted to or trained on; units by "
        f"{search.criterion} from {len(sets.calibration)} other samples"
    )
    metric: Literal["perplexity", "loss"] = "perplexity" if task.classes and not task.compares else "loss"
    return Shapes(prepared.source, protocol, metric, search.dense(), ranked(found))


def winner(prepared: Prepared, found: Shapes) -> Prepared:
    """``prepared`` with the widths of the best shape alone, as if each had been given with ``--width``."""
    p = prepared
    settings = replace(p.settings, widths=dict(found.best.widths), search=False)
    search = WidthSearch(p.analysis, p.legal, p.cost, p.loaded.model, p.method, p.target, settings)
    return replace(p, candidates=tuple(search.candidates()), shapes=found)


# ---- how tokens are spent ----


def work(settings: Settings, sizes: Sizes, kept: float) -> dict[str, Pass]:
    """What a search costs."""
    s = settings
    if not s.search:
        return {}
    measured = s.search_shapes * 2 * kept * judged(s.samples) * s.length
    fits = s.search_shapes * sizes.fit * bool(s.reconstruct)
    trains = memory(s, sizes, kept) if s.search_tokens else 0
    return {
        "shapes": Pass(s.samples * s.length + measured, s.length, flops=fits),
        "train shapes": Pass(4 * s.search_tokens, s.length, reads=0, training=trains),
    }


def judged(samples: int) -> int:
    """How many samples a search holds out beside so many others."""
    return min(JUDGED, max(1, samples // 4))


def rungs(settings: Settings, shapes: int) -> list[tuple[int, int]]:
    """How many shapes each rung trains, and for how many steps. ``shapes``: those that there are.

    Raises:
        MptkError: the tokens do not suffice for a step of each.
    """
    alive = [min(settings.search_finalists, shapes)]
    while alive[-1] > 2:
        alive.append(-(-alive[-1] // 2))
    if alive[0] < 2 or not settings.search_tokens:
        return []
    step = settings.learning.training.batch * settings.length
    units = sum(count * 2**rung for rung, count in enumerate(alive))
    if settings.search_tokens < units * step:
        raise MptkError(
            f"{settings.search_tokens} tokens do not suffice to train {alive[0]} shapes by halves: a step has {step}, "
            f"so give {units * step} or more, fewer finalists, or a smaller --batch"
        )
    return [(count, settings.search_tokens * 2**rung // (units * step)) for rung, count in enumerate(alive)]


def searched(settings: Settings) -> int:
    """How many samples the shape is trained on that is trained longest."""
    planned = rungs(settings, settings.search_finalists) if settings.search else []
    return sum(steps for _, steps in planned) * settings.learning.training.batch


def finalists(shapes: Sequence[Shape], dense: Mapping[str, int], count: int) -> list[int]:
    """The numbers of ``count`` shapes to train: good ones, unlike each other.

    First the best of each set of families that is cut, then the best of the others.
    """
    order = sorted(range(len(shapes)), key=lambda i: shapes[i].stages[0])
    best: dict[frozenset[str], int] = {}
    for i in order:
        best.setdefault(frozenset(n for n, width in shapes[i].widths.items() if width < dense[n]), i)
    first = list(best.values())
    return [*first, *(i for i in order if i not in first)][:count]


# ---- the trials ----


@dataclass(frozen=True)
class Search:
    """A search among ``prepared.candidates``. What is known of each shape is kept in ``folder``, a file a shape.

    ``compiled``: the number of a shape that is trained → its cut model.
    """

    prepared: Prepared
    sets: SampleSets
    context: Context
    folder: RunFolder
    compiled: dict[int, Compiled] = field(default_factory=dict)

    def climbed(self) -> list[Shape]:
        """Each candidate after the last trial that it came to."""
        candidates, context = self.prepared.candidates, self.context
        known = [self.kept(i) for i in range(len(candidates))]
        if None in known:
            _ = self.scores, self.products  # stages of their own
        shapes = []
        with context.stage(stage := "shapes"):
            for i, (candidate, shape) in enumerate(zip(candidates, known, strict=True)):
                context.progress(stage, i, len(candidates), describe(candidate.widths))
                shapes.append(shape or self.keep(i, self.measured(candidate)))
            context.progress(stage, len(candidates), len(candidates))
        if planned := rungs(self.prepared.settings, len(shapes)):
            with context.stage("train shapes"):
                self._halve(shapes, planned)
        return shapes

    def _halve(self, shapes: list[Shape], planned: Sequence[tuple[int, int]]) -> None:
        """Train the best of ``shapes``, in place, in rungs: how many, and for how many steps."""
        dense = {name: self.prepared.analysis.family(name).size for name in self.prepared.families}
        alive = finalists(shapes, dense, planned[0][0])
        done, total = 0, sum(count for count, _ in planned)
        for rung, (count, steps) in enumerate(planned):
            alive = sorted(alive, key=lambda i: shapes[i].stages[rung])[:count]
            for i in alive:
                if len(shapes[i].rungs) <= rung:
                    say = partial(_say, self.context.progress, done, total, describe(shapes[i].widths))
                    shapes[i] = self.keep(i, self.trained(i, shapes[i], rung, steps, say))
                    (self.folder.path / f"{_name(i, rung - 1)}.safetensors").unlink(missing_ok=True)
                done += 1
        self.context.progress("train shapes", done, total)

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
        return method if method in all_criteria() else WANDA.name

    @cached_property
    def scores(self) -> Scores:
        """Of all units."""
        return scored(self.prepared, self.criterion, self.sets, self.context, self.folder)[0]

    @cached_property
    def products(self) -> Products | None:
        """What consumers are fitted with; None if they are not."""
        p = self.prepared
        if not reconstructs(p.settings, p.method):
            return None
        with self.context.stage(stage := "moments"):
            say = partial(self.context.progress, stage)
            return gather_products(p.analysis, p.mask_sites, self.sets.calibration, say, p.calibrator)

    @cached_property
    def accelerator(self) -> Accelerator:
        """The process that trains."""
        return start_training(self.learning, self.folder)

    @property
    def learning(self) -> Learning:
        """How shapes are trained."""
        return replace(self.prepared.recovery, tracker="none")

    def chosen(self, widths: Mapping[str, int]) -> Chosen:
        """The best units for ``widths``, and the consumers fitted to them, each when it is asked for."""
        plan = plan_of(self.prepared, self.scores, widths)
        cut = resolve_plan(self.prepared.analysis, plan)
        if self.products is None:
            return Chosen(plan, cut)
        fitted = {site.family for site in self.products.sites} & plan.families.keys()
        changes = self.products.fitted(kept_units(self.prepared.analysis, cut, sorted(fitted)))
        return Chosen(plan, cut, changes, tuple(changes))

    def measured(self, candidate: Candidate) -> Shape:
        """A candidate's losses before training: masked and, if consumers are fitted, with these."""
        analysis, chosen = self.prepared.analysis, self.chosen(candidate.widths)
        dense = analysis.program.state
        now: Mapping[str, Tensor] = dense

        def weight(name: str) -> Tensor:
            return now[name]

        weights = Weights({name: Lazy(dense.like(name).to("meta"), partial(weight, name)) for name in chosen.changes})
        changed = replace(analysis, program=analysis.program.with_state(weights))
        program = cut_program(changed, chosen.cut, Log(), torch.float32).exact  # once for both: to cut takes time
        masked, fitted = self._loss(program), None
        if self.products is not None:
            now = chosen.changes
            fitted = self._loss(program)
        cost = self.prepared.cost(candidate.widths)
        return Shape(candidate.widths, candidate.sparsity, cost.parameters, cost.latency_ms, masked, fitted)

    def trained(self, number: int, shape: Shape, rung: int, steps: int, say: Progress) -> Shape:
        """The shape after a further rung of ``steps`` steps. The rung's weights are kept until the next one is done."""
        if number not in self.compiled:
            chosen, calibration = self.chosen(shape.widths), self.sets.calibration
            self.compiled[number] = compile_plan(self.prepared, chosen, calibration, Context(Log(), silent))
        compiled, sets, learning = self.compiled[number], self.sets, self.learning
        before = self.folder.tensors(_name(number, rung - 1)) or {}
        small = small_model(compiled, compiled.program.state_dict().updated(before))
        place = RunFolder(self.folder.path / _name(number, rung), {}, resume=True)
        learner = Learner(self.accelerator, self.prepared, sets.training, learning, place, say)
        seen, positions = shape.rungs[-1].tokens if shape.rungs else 0, sets.training.positions
        found = learner.recover(small, steps, sets.proof, seen // positions)
        assert found is not None
        weights, aliases = {**before, **found.weights}, compiled.program.aliases
        named = Weights({aliases.get(name, name): weight for name, weight in weights.items()})
        loss = self._loss(compiled.program.with_state(named))
        weights, loss = (before, shape.loss) if loss > shape.loss else (weights, loss)
        if weights:
            self.folder.save(_name(number, rung), weights)
        place.remove()
        return replace(shape, rungs=(*shape.rungs, Rung(seen + steps * learning.training.batch * positions, loss)))

    def dense(self) -> Shape:
        """The dense model, with which shapes are compared."""
        cost = self.prepared.cost.dense
        widths = {family: self.prepared.analysis.family(family).size for family in self.prepared.families}
        return Shape(widths, 0.0, cost.parameters, cost.latency_ms, self._loss(self.prepared.reference))

    def _loss(self, program: Program) -> float:
        return bounded(*losses(self.prepared, [lambda: program], self.samples))

    # ---- what is kept ----

    def kept(self, number: int) -> Shape | None:
        """The shape of that number, if it was measured before and is of the same widths."""
        path = self._file(number)
        if not path.is_file():
            return None
        remedy = "remove it, and start again with --resume"
        shape = read_as(Shape, path, lambda why: MptkError(f"{path} is damaged: {why}; {remedy}"))
        return shape if dict(shape.widths) == dict(self.prepared.candidates[number].widths) else None

    def keep(self, number: int, shape: Shape) -> Shape:
        """Write what is known of the shape of that number; gives it back."""
        write_json(self._file(number), asdict(shape))
        return shape

    def _file(self, number: int) -> Path:
        return self.folder.path / f"shape-{number:05d}.json"


def _name(number: int, rung: int) -> str:
    """What a shape's weights after a rung are kept under."""
    return f"shape-{number:05d}-{rung}"


def _say(
    progress: Progress, done: int, total: int, widths: str, phase: str, step: int, steps: int, figures: str = "", /
) -> None:
    """A step of ``phase`` as a part of a stage whose units are the rungs of all shapes."""
    progress("train shapes", done, total, f"{widths}, step {step}/{steps}  {figures}")
