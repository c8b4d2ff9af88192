"""wanda: weight times input norm, summed over a unit.

Source: Sun et al. 2023 (arXiv 2306.11695): S_ij = |W_ij| · ‖x_j‖₂, the norm over all calibration tokens. That scores
single weights within an output row. The structured form, as in Wanda-sp, the baseline of FLAP (An et al. 2023, arXiv
2312.11983), adds it up over a unit: all outputs i of its consumers and all input positions j of the unit.

What differs: positions and consumers are found in the graph, so that units of several positions (heads) and of several
consumers (residual channels) are sums over all of them. A packed expert's inputs are its own tokens. Units that no
weight sums over (query and key channels, which meet each other; whole experts) are scored the same way by the weights
that make or hold them: Σ |W_ij| · ‖x_j‖₂ over the unit's rows i and all inputs j, biases left out.
"""

from __future__ import annotations

from collections.abc import Sequence

from mptk.ir.families import Family
from mptk.methods.criteria.base import Evidence, Scores, sum_uses


def score(evidence: Evidence, families: Sequence[Family]) -> Scores:
    """s_u = Σ_{j in unit u} Σ_i |W_ij| · ‖x_j‖₂."""
    return sum_uses(evidence, families, lambda seen: seen.weight.float().abs() * seen.norm)
