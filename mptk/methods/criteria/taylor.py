"""taylor: first-order estimate of the change of the loss if a unit is removed.

Source: Ma et al. 2023, LLM-Pruner (arXiv 2305.11627): the first-order element-wise importance, summed over the coupled
structure (``param_first`` in its code), I = Σ_k |w_k · ∂L/∂w_k|. Earlier: Molchanov et al. 2019 (arXiv 1906.10771).

What differs: L is the mean next-token cross entropy over all calibration windows. Its gradient is accumulated over the
batches before |·|. The sum runs over every member of the group, biases and norms included, and over all positions of a
unit (LLM-Pruner scores heads and channels by different rules).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from mptk.ir import Analysis, Variable
from mptk.methods.criteria.base import Criterion, Scores, sum_members
from mptk.methods.criteria.observe import Calibration, sum_gradients


@dataclass(frozen=True)
class Gradients:
    """``each``: weight name → the gradient of the mean loss in it."""

    analysis: Analysis
    each: Mapping[str, Tensor]


def measure_gradients(given: Calibration) -> Gradients:
    """The gradients of the weights of all units."""
    names = dict.fromkeys(member.weight for group in given.groups for member in group.members)
    predicted = given.objective.count_predictions(given.samples)
    return Gradients(given.analysis, sum_gradients(given, lambda loss: loss / predicted, names)[0])


def score_by_taylor(evidence: Gradients, variables: Sequence[Variable]) -> Scores:
    """s_u = Σ_{w of unit u} |w · ∂L/∂w|."""
    state = evidence.analysis.program.state

    def compute_importance(name: str) -> Tensor:
        gradient = evidence.each[name].float()
        return (state[name].to(gradient.device).float() * gradient).abs()

    return sum_members(evidence.analysis, variables, compute_importance)


TAYLOR = Criterion(
    "taylor",
    "first-order change of the loss, |weight × gradient|",
    measure_gradients,
    score_by_taylor,
    passes=3,
    gradients=True,
)
