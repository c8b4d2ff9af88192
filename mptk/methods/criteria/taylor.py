"""taylor: first-order estimate of how much the loss changes without a unit.

Source: Ma et al. 2023, LLM-Pruner (arXiv 2305.11627), the element-wise importance in its first-order form, summed over
the coupled structure (``param_first`` in its code): I = Σ_k |w_k · ∂L/∂w_k|. Older roots: Molchanov et al. 2019 (arXiv
1906.10771).

What differs: L is the mean next-token cross entropy over all calibration windows, whose gradient is added up batch by
batch before |·|; the sum runs over every member of the group, biases and norms too, and over all positions of a unit
(LLM-Pruner scores a head by other rules than a channel).
"""

from __future__ import annotations

from collections.abc import Sequence

from mptk.ir.families import Family
from mptk.methods.criteria.base import Evidence, Scores, sum_members


def score(evidence: Evidence, families: Sequence[Family]) -> Scores:
    """s_u = Σ_{w of unit u} |w · ∂L/∂w|."""
    state, gradients = evidence.analysis.program.state, evidence.gradients
    return sum_members(evidence, families, lambda name: (state[name].float() * gradients[name].float()).abs())
