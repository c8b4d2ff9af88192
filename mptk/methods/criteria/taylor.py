"""taylor: first-order estimate of the change of the loss if a unit is removed.

Source: Ma et al. 2023, LLM-Pruner (arXiv 2305.11627): the first-order element-wise importance, summed over the coupled
structure (``param_first`` in its code), I = Σ_k |w_k · ∂L/∂w_k|. Earlier: Molchanov et al. 2019 (arXiv 1906.10771).

What differs: L is the mean next-token cross entropy over all calibration windows. Its gradient is accumulated over the
batches before |·|. The sum runs over every member of the group, biases and norms included, and over all positions of a
unit (LLM-Pruner scores heads and channels by different rules).
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from mptk.ir.families import Family
from mptk.methods.criteria.base import Evidence, Scores, sum_members


def score(evidence: Evidence, families: Sequence[Family]) -> Scores:
    """s_u = Σ_{w of unit u} |w · ∂L/∂w|."""
    state, gradients = evidence.analysis.program.state, evidence.gradients

    def importance(name: str) -> Tensor:
        gradient = gradients[name].float()
        return (state[name].to(gradient.device).float() * gradient).abs()

    return sum_members(evidence, families, importance)
