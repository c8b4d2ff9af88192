"""A criterion: the mean absolute weight of a unit. `mptk prune MODEL --method mean-magnitude` uses it."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mptk.ir.families import Family
from mptk.methods.criteria.base import Criterion, Evidence, Scores, sum_members


def score(evidence: Evidence, families: Sequence[Family]) -> Scores:
    """s_u = Σ |w| / number of weights, over all weights w of unit u."""
    state = evidence.analysis.program.state
    total = sum_members(evidence, families, lambda name: state[name].float().abs())
    count = sum_members(evidence, families, lambda name: torch.ones_like(state[name], dtype=torch.float32))
    return {name: total[name] / count[name] for name in total}


MEAN_MAGNITUDE = Criterion("mean-magnitude", "mean absolute weight of a unit", score)
