"""watch: measure the loss on held-out samples during training, and find the step with the lowest loss."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mptk.ir.samples import Samples

NAME = "held-out"
"""The metric in the log of a phase."""
STATE = "watched"
"""The losses in a checkpoint."""


@dataclass
class Watch:
    """``losses``: number of steps → the training loss on ``samples``, which are never trained on."""

    samples: Samples
    losses: dict[int, float] = field(default_factory=dict)

    def add(self, step: int, loss: float) -> None:
        """Record the loss after ``step`` steps. NaN counts as infinite."""
        self.losses[step] = math.inf if math.isnan(loss) else loss

    @property
    def best(self) -> int:
        """The step with the lowest loss, the first of equal ones."""
        return min(self.losses, key=lambda step: (self.losses[step], step))

    def state(self) -> Tensor:
        """The losses for a checkpoint, float64 [n, 2]."""
        return torch.tensor(list(self.losses.items()), dtype=torch.float64)

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Continue with the losses of a checkpoint, if it has some."""
        if STATE in state:
            self.losses = {int(step): loss for step, loss in state[STATE].tolist()}

    def row(self, source: str, every: int) -> dict[str, Any]:
        """The report's row. ``source``: of the samples. ``every``: steps between two measurements."""
        when = f"before training, every {every} steps and at the end"
        return {
            "metric": "training loss",
            "protocol": f"{len(self.samples)} samples of {source}, never trained on; {when}",
            "losses": {str(step): loss for step, loss in self.losses.items()},
            "kept": self.best,
        }

    def note(self) -> str:
        """One line if training ended worse than an earlier step; else empty."""
        first, last, best = 0, max(self.losses), self.best
        if best == last:
            return ""
        worse = f"{self.losses[best]:.4g} → {self.losses[last]:.4g}"
        if best == first:
            return (
                f"recovery made the model worse on held-out samples (loss {worse} in {last} steps), and the weights "
                "from before it were kept; try a lower --lr or more text"
            )
        return (
            f"recovery got worse on held-out samples after step {best} of {last} (loss {worse}); the weights of step "
            f"{best} were kept"
        )
