"""halving: train the best shapes for a while, keep the better half, train these twice as long, and so on.

Successive halving (Jamieson & Talwalkar 2016, arXiv 1502.07943). A shape goes on from its weights of the rung before,
with text that it has not seen and a learning rate that falls from its peak again. If a rung makes it worse on the held
samples, the weights and the loss from before it stay.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial

from accelerate import Accelerator
from torch import Tensor

from mptk.compile.cut import compile_plan, small_model
from mptk.ir.passes import Log
from mptk.ir.weights import Weights
from mptk.methods.division.shape_losses import Search, file_of
from mptk.methods.division.trial import losses
from mptk.methods.maskprune.learner import Learner, start_training
from mptk.progress import Progress, silent
from mptk.protocols.chain import Compiled
from mptk.protocols.run_folder import RunFolder
from mptk.protocols.rungs import rungs
from mptk.protocols.shapes import Rung, Shape, bounded
from mptk.protocols.values import Context
from passes.targets.legalize import describe


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


def halved(search: Search, shapes: list[Shape]) -> list[Shape]:
    """The shapes, those that were trained with their rungs. A shape's file is written after each of its rungs."""
    prepared = search.prepared
    planned = rungs(prepared.settings, len(shapes))
    if not planned:
        return shapes
    dense = {name: prepared.analysis.family(name).size for name in prepared.families}
    alive = finalists(shapes, dense, planned[0][0])
    trainer, done, total = Trainer(search), 0, sum(count for count, _ in planned)
    with search.context.stage("train shapes"):
        for rung, (count, steps) in enumerate(planned):
            alive = sorted(alive, key=lambda i: shapes[i].stages[rung])[:count]
            for i in alive:
                say = partial(_say, search.context.progress, done, total, describe(shapes[i].widths))
                if len(shapes[i].rungs) <= rung:
                    shapes[i] = trainer.trained(i, shapes[i], rung, steps, say)
                    search.keep(i, shapes[i])
                    trainer.forget(i, rung - 1)
                done += 1
        search.context.progress("train shapes", done, total)
    return shapes


def _say(
    progress: Progress, done: int, total: int, widths: str, phase: str, step: int, steps: int, figures: str = "", /
) -> None:
    """A step of ``phase`` as a part of a stage whose units are the rungs of all shapes."""
    progress("train shapes", done, total, f"{widths}, step {step}/{steps}  {figures}")


class Trainer:
    """Trains shapes of a search. Their weights after a rung are kept until the next one is done."""

    def __init__(self, search: Search) -> None:
        self.search, self.prepared = search, search.prepared
        self.learning = replace(self.prepared.recovery, tracker="none")
        self.quiet = Context(Log(), silent)
        self._compiled: dict[int, Compiled] = {}

    @cached_property
    def accelerator(self) -> Accelerator:
        """The process that trains."""
        return start_training(self.learning, self.search.folder)

    def compiled(self, number: int, shape: Shape) -> Compiled:
        """The cut model of a shape, its consumers fitted."""
        if number not in self._compiled:
            chosen, samples = self.search.chosen(shape.widths), self.search.sets.calibration
            self._compiled[number] = compile_plan(self.prepared, chosen, samples, self.quiet)
        return self._compiled[number]

    def trained(self, number: int, shape: Shape, rung: int, steps: int, say: Progress = silent) -> Shape:
        """The shape after a further rung of ``steps`` steps."""
        compiled = self.compiled(number, shape)
        state = compiled.program.state_dict()
        before = self.search.folder.tensors(f"{file_of(number)}-{rung - 1}") or {}
        small = small_model(compiled, state.updated(before))
        training, positions = self.learning.training, self.search.sets.training.positions
        seen = shape.rungs[-1].tokens if shape.rungs else 0
        place = RunFolder(self.search.folder.path / f"{file_of(number)}-{rung}", {}, resume=True)
        learner = Learner(
            self.accelerator,
            self.prepared,
            self.search.sets.training,
            self.learning,
            place,
            say,
        )
        found = learner.recover(small, steps, self.search.sets.proof, seen // positions)
        assert found is not None
        weights = {**before, **found.weights}
        loss = self._loss(compiled, weights)
        weights, loss = (before, shape.loss) if loss > shape.loss else (weights, loss)
        if weights:
            self.search.folder.save(f"{file_of(number)}-{rung}", weights)
        place.remove()
        tokens = seen + steps * training.batch * positions
        return replace(shape, rungs=(*shape.rungs, Rung(tokens, loss)))

    def forget(self, number: int, rung: int) -> None:
        """Remove the weights of a rung after which another was kept."""
        (self.search.folder.path / f"{file_of(number)}-{rung}.safetensors").unlink(missing_ok=True)

    def _loss(self, compiled: Compiled, weights: Mapping[str, Tensor]) -> float:
        aliases = compiled.program.aliases
        named = Weights({aliases.get(name, name): weight for name, weight in weights.items()})
        program = compiled.program.with_state(named)
        (loss,) = losses(self.prepared, [lambda: program], self.search.samples)
        return bounded(loss)
