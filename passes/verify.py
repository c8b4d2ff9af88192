"""verify: the proof. Each stage's logits against the masked dense model's, on real tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor

from mptk.errors import MptkError
from mptk.ir.program import Program
from passes.transforms.round_weights import RoundWeights

StageLogits = Callable[[Tensor], "Tensor | tuple[Tensor, list[int]]"]
"""Token ids [batch, sequence] → logits of all or of the last positions; or logits and the positions they are of."""

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
    """How far a stage is from the masked dense model: ``max_abs`` of the logits, ``relative`` to the largest logit.

    ``widened``: why the tolerance is more than the stage's own, if it is. ``failure``: why the stage gave no logits.
    """

    stage: str
    max_abs: float
    relative: float
    tolerance: float
    widened: str = ""
    failure: str = ""

    @property
    def ok(self) -> bool:
        return self.relative <= self.tolerance

    def as_dict(self) -> dict[str, object]:
        said = {k: v for k, v in asdict(self).items() if k not in ("widened", "failure") or v}
        return said | {"ok": self.ok}


def prove(masked: Program, stages: Mapping[str, tuple[StageLogits, float]], *batches: Tensor) -> list[Difference]:
    """Compare every stage with the masked dense model.

    Args:
        masked: token ids [batch, sequence] → logits [batch, sequence, vocab] of the dense model with masks.
        stages: name → (logits function, tolerance).
        batches: real token ids, each [batch, sequence].

    Returns:
        Each stage's largest difference over the batches. If one is above its tolerance, tolerances allow for the
        model's own rounding errors. A stage that cannot be computed is infinitely far away.
    """
    with torch.no_grad():
        pairs = [(tokens, masked(tokens).float()) for tokens in batches]
        found = [
            max((_run(name, run, *pair, tolerance) for pair in pairs), key=lambda d: d.relative)
            for name, (run, tolerance) in stages.items()
        ]
        if all(d.ok for d in found):
            return found
        jittered = RoundWeights()(masked).program
        own = max(difference("rounding", jittered(ids), expected, WIDEST).relative for ids, expected in pairs)
    return [widen(d, own) for d in found]


def widen(found: Difference, own: float) -> Difference:
    """``found`` with the tolerance of a model whose logits move by ``own`` of the largest if weights are rounded."""
    tolerance = min(ROUNDINGS * own, WIDEST)
    if found.ok or not tolerance > found.tolerance:
        return found
    said = f"widened from {found.tolerance:.0e}: rounding alone moves the logits by {own:.1e} of the largest"
    return replace(found, tolerance=tolerance, widened=said)


def _run(name: str, run: StageLogits, tokens: Tensor, reference: Tensor, tolerance: float) -> Difference:
    """The difference of a stage on one batch; whatever stops it is a difference too: runtimes share no error class."""
    try:
        return difference(name, run(tokens), reference, tolerance)
    except MptkError:
        raise
    except Exception as error:  # noqa: BLE001
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        return Difference(name, math.inf, math.inf, tolerance, failure=reason[:200])


def difference(
    stage: str, logits: Tensor | tuple[Tensor, list[int]], reference: Tensor, tolerance: float
) -> Difference:
    """NaN anywhere is an infinite difference, relatively also any difference from zeros alone."""
    if isinstance(logits, tuple):
        logits, positions = logits
        expected = reference[:, positions]
    else:
        expected = reference[:, reference.shape[1] - logits.shape[1] :]
    largest = (logits.float() - expected).abs_().max().item()
    scale = expected.abs().max().item()
    if largest != largest:
        return Difference(stage, math.inf, math.inf, tolerance)
    if not scale:
        return Difference(stage, largest, math.inf if largest else 0.0, tolerance)
    return Difference(stage, largest, largest / scale, tolerance)
