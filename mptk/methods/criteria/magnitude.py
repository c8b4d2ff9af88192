"""magnitude: the L2 norm of a unit's weights.

Source: Han et al. 2015 (arXiv 1506.02626) for single weights; Li et al. 2017 (arXiv 1608.08710, §3.1) for whole
filters, with the L1 norm of the producing weights. Here it is the L2 norm over *all* weights of the unit, in every
member of its group: rows of the producer, columns of the consumer, biases, norms.
"""

from __future__ import annotations

from collections.abc import Sequence

from mptk.ir import Analysis, Variable
from mptk.methods.criteria.base import Criterion, Scores, sum_members


def score_by_magnitude(analysis: Analysis, variables: Sequence[Variable]) -> Scores:
    """s_u = √(Σ_{w of unit u} w²)."""
    state = analysis.program.state
    squares = sum_members(analysis, variables, lambda name: state[name].float().square())
    return {name: total.sqrt() for name, total in squares.items()}


MAGNITUDE = Criterion(
    "magnitude", "L2 norm of all weights of a unit", lambda given: given.analysis, score_by_magnitude, passes=0
)
