"""shapes: what a search knows of each way to divide the budget: a ``Shape``, and the ``Shapes`` it ranks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any

from pydantic import Field

from mptk.conform import made

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

    def to_json(self) -> dict[str, Any]:
        """The shape as JSON data, as it is read back from a file."""
        return {**asdict(self), "rungs": [asdict(rung) for rung in self.rungs]}


@dataclass(frozen=True)
class Shapes:
    """The shapes of a search, the best first.

    ``dense``: the dense model as a shape. ``protocol``: how losses were measured. ``perplexity``: whether e to the loss
    is a perplexity. ``command``: the command that prunes to the best shape; empty in a report.
    """

    model: str
    protocol: str
    dense: Shape
    shapes: Annotated[tuple[Shape, ...], Field(min_length=1)]
    perplexity: bool = True
    command: str = ""

    @property
    def best(self) -> Shape:
        """The shape that went furthest with the least loss."""
        return self.shapes[0]

    @property
    def metric(self) -> str:
        """What ``figure`` gives."""
        return "perplexity" if self.perplexity else "loss"

    def figure(self, loss: float) -> float | None:
        """A loss as the metric; None if it is not finite."""
        if loss >= WORST:
            return None
        return math.exp(min(loss, 700.0)) if self.perplexity else loss

    @property
    def front(self) -> tuple[Shape, ...]:
        """The shapes that no other beats."""
        return tuple(s for s in self.shapes if not any(other.beats(s) for other in self.shapes))

    def to_json(self) -> dict[str, Any]:
        """What ``mptk shapes --json`` writes."""
        front = self.front
        return {
            "format": FORMAT,
            "model": self.model,
            "protocol": self.protocol,
            "metric": self.metric,
            "dense": self.dense.to_json(),
            "shapes": [{**shape.to_json(), "pareto": shape in front} for shape in self.shapes],
            "command": self.command,
        }

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Shapes:
        """What ``to_json`` gave. Raises ValueError if it is no search."""
        if data.get("metric") not in ("perplexity", "loss"):
            raise ValueError("it has no metric")
        found = made(Shapes, {**data, "perplexity": data["metric"] == "perplexity"})
        if any(shape.widths.keys() != found.best.widths.keys() for shape in (found.dense, *found.shapes)):
            raise ValueError("its shapes have different families")
        return found


def ranked(shapes: Sequence[Shape]) -> tuple[Shape, ...]:
    """Those that went furthest first, and of these the ones with the least loss."""
    return tuple(sorted(shapes, key=lambda shape: (-len(shape.rungs), shape.loss)))


def bounded(loss: float) -> float:
    """A loss that can be compared and kept: what is not finite is the worst."""
    return loss if math.isfinite(loss) else WORST
