"""verify: the proof. Each stage's logits against the masked dense model's, on real tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

Logits = Callable[[Tensor], Tensor]

TOLERANCE = 5e-5
"""Largest logit difference relative to the largest logit, in float32, between two torch programs."""
RUNTIME_TOLERANCE = 1e-4
"""The same for another runtime, whose kernels sum in another order."""


@dataclass(frozen=True)
class Difference:
    """How far a stage is from the masked dense model: ``max_abs`` of the logits, ``relative`` to the largest logit."""

    stage: str
    max_abs: float
    relative: float
    tolerance: float

    @property
    def ok(self) -> bool:
        return self.relative <= self.tolerance

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"ok": self.ok}


def prove(masked: Logits, stages: Mapping[str, tuple[Logits, float]], tokens: Tensor) -> list[Difference]:
    """Compare every stage with the masked dense model.

    Args:
        masked: token ids [batch, sequence] → logits [batch, sequence, vocab] of the dense model with masks.
        stages: name → (logits function, tolerance). Their result may hold the last positions only.
        tokens: real token ids, [batch, sequence].
    """
    with torch.no_grad():
        reference = masked(tokens).float()
        return [difference(name, run(tokens), reference, tolerance) for name, (run, tolerance) in stages.items()]


def difference(stage: str, logits: Tensor, reference: Tensor, tolerance: float) -> Difference:
    """NaN anywhere is an infinite difference."""
    expected = reference[:, reference.shape[1] - logits.shape[1] :]
    largest = (logits.float() - expected).abs().max().item()
    largest = largest if largest == largest else float("inf")
    return Difference(stage, largest, largest / expected.abs().max().item(), tolerance)
