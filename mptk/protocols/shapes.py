"""shapes: what a search knows of each way to divide the budget: a ``Shape``, and the ``Shapes`` it ranks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal

from pydantic import Field

FORMAT = "mptk-shapes/1"
WORST = 1e9
"""What stands for a loss that is not finite."""


@dataclass(frozen=True)
class Rung:
    """The loss after a shape was trained on ``tokens`` tokens of text in all."""

    tokens: int
    loss: float


@dataclass(frozen=True)
class Shape:
    """A legal division of the budget. All losses are on the same samples, which nothing is trained or fitted on.

    ``widths``: family → units kept in each layer, whole families too. ``sparsity``: share of the budget removed.
    ``latency_ms``: predicted, if a latency is budgeted. ``masked``: the loss when all other units are gone.
    ``reconstructed``: the loss when the consumers are then fitted; None if they are not. ``rungs``: after training.
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
        """The loss before any training, then that of each rung."""
        first = self.masked if self.reconstructed is None else self.reconstructed
        return (first, *(rung.loss for rung in self.rungs))

    @property
    def loss(self) -> float:
        """The last loss."""
        return self.stages[-1]

    @property
    def cost(self) -> float:
        """The predicted milliseconds, or the parameters if none are predicted."""
        return self.parameters if self.latency_ms is None else self.latency_ms

    def beats(self, other: Shape) -> bool:
        """Whether it went as far, costs no more, was no worse at the other's last stage, and is better in one."""
        last = len(other.stages) - 1
        if len(self.stages) <= last:
            return False
        own, theirs = (self.cost, self.stages[last]), (other.cost, other.stages[last])
        return own != theirs and own[0] <= theirs[0] and own[1] <= theirs[1]


@dataclass(frozen=True)
class Shapes:
    """The shapes of a search, the best first.

    ``dense``: the dense model as a shape. ``protocol``: how losses were measured. ``metric``: a perplexity is e to the
    loss. ``command``: the command that prunes to the best shape; empty in a report.
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
        """The shape that went furthest with the least loss."""
        return self.shapes[0]

    def figure(self, loss: float) -> float | None:
        """A loss as the metric; None if it is not finite."""
        if loss >= WORST:
            return None
        return math.exp(min(loss, 700.0)) if self.metric == "perplexity" else loss

    @property
    def front(self) -> tuple[Shape, ...]:
        """The shapes that no other beats."""
        return tuple(s for s in self.shapes if not any(other.beats(s) for other in self.shapes))

    def to_json(self) -> dict[str, Any]:
        """What ``mptk shapes --json`` writes."""
        front = self.front
        shapes = [{**asdict(shape), "pareto": shape in front} for shape in self.shapes]
        return {"format": FORMAT, **asdict(self), "shapes": shapes}


def ranked(shapes: Sequence[Shape]) -> tuple[Shape, ...]:
    """Those that went furthest first, and of these the ones with the least loss."""
    return tuple(sorted(shapes, key=lambda shape: (-len(shape.rungs), shape.loss)))


def bounded(loss: float) -> float:
    """A loss that can be compared and kept: what is not finite is the worst."""
    return loss if math.isfinite(loss) else WORST
