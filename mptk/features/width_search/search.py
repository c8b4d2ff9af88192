"""search: rank the legal ways to divide the budget, by increasingly expensive trials, before the best is cut.

1. Units are scored once, and the second moments of the consumers' inputs are gathered once. For each candidate the best
   units are chosen, masked and fitted in closed form; losses are measured on samples that no fit used.
2. Good and different candidates are trained for a while, the better half for twice as long, and so on: successive
   halving (Jamieson & Talwalkar 2016, arXiv 1502.07943). The loss before training does not predict the best division
   (``docs/shapes.md``), so this decides. A method that learns begins with a short mask phase of its own at the shape's
   widths, so its first rung is a short run of the method itself. Each rung continues the run of the previous one, from
   its weights and its optimizer's state, with new text and the learning rates of a run that ends with this rung. If
   it ends worse on the held-out samples, the earlier loss counts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Literal

from mptk.compile.cut import with_dense_outputs
from mptk.config import Settings
from mptk.errors import DataError
from mptk.features.width_search import WidthSearchSettings
from mptk.features.width_search.shapes import Rung, Shape, Shapes, limit_loss, rank_shapes
from mptk.files import write_json
from mptk.ir import Program, Samples
from mptk.methods import find_method
from mptk.methods.division.trial import measure_losses
from mptk.methods.division.trials import Trials, report_part
from mptk.methods.maskprune.learner import Learner
from mptk.methods.reconstruct import reconstruct_consumers
from mptk.progress import Progress
from mptk.protocols import Chosen, Compiled, Context, Prepared, RunFolder, SampleSets
from mptk.reading import make_damage_error, read_as
from mptk.staged.spool import spool_weights
from passes.targets.legalize import Candidate, describe_widths

JUDGED = 8
"""A search holds out at most this many samples, and at most a quarter of the number of the others."""


def search_shapes(prepared: Prepared, sets: SampleSets, context: Context) -> Shapes:
    """Rank the candidates of ``prepared``. Their results are stored in ``context.folder``.

    Raises:
        MptkError: no sample is held out to measure on; or a stored result is damaged.
    """
    assert context.folder is not None
    if sets.held_out is None:
        raise DataError(
            "a search holds out samples to measure shapes on, and there is only one sample; give more --data"
        )
    search = Search(prepared, sets, context, context.folder)
    found = search.try_candidates()
    task, s = prepared.task, prepared.settings
    protocol = (
        f"mean loss on {len(search.samples)} samples of {search.samples.positions} tokens of "
        f"{task.name_data(prepared.loaded.model, s.data)}, which nothing was fitted to or trained on; units by "
        f"{search.criterion} from {len(sets.calibration)} other samples"
    )
    metric: Literal["perplexity", "loss"] = "perplexity" if task.classes and not task.compares else "loss"
    return Shapes(prepared.given.source, protocol, metric, search.dense(), rank_shapes(found))


# ---- how tokens are spent ----


def plan_search_rungs(settings: Settings, shapes: int) -> list[tuple[int, int]]:
    """Number of shapes and of steps in each rung. ``shapes``: the number of all shapes.

    Raises:
        MptkError: there are too few tokens for one step of each shape.
    """
    alive, tokens = _count_alive(settings, shapes), WidthSearchSettings.of(settings).trial_tokens
    if alive[0] < 2 or not tokens:
        return []
    least, step = count_least_tokens(settings, shapes), settings.learning.training.batch * settings.length
    if tokens < least:
        raise DataError(
            f"{tokens} tokens are too few to train {alive[0]} shapes by successive halving: a step "
            f"has {step}, so give {least} or more, fewer finalists, or a smaller --batch",
            name="trial_tokens",
            nearest=(least,),
        )
    return [(count, (tokens * count_least_steps(settings) << rung) // least) for rung, count in enumerate(alive)]


def count_least_tokens(settings: Settings, shapes: int | None = None) -> int:
    """Tokens with which the first rung has ``count_least_steps`` for each of its shapes.

    ``shapes``: the number of all.
    """
    finalists = WidthSearchSettings.of(settings).search_finalists
    alive = _count_alive(settings, finalists if shapes is None else shapes)
    steps = sum(n << rung for rung, n in enumerate(alive)) * count_least_steps(settings)
    return steps * settings.learning.training.batch * settings.length


def count_least_steps(settings: Settings) -> int:
    """Fewest steps of a shape in the first rung: one, or two of masks and one of recovery."""
    return 3 if find_method(settings.method).learns else 1


def _count_alive(settings: Settings, shapes: int) -> list[int]:
    """Number of shapes in each rung."""
    alive = [min(WidthSearchSettings.of(settings).search_finalists, shapes)]
    while alive[-1] > 2:
        alive.append(-(-alive[-1] // 2))
    return alive


def choose_finalists(shapes: Sequence[Shape], dense: Mapping[str, int], count: int) -> list[int]:
    """The numbers of ``count`` shapes to train: good and different ones.

    First the best shape for each set of cut families, then the best of the others.
    """
    order = sorted(range(len(shapes)), key=lambda i: shapes[i].stages[0])
    best: dict[frozenset[str], int] = {}
    for i in order:
        best.setdefault(frozenset(n for n, width in shapes[i].widths.items() if width < dense[n]), i)
    first = list(best.values())
    return [*first, *(i for i in order if i not in first)][:count]


# ---- the trials ----


@dataclass(frozen=True)
class Search(Trials):
    """A search among ``prepared.candidates``. ``folder`` has one file of results for each shape.

    ``compiled``: number of a trained shape → its cut model.
    """

    compiled: dict[int, Compiled] = field(default_factory=dict)

    def try_candidates(self) -> list[Shape]:
        """Each candidate after its last trial."""
        candidates, context = self.prepared.candidates, self.context
        known = [self.read_shape(i) for i in range(len(candidates))]
        if None in known:
            _ = self.scores, self.products  # stages of their own
        shapes = []
        with context.stage(stage := "shapes"):
            for i, (candidate, shape) in enumerate(zip(candidates, known, strict=True)):
                context.progress(stage, i, len(candidates), describe_widths(candidate.widths))
                shapes.append(shape or self.keep(i, self.measure_shape(candidate)))
            context.progress(stage, len(candidates), len(candidates))
        if planned := plan_search_rungs(self.prepared.settings, len(shapes)):
            with context.stage("train shapes"):
                self._halve(shapes, planned)
        return shapes

    def _halve(self, shapes: list[Shape], planned: Sequence[tuple[int, int]]) -> None:
        """Train the best of ``shapes``, in place, in rungs of (number of shapes, steps)."""
        dense = {name: self.prepared.analysis.variable(name).size for name in self.prepared.families}
        alive = choose_finalists(shapes, dense, planned[0][0])
        done, total = 0, sum(count for count, _ in planned)
        for rung, (count, steps) in enumerate(planned):
            alive.sort(key=lambda i: shapes[i].stages[rung])
            self._forget(alive[count:])
            del alive[count:]
            for i in alive:
                if len(shapes[i].rungs) <= rung:
                    what = describe_widths(shapes[i].widths)
                    say = partial(report_part, self.context.progress, "train shapes", done, total, what)
                    shapes[i] = self.keep(i, self.train_shape(i, shapes[i], steps, say))
                done += 1
        self._forget(alive)
        self.context.progress("train shapes", done, total)

    @cached_property
    def samples(self) -> Samples:
        """The samples for measuring losses."""
        assert self.sets.held_out is not None
        held_out = self.sets.held_out[:JUDGED]  # training may hold out more
        return with_dense_outputs(self.prepared, held_out) if self.prepared.task.compares else held_out

    def measure_shape(self, candidate: Candidate) -> Shape:
        """A candidate's losses before training: masked and, if consumers are fitted, with fitted consumers."""
        masked, *fitted = [self._measure_loss(program) for program in self.programs(candidate.widths)]
        cost = self.prepared.cost(candidate.widths)
        return Shape(
            candidate.widths,
            candidate.sparsity,
            cost.parameters,
            cost.latency_ms,
            masked,
            fitted[0] if fitted else None,
        )

    def train_shape(self, number: int, shape: Shape, steps: int, say: Progress) -> Shape:
        """Train the shape for a further rung of ``steps`` steps. Its checkpoint stays while it is in the search."""
        if number not in self.compiled:
            self.compiled[number] = self.cut(self.units(number, say))
        compiled, batch = self.compiled[number], self.learning.training.batch
        seen = steps * batch * self.sets.training.positions + (shape.rungs[-1].tokens if shape.rungs else 0)
        taken, in_all = compiled.chosen.steps, seen // (batch * self.sets.training.positions)
        program = self.recover_program(compiled, in_all - taken, self._place(number), say, used=taken * batch)
        loss = min(shape.loss, self._measure_loss(program))
        return replace(shape, rungs=(*shape.rungs, Rung(seen, loss)))

    def units(self, number: int, say: Progress) -> Chosen:
        """The units of a shape that is trained: learned in a short phase of masks, if the method learns, and fitted.

        ``folder`` keeps the phase, so that a resumed search does not repeat it.
        """
        p, sets = self.prepared, self.sets
        if not p.method.learns:
            return self.choose_for(p.candidates[number].widths)
        learning = replace(p.settings.learning, steps=plan_search_rungs(p.settings, len(p.candidates))[0][1])
        own = replace(p, candidates=(p.candidates[number],), settings=replace(p.settings, learning=learning))
        place = self._place(number, "-masks")
        masks = replace(own.mask_learning, tracker="none")
        learner = Learner(self.accelerator, own, sets.training, masks, place, say, scored=self.folder)
        chosen = learner.learn(sets)
        changes = spool_weights(chosen.changes.items(), p.executor.borders)
        if self.products is not None:
            sites, cut = own.find_plan_sites(chosen.plan), chosen.cut
            changes = reconstruct_consumers(p.analysis, sites, cut, changes, sets.calibration, None, p.calibrator)
        return replace(chosen, changes=changes)

    def dense(self) -> Shape:
        """The dense model as a shape, for comparison."""
        cost = self.prepared.cost.dense
        widths = {family: self.prepared.analysis.variable(family).size for family in self.prepared.families}
        return Shape(widths, 0.0, cost.parameters, cost.latency_ms, self._measure_loss(self.prepared.reference))

    def _measure_loss(self, program: Program) -> float:
        return limit_loss(*measure_losses(self.prepared, [lambda: program], self.samples))

    # ---- what is kept ----

    def read_shape(self, number: int) -> Shape | None:
        """The stored shape of that number, if there is one with the same widths."""
        path = self._file(number)
        if not path.is_file():
            return None
        shape = read_as(Shape, path, make_damage_error(path, "remove it, and start again with --resume"))
        return shape if dict(shape.widths) == dict(self.prepared.candidates[number].widths) else None

    def keep(self, number: int, shape: Shape) -> Shape:
        """Store the results of the shape of that number; returns the shape."""
        write_json(self.folder.make() / self._file(number).name, asdict(shape))
        return shape

    def _file(self, number: int) -> Path:
        return self.folder.path / f"{_name(number)}.json"

    def _place(self, number: int, phase: str = "") -> RunFolder:
        """Where the training of a shape keeps its checkpoints."""
        return self.folder.open_part(f"{_name(number)}{phase}", {})

    def _forget(self, numbers: Iterable[int]) -> None:
        """Remove the checkpoints of shapes that are trained no further."""
        for number in numbers:
            self._place(number).remove()


def _name(number: int) -> str:
    return f"shape-{number:05d}"
