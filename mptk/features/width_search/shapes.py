"""shapes: the result of a search: a ``Shape`` for each way to divide the budget, and the ranked ``Shapes``."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Literal

from pydantic import Field

from mptk.reading import Json

SHAPES_FORMAT = "mptk-shapes/1"
WORST = 1e9
"""The value for a loss that is not finite: it can be compared and written as JSON, which infinity cannot."""


@dataclass(frozen=True)
class Rung:
    """The loss after a shape was trained on ``tokens`` tokens in all."""

    tokens: int
    loss: float


@dataclass(frozen=True)
class Shape:
    """A legal division of the budget. All losses are on the same samples, which are not used for training or fitting.

    ``widths``: family → units kept in each layer, uncut families too. ``sparsity``: share of the budget removed.
    ``latency_ms``: predicted, if a latency is the budget. ``masked``: the loss without the other units.
    ``reconstructed``: the loss after consumers were fitted; None if they are not. ``rungs``: losses after training.
    """

    widths: Mapping[str, int]
    sparsity: float
    parameters: float
    latency_ms: float | None
    masked: float
    reconstructed: float | None = None
    rungs: tuple[Rung, ...] = ()

    @property
    def stages(self) -> tuple[float, ...]:
        """The loss before any training, then the loss of each rung."""
        first = self.masked if self.reconstructed is None else self.reconstructed
        return (first, *(rung.loss for rung in self.rungs))

    @property
    def loss(self) -> float:
        """The last loss."""
        return self.stages[-1]

    @property
    def cost(self) -> float:
        """The predicted milliseconds or, without a prediction, the parameters."""
        return self.parameters if self.latency_ms is None else self.latency_ms

    def is_better_than(self, other: Shape) -> bool:
        """Whether it dominates the other at the other's last stage: neither dearer nor worse, and better in one."""
        last = len(other.stages) - 1
        if len(self.stages) <= last:
            return False
        own, theirs = (self.cost, self.stages[last]), (other.cost, other.stages[last])
        return own != theirs and own[0] <= theirs[0] and own[1] <= theirs[1]


@dataclass(frozen=True)
class Shapes:
    """The shapes of a search, the best first.

    ``dense``: the dense model as a shape. ``protocol``: how losses were measured. ``metric``: a perplexity is e^loss.
    ``command``: the command that prunes to the best shape; empty in a report.
    """

    model: str
    protocol: str
    metric: Literal["perplexity", "loss"]
    dense: Shape
    shapes: Annotated[tuple[Shape, ...], Field(min_length=1)]
    command: str = ""

    def __post_init__(self) -> None:
        if any(shape.widths.keys() != self.best.widths.keys() for shape in (self.dense, *self.shapes)):
            raise ValueError("its shapes have different families")

    @property
    def best(self) -> Shape:
        """Among the shapes that reached the last stage, the one with the lowest loss."""
        return self.shapes[0]

    def to_figure(self, loss: float) -> float | None:
        """A loss as the metric; None if it is not finite."""
        if loss >= WORST:
            return None
        return math.exp(min(loss, 700.0)) if self.metric == "perplexity" else loss

    @property
    def front(self) -> tuple[Shape, ...]:
        """The Pareto front."""
        return tuple(s for s in self.shapes if not any(other.is_better_than(s) for other in self.shapes))

    def to_json(self) -> Json:
        """The JSON of ``mptk shapes --json``."""
        front = self.front
        shapes = [{**asdict(shape), "pareto": shape in front} for shape in self.shapes]
        return {"format": SHAPES_FORMAT, **asdict(self), "shapes": shapes}


def rank_shapes(shapes: Sequence[Shape]) -> tuple[Shape, ...]:
    """Sort by the stage reached, the last stage first, then by loss: losses of different stages cannot be compared."""
    return tuple(sorted(shapes, key=lambda shape: (-len(shape.rungs), shape.loss)))


def limit_loss(loss: float) -> float:
    """A loss that can be compared and stored: one that is not finite counts as the worst."""
    return loss if math.isfinite(loss) else WORST
