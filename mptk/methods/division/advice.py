"""advice: measure cuts of several sizes on several texts, fitted but not trained, before any is made.

Units are scored once, and second moments are gathered once (``trials``). Each cut then costs one pass over the measured
windows. Cuts of one family by itself come first. If the default division has several families, their curves predict
which division of each size loses least: the effects of families are taken as additive (``layers``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial

import torch
from torch import Tensor

from mptk.config.settings import Settings
from mptk.cost.estimate import ModelSizes, Pass
from mptk.errors import MptkError
from mptk.ir.program import Program
from mptk.ir.samples import Samples
from mptk.methods.division.budget import able
from mptk.methods.division.trial import masked_losses, plan_of
from mptk.methods.division.trials import Trials
from mptk.protocols.advice import Advice, Figures, JudgedBy, Point, distinct
from mptk.protocols.chain import Prepared
from mptk.protocols.values import Context, SampleSets
from passes.targets.legalize import Candidate, describe, find_candidates
from passes.targets.width_choices import closed

TRIED_DIVISIONS = 6
"""Most divisions of one size whose loss is predicted."""
LAYER_TOKENS = 256
"""Calibration tokens for the effect of one layer."""


@dataclass(frozen=True)
class Windows:
    """Loss and top-1 predictions of each window of a text; no predictions if outputs are no logits."""

    losses: Tensor
    top: tuple[Tensor, ...]


@dataclass(frozen=True)
class Cuts:
    """The cuts to measure: each family, or families that are only cut together, by itself; and divisions by size."""

    alone: Mapping[str, list[Candidate]]
    divisions: Sequence[list[Candidate]]

    @property
    def candidates(self) -> tuple[Candidate, ...]:
        """All of them, each once."""
        every = [*(c for cuts in self.alone.values() for c in cuts), *(c for cuts in self.divisions for c in cuts)]
        return tuple({describe(each.widths): each for each in every}.values())


def find_cuts(prepared: Prepared, sparsities: Sequence[float]) -> Cuts:
    """The legal cuts nearest to each sparsity.

    Raises:
        MptkError: no family can be cut.
    """
    p = prepared
    channels, blocks = (able(p, p.legal, blocks=each) for each in (False, True))
    names = list(p.settings.families) or channels or blocks
    every = [name for name in dict.fromkeys([*names, *blocks]) if name not in p.settings.keep]
    names = [name for name in names if name in every]
    dense = {name: p.analysis.family(name).size for name in every}

    def near(families: Sequence[str], sparsity: float) -> list[Candidate]:
        found = [c for c in find_candidates(p.cost, p.legal, families, sparsity) if c.sparsity > 0]
        nearest = min((abs(c.sparsity - sparsity) for c in found), default=0.0)
        found = [c for c in found if abs(c.sparsity - sparsity) <= max(nearest, p.settings.tolerance)]
        return [replace(c, widths=dense | dict(c.widths)) for c in found]

    together = {name: tuple(closed([name], p.legal.together)) for name in every}
    sets = dict.fromkeys(families for families in together.values() if set(families) <= set(every))
    half = sparsities[1::2] or sparsities  # where the division has other families, a coarse curve does
    alone = {
        "+".join(each): _first(near(each, s) for s in (sparsities if set(each) == set(names) else half))
        for each in sets
    }
    spread = [_spread(near(names, s)) for s in sparsities]
    if not any(spread):
        raise MptkError("nothing in this model can be cut, so there is no advice; see `mptk analyze` for each axis")
    return Cuts({name: cuts for name, cuts in alone.items() if cuts}, [cuts for cuts in spread if cuts])


def _first(each: Iterator[list[Candidate]]) -> list[Candidate]:
    """The first candidate of each list; none twice."""
    return list({describe(found[0].widths): found[0] for found in each if found}.values())


def _spread(found: Sequence[Candidate]) -> list[Candidate]:
    """At most ``TRIED_DIVISIONS`` of the candidates: the most even ones."""
    return sorted(found, key=lambda c: c.unevenness)[:TRIED_DIVISIONS]


def advised(
    prepared: Prepared,
    sets: SampleSets,
    texts: Mapping[str, Samples],
    sparsities: Sequence[float],
    tolerance: float,
    context: Context,
) -> Advice:
    """JudgedBy the cuts and give advice. ``texts``: text → windows that nothing is fitted to. ``sets``: to fit to.

    Raises:
        MptkError: no family can be cut.
    """
    assert context.folder is not None
    cuts = find_cuts(prepared, sparsities)
    trials = Trials(replace(prepared, candidates=cuts.candidates), sets, context, context.folder)
    return Advising(trials, texts, tolerance).advice(cuts)


def work(settings: Settings, sizes: ModelSizes, cuts: int, texts: int) -> dict[str, Pass]:
    """The cost of measuring ``cuts`` on ``texts``: each is a pass over the measured windows, and a fit."""
    s, rows = settings, settings.eval_windows * texts
    return {
        "moments": Pass(s.windows * s.length, s.length),
        "cuts": Pass((1 + cuts) * rows * s.length, s.length, flops=cuts * sizes.fit),
        "layers": Pass(sizes.layers * LAYER_TOKENS, s.length),
    }


@dataclass(frozen=True)
class Advising:
    """The measurements of one advice."""

    trials: Trials
    texts: Mapping[str, Samples]
    tolerance: float

    @property
    def prepared(self) -> Prepared:
        return self.trials.prepared

    def advice(self, cuts: Cuts) -> Advice:
        """JudgedBy all cuts."""
        p, context = self.prepared, self.trials.context
        _ = self.trials.scores, self.trials.products, self.dense  # stages of their own
        total = sum(map(len, cuts.alone.values())) + len(cuts.divisions)
        done, known = 0, dict[str, Point]()
        with context.stage(stage := "cuts"):

            def point(candidate: Candidate) -> Point:
                nonlocal done
                context.progress(stage, done, total, what := describe(candidate.widths))
                known[what] = known.get(what) or self.point(candidate)
                done += 1
                return known[what]

            alone = {name: distinct([point(each) for each in found]) for name, found in cuts.alone.items()}
            division = distinct([point(self.least(found, alone)) for found in cuts.divisions])
            context.progress(stage, total, total)
        with context.stage(stage := "layers"):
            layers = self.layers(list(alone), partial(context.progress, stage))
        windows, first = min(map(len, self.texts.values())), next(iter(self.texts.values()))
        protocol = (
            f"{windows} or more windows of {first.positions} tokens of each text, which nothing was fitted to; units "
            f"by {self.trials.criterion} from {len(self.trials.sets.calibration)} other windows of all texts; "
            f"consumers are {'' if self.trials.products else 'not '}fitted, and nothing is trained"
        )
        dense = self._point({}, 0.0, self.dense)
        return Advice(p.source, protocol, self.measure, self.tolerance, dense, division, alone, layers)

    @property
    def measure(self) -> JudgedBy:
        """What is compared with the tolerance."""
        task = self.prepared.task
        if task.classes and not task.compares:
            return "perplexity"
        return "disagreement" if all(each.top for each in self.dense.values()) else "loss"

    @cached_property
    def dense(self) -> dict[str, Windows]:
        """The dense model's figures on each text."""
        with self.trials.context.stage("dense model"):
            return self.windows(self.prepared.reference)

    def point(self, candidate: Candidate) -> Point:
        """A cut, with fitted consumers if they are fitted."""
        *_, program = self.trials.programs(candidate.widths)
        return self._point(candidate.widths, candidate.sparsity, self.windows(program))

    def _point(self, widths: Mapping[str, int], sparsity: float, found: Mapping[str, Windows]) -> Point:
        p = self.prepared
        cost = p.cost(widths)
        figures = {text: compared(each, self.dense[text], self.measure) for text, each in found.items()}
        sizes = {name: p.analysis.family(name).size for name in p.families}
        return Point(sizes | dict(widths), sparsity, cost.parameters, cost.bytes, cost.latency_ms, figures)

    @torch.no_grad()
    def windows(self, program: Program) -> dict[str, Windows]:
        """The figures of a program on each window of each text."""
        return {text: self._windows(program, samples) for text, samples in self.texts.items()}

    def _windows(self, program: Program, samples: Samples) -> Windows:
        task, executor = self.prepared.task, self.prepared.calibrator
        rows, losses, top = samples.split(1), list[float](), list[Tensor]()
        for row, output in zip(rows, executor.outputs([program], [row.tensors for row in rows]), strict=True):
            losses.append(float(task.loss(output, row.to(executor.device))) / max(1, task.predicted(row)))
            if task.classes and isinstance(output, Tensor):
                top.append(output.argmax(-1).cpu())
        return Windows(torch.tensor(losses, dtype=torch.float64), tuple(top))

    def least(self, divisions: Sequence[Candidate], alone: Mapping[str, Sequence[Point]]) -> Candidate:
        """The division whose families' own curves predict the lowest loss."""
        return min(divisions, key=lambda each: sum(self._rise(found, each.widths) for found in alone.values()))

    def _rise(self, curve: Sequence[Point], widths: Mapping[str, int]) -> float:
        """The mean rise of the loss for ``widths`` of the families of a curve, from its points by interpolation."""
        own = {name for point in curve for name in point.widths if point.widths[name] < self._size(name)}
        removed = self.prepared.cost.sparsity({name: widths[name] for name in own})
        xs, ys = [0.0, *(point.sparsity for point in curve)], [0.0, *map(self._mean, curve)]
        return _between(xs, ys, removed)

    def _size(self, name: str) -> int:
        return self.prepared.analysis.family(name).size

    def _mean(self, point: Point) -> float:
        rises = [each.loss - float(self.dense[text].losses.mean()) for text, each in point.texts.items()]
        return sum(rises) / len(rises)

    def layers(self, families: Sequence[str], progress: Callable[[int, int], None]) -> dict[str, tuple[float, ...]]:
        """Family → the rise of the masked loss on calibration text if one layer keeps half of its units."""
        p = self.prepared
        parts = {name: p.analysis.family(name).parts for name in families if name in p.legal.ladders}
        names = [name for name, layers in parts.items() if layers]
        if not names:
            return {}
        analysis = p.analysis.divided(names)
        scores = {part.name: self.trials.scores[n][i : i + 1] for n in names for i, part in enumerate(parts[n])}
        apart = replace(p, analysis=analysis, legal=replace(p.legal, stock=None))
        half = {name: min(p.legal.ladders[name], key=lambda w: abs(w - self._size(name) / 2)) for name in names}
        tried = [{}, *({part.name: half[name]} for name in names for part in parts[name])]
        plans = [plan_of(apart, scores, widths) for widths in tried]
        samples = self.trials.sets.calibration.batches(LAYER_TOKENS)[0]
        whole, *each = masked_losses(p, plans, samples, progress)
        found = iter(each)
        return {name: tuple(next(found) - whole for _ in parts[name]) for name in names}


def compared(found: Windows, dense: Windows, measure: JudgedBy) -> Figures:
    """A program's figures beside the dense model's, window by window."""
    loss, rise = float(found.losses.mean()), found.losses - dense.losses
    same = [float((a == b).float().mean()) for a, b in zip(found.top, dense.top, strict=True)]
    agreement = sum(same) / len(same) if same else None
    if measure == "perplexity":
        ratio = math.exp(min(float(rise.mean()), 700.0))
        return Figures(loss, agreement, ratio - 1, ratio * _error(rise))
    each = 1 - torch.tensor(same, dtype=torch.float64) if measure == "disagreement" else rise
    return Figures(loss, agreement, float(each.mean()), _error(each))


def _error(values: Tensor) -> float:
    """The standard error of the mean; 0 of a single value."""
    return float(values.std() / math.sqrt(len(values))) if len(values) > 1 else 0.0


def _between(xs: Sequence[float], ys: Sequence[float], x: float) -> float:
    """Linear interpolation; beyond the last point along the last line."""
    last = max(1, next((i for i, known in enumerate(xs) if known >= x), len(xs) - 1))
    if last >= len(xs) or xs[last] == xs[last - 1]:
        return ys[-1]
    share = (x - xs[last - 1]) / (xs[last] - xs[last - 1])
    return ys[last - 1] + share * (ys[last] - ys[last - 1])
