"""verify: the proof. Each stage's logits against the masked dense model's, on real tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mptk.program import Program

Logits = Callable[[Tensor], Tensor]

TOLERANCE = 5e-5
"""Largest logit difference relative to the largest logit, in float32, between two torch programs."""
RUNTIME_TOLERANCE = 1e-4
"""The same for another runtime, whose kernels sum in another order."""
ROUNDINGS = 10
"""Where the masked model itself is so sensitive that a rounding error in each weight moves its logits further than a
tenth of the tolerance, as after a cut that ruins it, the tolerance is so many times that movement."""
WIDEST = 1e-3
"""A tolerance is never more than this, however sensitive the model."""


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


def prove(masked: Program, stages: Mapping[str, tuple[Logits, float]], tokens: Tensor) -> list[Difference]:
    """Compare every stage with the masked dense model.

    Args:
        masked: token ids [batch, sequence] → logits [batch, sequence, vocab] of the dense model with masks.
        stages: name → (logits function, tolerance). Their result may hold the last positions only.
        tokens: real token ids, [batch, sequence].

    Returns:
        Each stage's difference. If one is above its tolerance, tolerances allow for the model's own rounding errors.
    """
    with torch.no_grad():
        reference = masked(tokens).float()
        found = [difference(name, run(tokens), reference, tolerance) for name, (run, tolerance) in stages.items()]
        if all(d.ok for d in found):
            return found
        own = difference("rounding", rounded(masked)(tokens), reference, WIDEST).relative
    return [replace(d, tolerance=max(d.tolerance, min(ROUNDINGS * own, WIDEST))) for d in found]


def rounded(program: Program) -> Program:
    """The program with weights that differ by a rounding error each: by the relative error of their type, at random."""
    generator = torch.Generator().manual_seed(0)

    def jittered(weight: Tensor) -> Tensor:
        noise = torch.randn(weight.shape, generator=generator).to(weight)
        return weight * (1 + torch.finfo(weight.dtype).eps * noise)

    return program.with_state({n: jittered(t) for n, t in program.state.items() if t.is_floating_point()})


def difference(stage: str, logits: Tensor, reference: Tensor, tolerance: float) -> Difference:
    """NaN anywhere is an infinite difference."""
    expected = reference[:, reference.shape[1] - logits.shape[1] :]
    largest = (logits.float() - expected).abs().max().item()
    largest = largest if largest == largest else float("inf")
    return Difference(stage, largest, largest / expected.abs().max().item(), tolerance)
