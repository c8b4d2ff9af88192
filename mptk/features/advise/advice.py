"""advice: the result of ``mptk advise``: what cuts of several sizes cost on several texts, and which are safe."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Literal, Self

from mptk.config import Settings
from mptk.cost.budgets import PROMPT
from mptk.notebook import build_html, build_line, build_table
from mptk.reading import Json

ADVICE = Settings(method="wanda", reconstruct=True, onnx=False, length=128, eval_windows=8)
"""Default settings of an advice: many cuts are measured, so each must be cheap (short windows, a one-shot method)."""
SPARSITIES = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5)
"""Default sparsities of an advice."""
ADVICE_FORMAT = "mptk-advice/1"
FLOAT_TYPE = "float32"
"""The type of a graph that is not quantised."""
STANDARD_ERRORS = 2.0
"""Standard errors by which a change must stay below the tolerance: two are about 95 % of a normal distribution."""
CALIBRATION_STEPS = 16
"""Default training steps of each cut that an advice trains."""
TRAINED = 2
"""Most cuts that an advice trains: two, as a line through both estimates the others."""
KNEE = 0.05
"""Least distance of a knee below the chord, as a share of the curve's height."""

JudgedBy = Literal["perplexity", "disagreement", "loss"]


@dataclass(frozen=True)
class Figures:
    """What a cut does on one text.

    ``loss``: the mean over its windows, in the task's unit (nats a token). ``rise``: its difference from the dense
    model's. ``agreement``: share of positions with the dense model's top-1 prediction; None if outputs are no logits.
    ``change``: what is compared with the tolerance (``Advice.measure``). ``error``: its standard error over windows,
    from each window's difference to the dense model.
    """

    loss: float
    rise: float
    agreement: float | None
    change: float
    error: float

    @property
    def most(self) -> float:
        """The change, and ``STANDARD_ERRORS`` standard errors more."""
        return self.change + STANDARD_ERRORS * self.error


@dataclass(frozen=True)
class Point:
    """A cut: family → units kept in each layer, the share of the budget removed, its cost, and text → figures.

    ``latency_ms``: predicted milliseconds, if a latency is the budget.
    """

    widths: Mapping[str, int]
    sparsity: float
    parameters: float
    bytes: float
    latency_ms: float | None
    texts: Mapping[str, Figures]

    @property
    def rise(self) -> float:
        """The rise of the loss over the dense model's, averaged over the texts."""
        return sum(figures.rise for figures in self.texts.values()) / len(self.texts)


@dataclass(frozen=True)
class Ceiling:
    """What a model may take at most: milliseconds of a decoding step, of a prompt, bytes of its graph, and bytes of
    memory in decoding. None: as much as it wants.

    ``context``: tokens in the KV cache in decoding.
    """

    decode_ms: float | None = None
    prefill_ms: float | None = None
    bytes: float | None = None
    memory: float | None = None
    context: int = PROMPT

    @property
    def is_set(self) -> bool:
        """Whether anything is limited."""
        return any(most is not None for most in (self.decode_ms, self.prefill_ms, self.bytes, self.memory))

    @property
    def phases(self) -> list[str]:
        """The phases of which milliseconds are limited; without any limit the decoding step, which users wait for."""
        found = [name for name, most in (("decode", self.decode_ms), ("prefill", self.prefill_ms)) if most is not None]
        return found or ([] if self.is_set else ["decode"])

    def scale_times(self, factor: float) -> Self:
        """The same limits, but for ``factor`` times the milliseconds."""
        decode, prefill = (None if most is None else factor * most for most in (self.decode_ms, self.prefill_ms))
        return replace(self, decode_ms=decode, prefill_ms=prefill)

    @property
    def decodes(self) -> bool:
        """Whether the context counts."""
        return self.memory is not None or "decode" in self.phases


@dataclass(frozen=True)
class Way:
    """A cut in a type: ``FLOAT_TYPE`` or a scheme of quantised graphs. ``sparsity`` 0: the dense model.

    ``bytes``: of its graph. ``ms``: phase → predicted milliseconds. ``texts``: as in ``Point``, without agreement.
    ``memory``: bytes that decoding takes at the most; None if it is not limited. ``measured``: the same figures of the
    graph itself, in ONNX Runtime; None if it was not made.
    """

    type: str
    sparsity: float
    widths: Mapping[str, int]
    bytes: float
    ms: Mapping[str, float]
    texts: Mapping[str, Figures]
    memory: float | None = None
    measured: Way | None = None

    @property
    def known(self) -> Way:
        """Its figures as measured, or else as predicted."""
        return self.measured or self

    @property
    def rise(self) -> float:
        """The rise of the loss over the dense float model's, averaged over the texts."""
        return sum(figures.rise for figures in self.known.texts.values()) / len(self.texts)

    def find_rise(self, text: str | None) -> float:
        """The rise of the loss on one text, or on average."""
        return self.rise if text is None else self.known.texts[text].rise

    def is_within(self, limits: Ceiling) -> bool:
        """Whether it stays within the limits."""
        known = self.known
        pairs = [(known.bytes, limits.bytes), (known.ms.get("decode"), limits.decode_ms)]
        pairs += [(known.ms.get("prefill"), limits.prefill_ms), (known.memory, limits.memory)]
        return all(most is None or (taken is not None and taken <= most) for taken, most in pairs)

    @property
    def price(self) -> float:
        """What it takes: milliseconds of the first phase that is timed, else bytes of memory, else of the graph."""
        known = self.known
        return next(iter(known.ms.values()), known.bytes if known.memory is None else known.memory)

    @property
    def cut(self) -> tuple[tuple[str, int], ...]:
        """The widths, by which ways of one cut are known."""
        return tuple(self.widths.items())

    @property
    def is_sum(self) -> bool:
        """Whether its loss is predicted as a sum: of a cut's rise and a type's."""
        return self.sparsity > 0 and self.type != FLOAT_TYPE

    def compute_miss(self, text: str) -> float | None:
        """By which share the measured perplexity differs from the predicted one; None if it was not measured."""
        return None if self.measured is None else math.expm1(self.measured.texts[text].loss - self.texts[text].loss)


@dataclass(frozen=True)
class Recovery:
    """What training gave back. ``points``: the cuts that were trained, by rising sparsity, after ``steps`` steps on
    ``tokens`` tokens each. ``command``: as in ``Advice``, with this training.
    """

    steps: int
    tokens: int
    points: tuple[Point, ...]
    command: str = ""


@dataclass(frozen=True)
class Range:
    """The least and the most that a change may be."""

    least: float
    most: float


@dataclass(frozen=True)
class Advice:
    """What cuts cost, and which are safe.

    ``measure``: what ``change`` is. perplexity: its relative rise over the dense model's. disagreement: share of
    samples with another top-1 class. loss: the mean loss, which compares outputs. ``tolerance``: the largest change
    that is safe. ``division``: cuts of rising sparsity as `mptk prune` makes them. ``families``: cuts of one family, or
    of families that are only cut together. ``layers``: family → rise of the loss if one layer has half of its units.
    ``command``: the command for the recommended cut; empty if there is none. ``recovery``: None if nothing was trained.
    ``ways``: cuts in types; empty if none were compared. ``limits``: what the way may take. ``way_command``: makes the
    best way; empty if there is none.
    """

    model: str
    protocol: str
    measure: JudgedBy
    tolerance: float
    dense: Point
    division: tuple[Point, ...]
    families: Mapping[str, tuple[Point, ...]]
    layers: Mapping[str, tuple[float, ...]]
    command: str = ""
    recovery: Recovery | None = None
    ways: tuple[Way, ...] = ()
    limits: Ceiling = Ceiling()
    way_command: str = ""

    def __repr__(self) -> str:
        return f"Advice({self.model}: {self._describe()}; {len(self.division)} cuts on {', '.join(self.texts)})"

    def _repr_html_(self) -> str:
        rows = [
            [f"{point.sparsity:.1%}", *(f"{point.texts[text].change:+.1%}" for text in self.texts)]
            for point in self.division
        ]
        unit = "mean loss" if self.measure == "loss" else self.measure
        table = build_table(["removed", *(f"{unit}, {text}" for text in self.texts)], rows)
        commands = [build_line(each, code=True) for each in (self.command, self.way_command) if each]
        return build_html(f"{self.model}: {self._describe()}", table, *commands)

    def _describe(self) -> str:
        """The recommended cut in a line."""
        best = self.recommended
        amount = "none" if best is None else f"{best.sparsity:.1%}"
        return f"largest safe cut {amount}, for a change of the {self.measure} by at most {self.tolerance:.0%}"

    @property
    def texts(self) -> list[str]:
        """The names of the texts."""
        return list(self.dense.texts)

    def find_safe(self, text: str, *, recovered: bool = False) -> Point | None:
        """The largest cut that is safe on ``text``, as all smaller ones are; None if the smallest is not.

        A cut above one that is not safe is safe by chance, so the search stops there. ``recovered``: after training,
        by the most that the change may then be.
        """
        found = None
        for point in self.division:
            most = self.estimate_after(point, text).most if recovered else point.texts[text].most
            if most > self.tolerance:
                break
            found = point
        return found

    @property
    def recommended(self) -> Point | None:
        """The largest cut that is safe on every text; None if there is none."""
        return self._find_weakest([self.find_safe(text) for text in self.texts])

    @property
    def recommended_after(self) -> Point | None:
        """The same after training; None if nothing was trained."""
        if self.recovery is None:
            return None
        return self._find_weakest([self.find_safe(text, recovered=True) for text in self.texts])

    def _find_weakest(self, safe: Sequence[Point | None]) -> Point | None:
        found = [point for point in safe if point is not None]
        return min(found, key=lambda point: point.sparsity) if len(found) == len(safe) else None

    # ---- in types ----

    @property
    def front(self) -> list[Way]:
        """The ways than which no other is cheaper and as good, by falling price (Pareto)."""
        found = list[Way]()
        for way in sorted(self.ways, key=lambda each: (each.price, each.rise)):
            if not found or way.rise < found[-1].rise:
                found.append(way)
        return found[::-1]

    def rank_ways(self, text: str | None = None) -> list[Way]:
        """The ways within the limits, the best first: on one text, or on average.

        A cut that seems to lose less than its type does uncut does so by chance: it counts as much as that, and comes
        after it.
        """
        rises = {way.type: way.find_rise(text) for way in self.ways if not way.sparsity}
        there = [way for way in self.ways if way.is_within(self.limits)]
        return sorted(there, key=lambda way: (max(way.find_rise(text), rises[way.type]), way.sparsity, way.price))

    def find_way(self, text: str | None = None) -> Way | None:
        """The best way within the limits, on one text or on average; None if no way meets them."""
        return next(iter(self.rank_ways(text)), None)

    @property
    def checked(self) -> list[Way]:
        """The cuts in a type that were measured: their predicted loss, a sum, can be compared with the measured one."""
        return [way for way in self.ways if way.is_sum and way.measured is not None]

    @property
    def cheaper_way(self) -> Way | None:
        """The next cheaper way of the front after the best one; None if there is none."""
        best = self.find_way()
        found = [] if best is None else [way for way in self.front if way.price < best.price and way.rise > best.rise]
        return next(iter(found), None)

    @property
    def better_way(self) -> Way | None:
        """The next better way of the front, which the limits forbid; None if there is none."""
        best = self.find_way()
        found = [] if best is None else [way for way in self.front if way.price > best.price and way.rise < best.rise]
        return next(reversed(found), None)

    # ---- after training ----

    def find_trained(self, point: Point) -> Point | None:
        """A cut after its training; None if it was not trained."""
        points = () if self.recovery is None else self.recovery.points
        return next((each for each in points if each.widths == point.widths), None)

    def compute_recovered(self, trained: Point, text: str) -> float:
        """The share of the rise on ``text`` that the training of a cut gave back; 0 without a rise."""
        rise = self._compute_rise(self._find_untrained(trained).texts[text])
        return 1 - self._compute_rise(trained.texts[text]) / rise if rise > 0 else 0.0

    def estimate_after(self, point: Point, text: str) -> Range:
        """The change of a cut on ``text`` after training, with standard errors: measured, or estimated by trained cuts.

        A cut that was not trained is taken to lie between the share that each trained cut gets back and the line
        through both. Training gives back part of what the cut costs, and teaches the text itself, which helps a small
        cut as much as a large one: the line has an offset, a share has none.
        """
        own = self.find_trained(point)
        figures = (own or point).texts[text]
        rise, error = self._compute_rise(figures), STANDARD_ERRORS * self._compute_rise_error(figures)
        rises = [rise] if own is not None else self._estimate_rises(rise, text)
        return Range(self._compute_change(min(rises) - error), self._compute_change(max(rises) + error))

    def _estimate_rises(self, rise: float, text: str) -> list[float]:
        """What is left of a rise after training; never more, as training that makes a model worse is dropped."""
        assert self.recovery is not None
        points = self.recovery.points
        found = [rise * (1 - self.compute_recovered(point, text)) for point in points]
        after = [self._compute_rise(point.texts[text]) for point in points]
        before = [self._compute_rise(self._find_untrained(point).texts[text]) for point in points]
        if len(points) == TRAINED and before[0] != before[1]:
            slope = (after[1] - after[0]) / (before[1] - before[0])
            found.append(after[0] + slope * (rise - before[0]))
        return [min(each, rise) for each in found]

    def _find_untrained(self, trained: Point) -> Point:
        return next(point for point in self.division if point.widths == trained.widths)

    def _compute_rise(self, figures: Figures) -> float:
        """The change on a scale that adds up: as a logarithm (the rise of the loss) if the measure is perplexity."""
        return figures.rise if self.measure == "perplexity" else figures.change

    def _compute_rise_error(self, figures: Figures) -> float:
        """The standard error on the scale of ``_compute_rise``: the derivative of log(1 + x) is 1 / (1 + x)."""
        return figures.error / (1 + figures.change) if self.measure == "perplexity" else figures.error

    def _compute_change(self, rise: float) -> float:
        # exp(709.8) is the largest float. Other measures are at least 0; a perplexity may fall.
        return math.expm1(min(rise, 700.0)) if self.measure == "perplexity" else max(rise, 0.0)

    @property
    def knee(self) -> Point | None:
        """The cut after which the loss rises faster than on average: the farthest below the chord of the curve of the
        mean change (Satopää et al. 2011, "Kneedle"). None with fewer than three cuts, or if none is ``KNEE`` below it.
        """
        last = self.division[-1] if len(self.division) > 2 else None
        if last is None or not last.rise:
            return None

        def compute_depth(point: Point) -> float:
            return point.sparsity / last.sparsity - point.rise / last.rise

        best = max(self.division, key=compute_depth)
        return best if compute_depth(best) >= KNEE else None

    def to_json(self) -> Json:
        """The JSON of ``mptk advise --json``."""
        best, safe = self.recommended, {text: self.find_safe(text) for text in self.texts}
        return {
            "format": ADVICE_FORMAT,
            **asdict(self),
            "recovery": self._convert_recovery(),
            "safe": {text: None if point is None else point.sparsity for text, point in safe.items()},
            "recommended": None if best is None else asdict(best),
            "knee": None if self.knee is None else self.knee.sparsity,
            "front": [asdict(way) for way in self.front],
            "way": None if (way := self.find_way()) is None else asdict(way),
        }

    def _convert_recovery(self) -> Json | None:
        if self.recovery is None:
            return None
        after = {text: [asdict(self.estimate_after(point, text)) for point in self.division] for text in self.texts}
        best = self.recommended_after
        return {**asdict(self.recovery), "after": after, "recommended": None if best is None else asdict(best)}


def sort_distinct(points: Sequence[Point]) -> tuple[Point, ...]:
    """The points without repeated widths, by rising sparsity."""
    found = {tuple(point.widths.items()): point for point in points}
    return tuple(sorted(found.values(), key=lambda point: point.sparsity))
