"""advice: the result of ``mptk advise``: what cuts of several sizes cost on several texts, and which are safe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from mptk.config.settings import Settings

ADVICE = Settings(method="wanda", reconstruct=True, onnx=False, length=128, eval_windows=8)
"""Default settings of an advice."""
SPARSITIES = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5)
"""Default sparsities of an advice."""
ADVICE_FORMAT = "mptk-advice/1"
STANDARD_ERRORS = 2.0
"""Standard errors by which a change must stay below the tolerance."""

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
class Advice:
    """What cuts cost, and which are safe.

    ``measure``: what ``change`` is. perplexity: its relative rise over the dense model's. disagreement: share of
    samples with another top-1 class. loss: the mean loss, which compares outputs. ``tolerance``: the largest change
    that is safe. ``division``: cuts of rising sparsity as `mptk prune` makes them. ``families``: cuts of one family, or
    of families that are only cut together. ``layers``: family → rise of the loss if one layer has half of its units.
    ``command``: the command for the recommended cut; empty if there is none.
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

    @property
    def texts(self) -> list[str]:
        """The names of the texts."""
        return list(self.dense.texts)

    def safe(self, text: str) -> Point | None:
        """The largest cut that is safe on ``text``, as all smaller ones are; None if the smallest is not."""
        found = None
        for point in self.division:
            if point.texts[text].most > self.tolerance:
                break
            found = point
        return found

    @property
    def recommended(self) -> Point | None:
        """The largest cut that is safe on every text; None if there is none."""
        safe = [self.safe(text) for text in self.texts]
        found = [point for point in safe if point is not None]
        return min(found, key=lambda point: point.sparsity) if len(found) == len(safe) else None

    @property
    def knee(self) -> Point | None:
        """The cut after which the loss rises faster than on average: the farthest below the chord of the curve of the
        mean change (Satopää et al. 2011, "Kneedle"). None with fewer than three cuts, or if none is ``KNEE`` below it.
        """
        last = self.division[-1] if len(self.division) > 2 else None
        if last is None or not last.rise:
            return None

        def below(point: Point) -> float:
            return point.sparsity / last.sparsity - point.rise / last.rise

        best = max(self.division, key=below)
        return best if below(best) >= KNEE else None

    def to_json(self) -> dict[str, Any]:
        """The JSON of ``mptk advise --json``."""
        best, safe = self.recommended, {text: self.safe(text) for text in self.texts}
        return {
            "format": ADVICE_FORMAT,
            **asdict(self),
            "safe": {text: None if point is None else point.sparsity for text, point in safe.items()},
            "recommended": None if best is None else asdict(best),
            "knee": None if self.knee is None else self.knee.sparsity,
        }


def distinct(points: Sequence[Point]) -> tuple[Point, ...]:
    """The points without repeated widths, by rising sparsity."""
    found = {tuple(point.widths.items()): point for point in points}
    return tuple(sorted(found.values(), key=lambda point: point.sparsity))
