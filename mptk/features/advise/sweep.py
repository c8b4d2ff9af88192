"""sweep: measure cuts of several sizes on several texts, fitted but not trained, before any is made.

Units are scored once, and second moments are gathered once (``trials``). Each cut then costs one pass over the measured
windows. Cuts of one family by itself come first. If the default division has several families, their curves predict
which division of each size loses least: the effects of families are taken as additive (``layers``).

With training steps two of the cuts are trained (``to_train``), and say how much training gives back.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial

import numpy as np
import torch
from torch import Tensor

from mptk.config import Settings
from mptk.cost.estimate import ModelSizes, Pass
from mptk.cost.fixed import ONNX_S
from mptk.cost.operator_times import interpolate
from mptk.errors import AnalysisError
from mptk.features.advise.advice import TRAINED, Advice, Figures, JudgedBy, Point, Recovery, sort_distinct
from mptk.ir import Program, Samples, join_outputs
from mptk.methods import find_method
from mptk.methods.division.budget import list_cuttable
from mptk.methods.division.layers import measure_curves
from mptk.methods.division.trials import Trials, report_part
from mptk.methods.maskprune import learner
from mptk.methods.one_shot import CHOOSE_WIDTHS
from mptk.protocols import Context, Prepared, SampleSets, Stage
from mptk.report.view import format_count
from mptk.tasks.inputs.text import has_texts, split_rows
from passes.targets.legalize import Candidate, choose_candidates, describe_widths, find_candidates, find_finest_families
from passes.targets.width_choices import keep_complete_families

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

    by_family: Mapping[str, list[Candidate]]
    divisions: Sequence[list[Candidate]]

    @property
    def candidates(self) -> tuple[Candidate, ...]:
        """All of them, each once."""
        every = [*(c for cuts in self.by_family.values() for c in cuts), *(c for cuts in self.divisions for c in cuts)]
        return tuple({describe_widths(each.widths): each for each in every}.values())


def list_cut_families(prepared: Prepared) -> tuple[list[str], list[str]]:
    """The families that a division of the budget cuts; and these with the depths, of which each is cut by itself."""
    p = prepared
    channels, blocks = (list_cuttable(p, p.legal, blocks=each) for each in (False, True))
    names = list(p.settings.families) or channels or blocks
    every = [name for name in dict.fromkeys([*names, *blocks]) if name not in p.settings.keep]
    return [name for name in names if name in every], every


def find_divisions(
    prepared: Prepared, families: Sequence[str], every: Sequence[str], sparsity: float
) -> list[Candidate]:
    """The divisions of ``families`` nearest to ``sparsity``, of which each counts once, with widths of ``every``."""
    p = prepared
    found = [c for c in find_candidates(p.cost, p.legal, families, sparsity) if c.sparsity > 0]
    if not found:
        return []
    dense = {name: p.analysis.variable(name).size for name in every}
    off = max(p.settings.tolerance, abs(found[0].sparsity - sparsity))
    chosen = choose_candidates(found, sparsity, off, find_finest_families(p.legal, families), TRIED_DIVISIONS)
    return [replace(c, widths=dense | dict(c.widths)) for c in chosen]


def find_cuts(prepared: Prepared, sparsities: Sequence[float]) -> Cuts:
    """The legal cuts nearest to each sparsity. Raises MptkError if no family can be cut."""
    p, (names, every) = prepared, list_cut_families(prepared)
    near = partial(find_divisions, p, every=every)
    together = {name: tuple(keep_complete_families([name], p.legal.together)) for name in every}
    sets = dict.fromkeys(families for families in together.values() if set(families) <= set(every))
    half = sparsities[1::2] or sparsities  # where the division has other families, a coarse curve does
    apart = {
        each: [near(each, sparsity=s)[:1] for s in (sparsities if set(each) == set(names) else half)] for each in sets
    }
    by_family = {"+".join(each): [c for cuts in found for c in cuts] for each, found in apart.items() if any(found)}
    divisions = [found for s in sparsities if (found := near(names, sparsity=s))]
    if not divisions:
        raise AnalysisError("nothing in this model can be cut, so there is no advice; see `mptk analyze` for each axis")
    return Cuts(by_family, divisions)


def open_trials(prepared: Prepared, cuts: Cuts, sets: SampleSets, context: Context) -> Trials:
    """The trials of all cuts. ``sets``: samples to score with, to fit to and to train on."""
    assert context.folder is not None
    candidates = cuts.candidates or prepared.candidates  # which name the families, if nothing is cut
    return Trials(replace(prepared, candidates=candidates), sets, context, context.folder)


def split_into_rows(prepared: Prepared, samples: Samples) -> list[Samples]:
    """Each sample by itself, with the dense model's outputs as targets if the task's loss compares outputs."""
    rows = split_rows(samples) if has_texts(samples) else samples.split(1)
    if not prepared.task.compares:
        return rows
    outputs = prepared.executor.run_programs([prepared.reference], [row.tensors for row in rows])
    dense = [(output if isinstance(output, Tensor) else join_outputs(output)).cpu() for output in outputs]
    return [replace(row, targets=targets) for row, targets in zip(rows, dense, strict=True)]


def give_advice(trials: Trials, cuts: Cuts, texts: Mapping[str, Sequence[Samples]], tolerance: float) -> Advice:
    """Measure the cuts and give advice. ``texts``: text → single samples that nothing is fitted to."""
    advising = Advising(trials, texts, tolerance)
    found = advising.advice(cuts)
    return replace(found, recovery=advising.recovery(to_train(found))) if trials.prepared.settings.steps else found


def to_train(found: Advice) -> list[Point]:
    """The cuts to train: the smallest that is not safe, and the largest."""
    safe = 0.0 if found.recommended is None else found.recommended.sparsity
    unsafe = [point for point in found.division if point.sparsity > safe]
    return list(sort_distinct([*unsafe[:1], found.division[-1]]))


@dataclass(frozen=True)
class Measuring(Stage):
    """What an advice does in place of a cut: it measures ``cuts`` cuts on ``texts`` texts.

    ``graphs``: number of graphs of the dense model that it writes and measures, one for each type.
    """

    cuts: int
    texts: int
    graphs: int = 0

    def describe_numbers(self, settings: Settings) -> list[str]:
        s, tokens = settings, settings.steps * settings.learning.training.batch * settings.length
        trains = [f"{TRAINED} trainings of {format_count(s.steps, 'step')} on {tokens:,} tokens"] if s.steps else []
        return [format_count(s.windows, "calibration window"), *trains]

    def estimate(self, settings: Settings, sizes: ModelSizes, kept: float) -> dict[str, Pass]:
        # Each cut is a pass over the measured windows, and a fit.
        s, rows = settings, settings.eval_windows * self.texts
        scored = {name: each for name, each in find_method(s.method).work(s).items() if name != CHOOSE_WIDTHS}
        return {
            **scored,
            "moments": Pass(s.windows * s.length, s.length),
            "cuts": Pass((1 + self.cuts) * rows * s.length, s.length, flops=self.cuts * sizes.fit),
            "layers": Pass(sizes.layers * LAYER_TOKENS, s.length),
            **({"dense types": Pass(self.graphs * rows * s.length, s.length, fixed=ONNX_S)} if self.graphs else {}),
            **({"recover": learner.estimate_training(s, sizes, 1.0)["train"].repeat(TRAINED)} if s.steps else {}),
        }


@dataclass(frozen=True)
class Advising:
    """The measurements of one advice."""

    trials: Trials
    texts: Mapping[str, Sequence[Samples]]
    tolerance: float

    @property
    def prepared(self) -> Prepared:
        return self.trials.prepared

    def advice(self, cuts: Cuts) -> Advice:
        """Measure all cuts."""
        p, context = self.prepared, self.trials.context
        _ = self.dense  # stages of their own
        if cuts.candidates:
            _ = self.trials.scores, self.trials.products
        total = sum(map(len, cuts.by_family.values())) + len(cuts.divisions)
        done, known = 0, dict[str, Point]()
        with context.stage(stage := "cuts"):

            def point(candidate: Candidate) -> Point:
                nonlocal done
                context.progress(stage, done, total, what := describe_widths(candidate.widths))
                known[what] = known.get(what) or self.point(candidate)
                done += 1
                return known[what]

            by_family = {name: sort_distinct([point(each) for each in found]) for name, found in cuts.by_family.items()}
            division = sort_distinct([point(self.least(found, by_family)) for found in cuts.divisions])
            context.progress(stage, total, total)
        with context.stage(stage := "layers"):
            layers = self.layers(list(by_family), partial(context.progress, stage))
        rows, lengths = (
            min(map(len, self.texts.values())),
            [row.positions for each in self.texts.values() for row in each],
        )
        least, most = min(lengths), max(lengths)
        what = f"windows of {most}" if least == most else f"single texts of {least} to {most}"
        protocol = (
            f"{rows} or more {what} tokens of each text, which nothing was fitted to; units "
            f"by {self.trials.criterion} from {len(self.trials.sets.calibration)} other windows of all texts; "
            f"consumers are {'' if self.trials.fits else 'not '}fitted, and nothing is trained"
        )
        dense = self._point({}, 0.0, self.dense)
        return Advice(p.given.source, protocol, self.measure, self.tolerance, dense, division, by_family, layers)

    def recovery(self, points: Sequence[Point]) -> Recovery:
        """Train each of the cuts by itself, and measure it again."""
        context, sets, found = self.trials.context, self.trials.sets, list[Point]()
        steps, training = self.prepared.settings.steps, self.trials.learning.training
        with context.stage(stage := "recover"):
            for done, point in enumerate(points):
                say = partial(report_part, context.progress, stage, done, len(points), describe_widths(point.widths))
                place = self.trials.folder.open_part(stage, {}, resume=False)
                compiled = self.trials.cut(self.trials.choose_for(point.widths))
                program = self.trials.recover_program(compiled, steps, place, say, held_out=sets.held_out)
                place.remove()
                found.append(self._point(point.widths, point.sparsity, self.windows(program)))
        return Recovery(steps, steps * training.batch * sets.training.positions, tuple(found))

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
        figures = {text: compare_windows(each, self.dense[text], self.measure) for text, each in found.items()}
        sizes = {name: p.analysis.variable(name).size for name in p.families}
        return Point(sizes | dict(widths), sparsity, cost.parameters, cost.bytes, cost.latency_ms, figures)

    @torch.no_grad()
    def windows(self, program: Program) -> dict[str, Windows]:
        """The figures of a program on each window of each text. Its weights are read once."""
        task, executor = self.prepared.task, self.prepared.calibrator
        rows = [(text, row) for text, found in self.texts.items() for row in found]
        losses, top = defaultdict[str, list[float]](list), defaultdict[str, list[Tensor]](list)
        outputs = executor.run_programs([program], [row.tensors for _, row in rows])
        for (text, row), output in zip(rows, outputs, strict=True):
            losses[text].append(
                float(task.compute_loss(output, row.to(executor.device))) / max(1, task.count_predictions(row))
            )
            if task.classes and isinstance(output, Tensor):
                top[text].append(output.argmax(-1).cpu())
        return {t: Windows(torch.tensor(losses[t], dtype=torch.float64), tuple(top[t])) for t in self.texts}

    def least(self, divisions: Sequence[Candidate], by_family: Mapping[str, Sequence[Point]]) -> Candidate:
        """The division whose families' own curves predict the lowest loss."""
        return min(divisions, key=lambda each: sum(self._rise(found, each.widths) for found in by_family.values()))

    def _rise(self, curve: Sequence[Point], widths: Mapping[str, int]) -> float:
        """The mean rise of the loss for ``widths`` of the families of a curve, from its points by interpolation."""
        own = {name for point in curve for name in point.widths if point.widths[name] < self._find_dense_size(name)}
        removed = self.prepared.cost.compute_sparsity({name: widths[name] for name in own})
        xs, ys = [0.0, *(point.sparsity for point in curve)], [0.0, *(point.rise for point in curve)]
        return float(interpolate(xs, np.array(ys), removed))

    def _find_dense_size(self, name: str) -> int:
        return self.prepared.analysis.variable(name).size

    def layers(self, families: Sequence[str], progress: Callable[[int, int], None]) -> dict[str, tuple[float, ...]]:
        """Family → the rise of the masked loss on calibration text if one layer keeps half of its units."""
        p = self.prepared
        whole = [v for v in (p.analysis.variable(name) for name in families if name in p.legal.ladders) if v.uniform]
        layers = {v.name: v.list_layers() for v in whole if len(v.layers) > 1}
        if not layers:
            return {}
        ladders = {layer.name: p.legal.ladders[name] for name, found in layers.items() for layer in found}
        curves = measure_curves(p, self.trials.scores, ladders, self.trials.sets, progress, (0.5,), LAYER_TOKENS)
        return {name: tuple(curves[layer.name].losses[-1] for layer in found) for name, found in layers.items()}


def compare_windows(found: Windows, dense: Windows, measure: JudgedBy) -> Figures:
    """A program's figures beside the dense model's, window by window."""
    rises = found.losses - dense.losses
    loss, rise = float(found.losses.mean()), float(rises.mean())
    same = [float((a == b).float().mean()) for a, b in zip(found.top, dense.top, strict=True)]
    agreement = sum(same) / len(same) if same else None
    if measure == "perplexity":
        ratio = math.exp(min(rise, 700.0))
        return Figures(loss, rise, agreement, ratio - 1, ratio * compute_standard_error(rises))
    each = 1 - torch.tensor(same, dtype=torch.float64) if measure == "disagreement" else rises
    return Figures(loss, rise, agreement, float(each.mean()), compute_standard_error(each))


def compute_standard_error(values: Tensor) -> float:
    """The standard error of the mean; 0 of a single value."""
    return float(values.std() / math.sqrt(len(values))) if len(values) > 1 else 0.0
