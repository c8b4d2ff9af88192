"""wanda: weight times input norm, summed over a unit.

Source: Sun et al. 2023 (arXiv 2306.11695): S_ij = |W_ij| · ‖x_j‖₂, the norm over all calibration tokens. It scores
single weights within an output row. The structured form is Wanda-sp, the baseline of FLAP (An et al. 2023, arXiv
2312.11983): it sums over all outputs i of a unit's consumers and all input positions j of the unit.

What differs: positions and consumers are found in the graph. A unit of several positions (a head) or with several
consumers (a residual channel) has the sum over all of them. A packed expert's inputs are the tokens routed to it. If no
weight sums over a unit (query and key channels, whole experts), the weights that make or hold it score it: Σ |W_ij| ·
‖x_j‖₂ over the unit's rows i and all inputs j, without biases.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mptk.ir import Variable
from mptk.methods.criteria.base import Criterion, Scores, sum_uses
from mptk.methods.criteria.observe import Observation, Site, measure_activations


def score_by_wanda(seen: Mapping[Site, Observation], variables: Sequence[Variable]) -> Scores:
    """s_u = Σ_{j in unit u} Σ_i |W_ij| · ‖x_j‖₂."""
    return sum_uses(seen, variables, lambda each: each.weight.float().abs() * each.norm)


WANDA = Criterion("wanda", "|weight| × input norm, summed over a unit's consumers", measure_activations, score_by_wanda)
